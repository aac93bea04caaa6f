"""The table of verbs, and how a line becomes a call of one. A new verb is a function under `@magic_arguments()`, and a
line in VERBS."""

# IPython's decorators have no types.
# mypy: allow-untyped-calls, allow-untyped-decorators

import contextlib
import difflib
from collections.abc import Callable, Iterator
from typing import Any

from IPython.core.error import UsageError
from IPython.core.magic import no_var_expand
from IPython.core.magic_arguments import MagicArgumentParser, argument, magic_arguments

import dinfer
from dinfer.display import DisplayableText
from dinfer.magics import verbs
from dinfer.magics.verbs import Call
from dinfer.magics.words import read, split

HELP = ("-h", "--help", "-?")


@magic_arguments()
@argument("verb", nargs="?", help="the verb to explain")
def help_(call: Call) -> DisplayableText:
    """List the verbs, or explain one."""
    if call.words.verb:
        return DisplayableText(usage(_name_of(call.words.verb)))
    width = max(map(len, VERBS)) + 2
    lines = [f"{name:<{width}}{_doc(verb)}" for name, verb in VERBS.items()]
    return DisplayableText("\n".join(["%dinfer VERB …; %dinfer VERB --help says more.", *lines]))


VERBS: dict[str, Callable[[Call], Any]] = {
    "connect": verbs.connect, "load": verbs.load, "prefill": verbs.prefill,
    "sweep": verbs.sweep,
    "run": verbs.run, "where": verbs.where, "why": verbs.why,
    "step": verbs.step, "back": verbs.back, "to": verbs.to,
    "resume": verbs.resume, "pause": verbs.pause, "wait": verbs.wait,
    "break": verbs.break_, "breaks": verbs.breaks, "clear": verbs.clear,
    "decode": verbs.decode, "restart": verbs.restart,
    "kv": verbs.kv, "diff": verbs.diff, "compare": verbs.compare,
    "inject": verbs.inject, "faults": verbs.faults,
    "panel": verbs.panel, "report": verbs.report, "save": verbs.save, "log": verbs.log,
    "recover": verbs.recover, "debug": verbs.debug, "close": verbs.close, "help": help_,
}  # fmt: skip


# -- from a line to a call


def load_into(shell: Any) -> None:
    """Register `%dinfer` with an IPython shell, and import `dinfer` there."""
    shell.push({"dinfer": dinfer}, interactive=False)

    @no_var_expand  # else IPython would put a variable's text into the line, to be split into words
    def line_magic(line: str) -> Any:
        return act(shell, line)

    shell.register_magic_function(line_magic, "line", "dinfer")


def act(shell: Any, line: str) -> Any:
    """Run a line. Raises UsageError, which IPython shows as one message, for every error that is an answer."""
    name, *words = split(line) or ["help"]
    verb = VERBS[_name_of(name)]
    if any(word in HELP for word in words):
        return DisplayableText(usage(name))
    with _one_message():
        return verb(Call(shell, read(_parser(verb), words, getattr(shell, "user_ns", {}))))


def usage(name: str) -> str:
    """The usage text of a verb."""
    verb = VERBS[name]
    parser = _parser(verb)
    parser.prog = f"dinfer {name}"  # IPython puts the % before it
    return parser.format_help().replace("::\n\n", "").strip()


def _name_of(name: str) -> str:
    """The verb of that name. Raises UsageError, which names the nearest verb."""
    if name in VERBS:
        return name
    near = difflib.get_close_matches(name, VERBS, n=1, cutoff=0.4)
    meant = f" Did you mean {near[0]}?" if near else ""
    raise UsageError(f"%dinfer knows no {name!r}.{meant} The verbs are {', '.join(VERBS)}.")


def _parser(verb: Callable[[Call], Any]) -> MagicArgumentParser:
    parser: MagicArgumentParser = verb.parser  # type: ignore[attr-defined] # made by @magic_arguments
    return parser


def _doc(verb: Callable[[Call], Any]) -> str:
    return str(_parser(verb).description)


@contextlib.contextmanager
def _one_message() -> Iterator[None]:
    """Show dinfer's own errors without a traceback; any other error is a bug in dinfer, and keeps it."""
    try:
        yield
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        text = error.args[0] if isinstance(error, KeyError) else error
        raise UsageError(str(text)) from None
