"""Arguments of the calls of users: a wrong name, a missing one, a value of a wrong kind raise one error, before
anything is done.

`check_calls` makes all public methods of a class so; `checked` one function. What a value must be is read from the
annotation: numbers, text, true or false, paths, lists of these, functions, classes. What is one of a few names
(`Literal`, enums), and COUNTED, of which only a run knows how many there are, the function itself checks.
"""

import difflib
import inspect
import os
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from functools import cache, wraps
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar, Union, get_args, get_origin

from dinfer.errors import DinferError, excerpt

P = ParamSpec("P")

T = TypeVar("T")

COUNTED = ("layer", "chunk", "rank", "head", "token", "dim", "bit")
"""numbers that the function itself checks, since it knows how many of these there are"""

CHECKED = "_arguments_are_checked"
"""attribute of functions that check their arguments"""


ELSEWHERE = "_arguments_of_others"
"""attribute of functions: what other call takes an argument, by its name"""


class CallError(DinferError, TypeError, ValueError):
    """A call with arguments that it does not take; the message says what was given, and what it takes."""


class Kind(NamedTuple):
    """What an argument must be: `takes(value)`, and that in words."""

    takes: Callable[[Any], bool]
    words: str
    plural: str = ""


PLAIN = {
    NoneType: Kind(lambda value: value is None, "None"),
    bool: Kind(lambda value: type(value).__name__ in ("bool", "bool_"), "True or False"),
    int: Kind(
        lambda value: isinstance(value, Integral) and not isinstance(value, bool),
        "a whole number",
        "whole numbers",
    ),
    float: Kind(lambda value: isinstance(value, Real) and not isinstance(value, bool), "a number", "numbers"),
    str: Kind(lambda value: isinstance(value, str), "text", "texts"),
}


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean …?` with the closest known name, or an empty text."""
    close = difflib.get_close_matches(name[:100].replace("-", "_"), list(known), n=1)
    return f" Did you mean {close[0]}?" if close else ""


def check_calls(kind: type, of: str, internal: Iterable[str] = ()) -> None:
    """Make the public methods that a class itself defines check their arguments, but for `internal` ones. `of`: what
    users call its objects."""
    for name, value in list(vars(kind).items()):
        if inspect.isfunction(value) and not name.startswith("_") and name not in internal:
            setattr(kind, name, checked(value, of))


def leaving(names: Iterable[str], call: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """For a function which takes none of these: the message says that `call` does."""

    def mark(function: Callable[P, T]) -> Callable[P, T]:
        setattr(function, ELSEWHERE, dict.fromkeys(names, call))
        return function

    return mark


def checked(function: Callable[P, T], of: str = "") -> Callable[P, T]:
    """The function, which raises CallError for arguments that it does not take. `of`: what users call the object whose
    method it is, "" for a function."""
    if hasattr(function, CHECKED):
        return function
    signature = inspect.signature(function)

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            raise CallError(_misfit(function, of, len(args), kwargs)) from None
        for name, kind in _kinds(function).items():
            if name in given and not kind.takes(given[name]):
                call = _call(function, of)
                raise CallError(
                    f"{name} is {excerpt(given[name])}; it must be {kind.words}. The call is {call}."
                )
        return function(*args, **kwargs)

    setattr(called, CHECKED, True)
    return called


def argument_check(function: Callable[..., Any], of: str = "") -> Callable[..., None]:
    """The check alone, called with the arguments, for a decorator that has more to do: it sets CHECKED on what it
    makes."""
    return checked(wraps(function)(lambda *_, **__: None), of)


def _parameters(function: Callable[..., Any], of: str) -> list[inspect.Parameter]:
    """Without the object itself."""
    return list(inspect.signature(function).parameters.values())[bool(of) :]


def _call(function: Callable[..., Any], of: str) -> str:
    """How it is called: `run.step(unit='layer', n=1)`."""
    bare = [one.replace(annotation=inspect.Parameter.empty) for one in _parameters(function, of)]
    return f"{of}{'.' * bool(of)}{function.__name__.removeprefix('_')}{inspect.Signature(bare)}"


def _misfit(function: Callable[..., Any], of: str, args: int, kwargs: dict[str, Any]) -> str:
    """Why these arguments do not fit: an unknown name, too many values, one given twice, or one that is missing."""
    parameters, call = _parameters(function, of), _call(function, of)
    what, args = call.partition("(")[0], args - bool(of)
    named = [one.name for one in parameters if one.kind != one.VAR_KEYWORD]
    placed = [one.name for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    unknown = [name for name in kwargs if name not in named]
    if unknown and (other := getattr(function, ELSEWHERE, {}).get(unknown[0])):
        return f"{what} takes no {unknown[0]!r}: it is a parameter of {other}. The call is {call}."
    if unknown and len(named) == len(parameters):
        return f"{what} takes no {unknown[0]!r}.{nearest(unknown[0], named)} The call is {call}."
    if args > len(placed):
        most = f"at most {len(placed)}" if placed else "no"
        return f"{what} takes {most} value{'s' * (len(placed) != 1)} without a name; got {args}. The call is {call}."
    if twice := [name for name in placed[:args] if name in kwargs]:
        return f"{what} got {twice[0]} twice, without its name and with it. The call is {call}."
    missing = [
        one.name
        for one in parameters
        if one.default is one.empty
        and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
        and one.name not in {*placed[:args], *kwargs}
    ]
    return f"{what} needs {' and '.join(missing)}. The call is {call}."


@cache
def _kinds(function: Callable[..., Any]) -> dict[str, Kind]:
    """What the arguments must be, of those of which that can be said."""
    names = dict(getattr(inspect.unwrap(function), "__globals__", {}))
    found = {}
    for one in inspect.signature(function).parameters.values():
        hint = one.annotation
        if isinstance(hint, str):
            try:
                hint = eval(hint, names)  # an annotation of dinfer's own
            except NameError:  # of a type that is imported for type checkers only
                continue
        if one.name in COUNTED or one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD):
            continue
        if kind := _kind(hint):
            found[one.name] = kind
    return found


def _kind(hint: Any) -> Kind | None:
    """None for what anything may be, as far as this can say."""
    if hint in PLAIN:
        return PLAIN[hint]
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        kinds = [_kind(one) for one in args]
        known = [kind for kind in kinds if kind]
        if len(known) < len(kinds):
            return None
        return Kind(
            lambda value: any(kind.takes(value) for kind in known),
            _any_of(kind.words for kind in known),
            _any_of(kind.plural or kind.words for kind in known),
        )
    if origin is Sequence:
        return _list_of(_kind(args[0]))
    if origin is Callable or hint is Callable:
        return Kind(callable, "a function")
    if origin is Literal or not isinstance(hint, type) or hint in (Any, inspect.Parameter.empty):
        return None
    if issubclass(hint, Enum) or getattr(hint, "_is_protocol", False):
        return None
    if issubclass(hint, os.PathLike):
        return Kind(lambda value: isinstance(value, os.PathLike), "a path")
    return Kind(lambda value: isinstance(value, hint), f"a {hint.__name__}")


def _any_of(words: Iterable[str]) -> str:
    """`text, a path or None`, each once."""
    *others, last = dict.fromkeys(words)
    return f"{', '.join(others)} or {last}" if others else last


def _list_of(kind: Kind | None) -> Kind:
    """An iterable of these, of which those are looked at that may be gone through twice."""

    def takes(value: Any) -> bool:
        if not isinstance(value, Iterable) or isinstance(value, (str, bytes)):
            return False
        return kind is None or not isinstance(value, (list, tuple)) or all(map(kind.takes, value))

    of = f" of {kind.plural or kind.words}" if kind else ""
    return Kind(takes, f"a list{of}", f"lists{of}")
