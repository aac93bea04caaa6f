"""The words of a line: splitting them, replacing variables, finding the flag or value that each word is."""

import difflib
import re
import shlex
from argparse import ArgumentError, ArgumentTypeError, Namespace
from collections.abc import Callable, Mapping
from typing import Any

from IPython.core.error import UsageError
from IPython.core.magic_arguments import MagicArgumentParser

from dinfer.config import Config

KEY_VALUE = re.compile(r"([a-z]\w*)=(.*)", re.DOTALL)

_VARIABLE = re.compile(r"(\w+=)?\$([A-Za-z_]\w*)")

Names = Mapping[str, Any]


def split(line: str) -> list[str]:
    """The words of a line. Quotes hold words together; a backslash has no special meaning. Raises UsageError."""
    words = shlex.shlex(line, posix=True, punctuation_chars=False)
    words.whitespace_split, words.escape, words.commenters = True, "", ""
    try:
        return list(words)
    except ValueError:
        said = "a quote is not closed: put text that has a ' in it between \", and the reverse."
        raise UsageError(said) from None


def read(parser: MagicArgumentParser, words: list[str], names: Names) -> Namespace:
    """The parsed words. `$name` is the value of a variable as it is: text keeps its spaces and quotes, and is never
    a flag. Raises UsageError; for a word that is not a number, with the message of dinfer's own calls."""
    parser.exit_on_error = False
    parser.register("type", int, _checked(int, "a whole number"))
    parser.register("type", float, _checked(float, "a number"))
    try:
        found: Namespace = parser.parse_args(_as_flags(parser, [_in_line(word, names) for word in words]))
    except ArgumentError as error:
        name = (error.argument_name or "").split("/")[-1].lstrip("-").replace("-", "_")
        said = str(error.message)
        raise UsageError(
            f"{name} {said}" if said.startswith("is '") else _with_usage(parser, error)
        ) from None
    except UsageError as error:
        raise UsageError(_with_usage(parser, error)) from None
    for name, value in vars(found).items():
        if isinstance(value, list):
            setattr(found, name, [one for word in value for one in _texts(word, names)])
        elif isinstance(value, str):
            setattr(found, name, " ".join(_texts(value, names)))
    return found


def _with_usage(parser: MagicArgumentParser, error: Exception) -> str:
    """What is wrong with a line's words, and what the line takes."""
    taken = " ".join(parser.format_usage().replace("::", "").split())
    return f"{str(error).rstrip('.')}. The line is {taken}"


def number_or_word(word: str) -> int | str:
    """A whole number, else the word as it is: the call that gets it refuses it with a better message."""
    try:
        return int(word)
    except ValueError:
        return word


def _checked(kind: Callable[[str], float], what: str) -> Callable[[str], float]:
    def read_number(word: str) -> float:
        try:
            return kind(word)
        except ValueError:
            raise ArgumentTypeError(f"is {word!r}; it must be {what}.") from None

    return read_number


def _as_flags(parser: MagicArgumentParser, words: list[str]) -> list[str]:
    """`layer=7` becomes `--layer 7` if that flag exists, a positional value if that exists, and else one of the values
    of `--set`. Raises UsageError for a misspelt name."""
    flags = {flag for action in parser._actions for flag in action.option_strings}
    places = {action.dest: "" for action in parser._actions if not action.option_strings}
    plain, named, values = list[str](), list[str](), list[str]()
    for word in words:
        found = KEY_VALUE.fullmatch(word)
        flag = f"--{found[1].replace('_', '-')}" if found else ""
        if found and flag in flags:
            named += [flag, found[2]]
        elif found and found[1] in places:
            places[found[1]] = found[2]
        elif found and "--set" in flags and found[1] in Config.__dataclass_fields__:
            values.append(word)
        else:
            if found and "--set" in flags:
                _check_spelling(found[1])
            (named if named else plain).append(word)
    if any(places.values()):  # words without a name take the places that are left, in the parser's order
        rest = iter(plain)
        plain = [word for place in places.values() if (word := place or next(rest, ""))] + list(rest)
    return [*plain, *named, *(["--set", *values] if values else [])]


def _check_spelling(name: str) -> None:
    """Raises UsageError for a misspelt parameter, which would become part of the prompt."""
    if near := difflib.get_close_matches(name, Config.__dataclass_fields__, n=1, cutoff=0.8):
        raise UsageError(
            f"there is no parameter {name!r}. Did you mean {near[0]}? Text with a = in it goes into a variable: $text."
        )


def _in_line(word: str, names: Names) -> str:
    """A variable that holds no text, such as a number, is replaced by its text at once."""
    found = _VARIABLE.fullmatch(word)
    if not found or found[2] not in names or isinstance(names[found[2]], str | list | tuple):
        return word
    return f"{found[1] or ''}{names[found[2]]}"


def _texts(word: object, names: Names) -> list[Any]:
    """The texts of the variable that a word names, or the word itself."""
    found = _VARIABLE.fullmatch(word) if isinstance(word, str) else None
    if not found or found[2] not in names:
        return [word]
    value = names[found[2]]
    values = list(map(str, value)) if isinstance(value, list | tuple) else [str(value)]
    return [f"{found[1]}{','.join(values)}"] if found[1] else values
