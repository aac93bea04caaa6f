"""`%dinfer VERB …`: the session's calls as IPython line magics, for those who would rather not type parentheses.

A verb parses its words, makes one call of `Session` or `Run`, and returns what that returns. Nothing is decided here. A
new verb is a function under `@magic_arguments()` and a line in VERBS.
"""
# IPython's decorators have no types.
# mypy: allow-untyped-calls, allow-untyped-decorators

import contextlib
import difflib
import re
import shlex
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from IPython.core.error import UsageError
from IPython.core.magic_arguments import MagicArgumentParser, argument, magic_arguments

import dinfer
from dinfer.config import Config
from dinfer.session.said import Said
from dinfer.session.session import Session

KEY_VALUE = re.compile(r"([a-z]\w*)=(.*)", re.DOTALL)
HELP = ("-h", "--help", "-?")


class Text(Said):
    """Lines to be shown."""

    def __init__(self, lines: list[str]) -> None:
        self._text = "\n".join(lines)

    def __str__(self) -> str:
        return self._text


class Call(NamedTuple):
    """What a verb is given: the shell and the words of the line."""

    shell: Any
    words: Namespace

    @property
    def session(self) -> Session:
        """The one that the user calls `session`, else the newest that has a name. Raises RuntimeError."""
        names = self.shell.user_ns
        for value in (names.get("session"), *reversed(list(names.values()))):
            if isinstance(value, Session):
                return value
        raise RuntimeError("there is no session yet: %dinfer connect, or session = dinfer.connect(n=3).")

    @property
    def run(self) -> Any:
        return self.session.run


# -- the session


@magic_arguments()
@argument("where", nargs="?", default="ipyparallel", help="ipyparallel (the default) or threads")
@argument("-n", type=int, default=3, help="how many ranks")
@argument("--profile", default="default", help="the IPython profile of the cluster")
@argument("--cluster-id", help="which of its clusters")
def connect(call: Call) -> None:
    """Join the running cluster, or start one; the session is `session` from then on."""
    options = {} if call.words.where == "threads" else {"cluster_id": call.words.cluster_id}
    options |= {"profile": call.words.profile}
    call.shell.user_ns["session"] = dinfer.connect(call.words.where, call.words.n, **options)


@magic_arguments()
@argument("model_path", nargs="?", default="demo", help="folder of a checkpoint, or demo (the default)")
@argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
@argument("--gpu-ids", default="", help="the GPU of each rank, such as 0,1,2; none: the CPU")
@argument("--threads", type=int, default=0, help="CPU threads of each rank; 0: the cores shared out")
def load(call: Call) -> Session:
    """Load a checkpoint on every rank."""
    words = call.words
    gpu_ids = [int(word) for word in words.gpu_ids.split(",") if word.strip()]
    return call.session.load(words.model_path, dtype=words.dtype, gpu_ids=gpu_ids, threads=words.threads)


@magic_arguments()
@argument("prompt", nargs="+", help="the text, or $name for that of a variable")
@argument("--free", action="store_true", help="run at once, instead of standing before the first op")
@argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="chunk_size=8 schedule=lockstep …")
def prefill(call: Call) -> Any:
    """Make a run of this prompt, paused before its first op; parameters of `dinfer run` as key=value."""
    parameters = dict(word.split("=", 1) for word in call.words.set)
    prompt = " ".join(call.words.prompt)
    return call.session.prefill(prompt, paused=not call.words.free, **parameters)


@magic_arguments()
def recover(call: Call) -> Text:
    """After a failure: bring lost ranks back and free those that are stuck."""
    return Text([call.session.recover()])


@magic_arguments()
@argument("-n", type=int, default=20, help="how many lines, the newest")
def log(call: Call) -> Text:
    """What has happened in this session."""
    return Text(call.session.log[-call.words.n :] if call.words.n > 0 else [])


@magic_arguments()
def panel(call: Call) -> Any:
    """Show the current run as a map with buttons."""
    return call.session.debugger()


@magic_arguments()
@argument("path", nargs="?", default="report.html", help="the file to write (report.html)")
@argument("--prompt", action="store_true", help="with the prompt and the text that came of it")
@argument("--environment", action="store_true", help="with this process's environment variables")
def report(call: Call) -> Text:
    """Write what is known of the current run to one HTML file."""
    words = call.words
    path = call.run.report(words.path, prompt=words.prompt, environment=words.environment)
    return Text([f"report: {path}"])


@magic_arguments()
@argument("rank", type=int, help="the rank to attach to")
@argument("--port", type=int, default=0, help="where it listens; by default 5678 + rank")
def debug(call: Call) -> Any:
    """Let VS Code, or another client of debugpy, attach to a rank."""
    return call.session.listen_for_debugger(call.words.rank, call.words.port)


@magic_arguments()
def close(call: Call) -> None:
    """Part from the ranks."""
    call.session.close()


# -- the run


@magic_arguments()
def run(call: Call) -> Any:
    """What the current run is."""
    return call.run


@magic_arguments()
@argument("unit", nargs="?", default="layer", help="op, layer (the default), wave, chunk or token")
@argument("-n", type=int, default=1, help="how many")
def step(call: Call) -> Any:
    """Move on by ops, layers, waves, chunks or tokens."""
    return call.run.step(call.words.unit, call.words.n)


@magic_arguments()
@argument("unit", nargs="?", default="layer", help="op, layer (the default), wave, chunk or token")
@argument("-n", type=int, default=1, help="how many")
def back(call: Call) -> Any:
    """Go back by ops, layers, waves, chunks or tokens."""
    return call.run.step_back(call.words.unit, call.words.n)


@magic_arguments()
@argument("chunk", type=int)
@argument("layer", type=int)
def to(call: Call) -> Any:
    """Run to just after that block is on every rank, forward or back."""
    return call.run.run_to(call.words.chunk, call.words.layer)


@magic_arguments()
def resume(call: Call) -> None:
    """Let the ranks go on to the next breakpoint, or the end of prefill; returns at once."""
    call.run.resume()


@magic_arguments()
def pause(call: Call) -> Any:
    """Stop at the nearest cut."""
    return call.run.pause()


@magic_arguments()
@argument("timeout", nargs="?", type=float, help="seconds to wait at most")
def wait(call: Call) -> Any:
    """Wait until the run stands."""
    return call.run.wait(call.words.timeout)


@magic_arguments()
def where(call: Call) -> Any:
    """Where each rank stands."""
    return call.run.where()


@magic_arguments()
@argument("--layer", type=int)
@argument("--chunk", type=int)
@argument("--rank", type=int)
@argument("--op", help="layer (the default), embed, send, recv or norm")
@argument("--when", nargs="+", metavar="CONDITION", help="nan, inf, absmax > 100, digest differs, …")
def break_(call: Call) -> Any:
    """Stop after such ops: layer=7 chunk=1 rank=2 op=recv when=slower than 5 ms, or as flags."""
    given = {name: value for name, value in vars(call.words).items() if value is not None}
    if "when" in given:
        given["when"] = " ".join(given["when"])
    return call.run.break_at(**given)


@magic_arguments()
def breaks(call: Call) -> Any:
    """The breakpoints that are set."""
    return call.run.breakpoints


@magic_arguments()
@argument("numbers", nargs="*", type=int, metavar="NUMBER", help="those to end; none: all")
def clear(call: Call) -> Any:
    """End breakpoints."""
    found = call.run.breakpoints
    for number in call.words.numbers:
        found.remove(number)
    if not call.words.numbers:
        found.clear()
    return found


@magic_arguments()
@argument("max_new_tokens", nargs="?", type=int, help="how many more tokens")
def decode(call: Call) -> Any:
    """Run prefill to its end if need be, then generate."""
    return call.run.decode(call.words.max_new_tokens)


@magic_arguments()
def restart(call: Call) -> Any:
    """Begin the run anew, paused at its start."""
    return call.run.restart()


@magic_arguments()
@argument("verb", nargs="?", help="a verb to be explained")
def help_(call: Call) -> Text:
    """List the verbs, or explain one."""
    if call.words.verb:
        return Text([usage(_name_of(call.words.verb))])
    width = max(map(len, VERBS)) + 2
    lines = [f"{name:<{width}}{_doc(verb)}" for name, verb in VERBS.items()]
    return Text(["%dinfer VERB …; %dinfer VERB --help says more.", *lines])


VERBS: dict[str, Callable[[Call], Any]] = {
    "connect": connect, "load": load, "prefill": prefill, "run": run, "where": where,
    "step": step, "back": back, "to": to, "resume": resume, "pause": pause, "wait": wait,
    "break": break_, "breaks": breaks, "clear": clear, "decode": decode, "restart": restart,
    "panel": panel, "report": report, "log": log, "recover": recover, "debug": debug, "close": close, "help": help_,
}  # fmt: skip


# -- from a line to a call


def load_into(shell: Any) -> None:
    """Register `%dinfer` with an IPython shell, and give it the name `dinfer`."""
    shell.push({"dinfer": dinfer}, interactive=False)
    shell.register_magic_function(lambda line: act(shell, line), "line", "dinfer")


def act(shell: Any, line: str) -> Any:
    """Do what a line says. Raises UsageError, which IPython shows as one message, for whatever goes wrong."""
    name, *words = split(line) or ["help"]
    verb = VERBS[_name_of(name)]
    if any(word in HELP for word in words):
        return Text([usage(name)])
    with _one_message():
        return verb(Call(shell, _parser(verb).parse_args(_as_flags(_parser(verb), words))))


def split(line: str) -> list[str]:
    """The words of a line: quotes hold words together, a backslash is a backslash. Raises UsageError."""
    words = shlex.shlex(line, posix=True, punctuation_chars=False)
    words.whitespace_split, words.escape, words.commenters = True, "", ""
    try:
        return list(words)
    except ValueError:
        raise UsageError(
            "a quote is not closed: put text that has a ' in it between \", and the reverse."
        ) from None


def usage(name: str) -> str:
    """How a verb is called."""
    verb = VERBS[name]
    parser = _parser(verb)
    parser.prog = f"dinfer {name}"  # IPython puts the % before it
    return parser.format_help().replace("::\n\n", "").strip()


def _as_flags(parser: MagicArgumentParser, words: list[str]) -> list[str]:
    """`layer=7` becomes `--layer 7`, where there is such a flag, and else one of the values of `--set`."""
    flags = {flag for action in parser._actions for flag in action.option_strings}
    plain, named, values = list[str](), list[str](), list[str]()
    for word in words:
        found = KEY_VALUE.fullmatch(word)
        flag = f"--{found[1].replace('_', '-')}" if found else ""
        if found and flag in flags:
            named += [flag, found[2]]
        elif found and "--set" in flags and found[1] in Config.__dataclass_fields__:
            values.append(word)
        else:
            (named if named else plain).append(word)
    return [*plain, *named, *(["--set", *values] if values else [])]


def _name_of(name: str) -> str:
    """The verb. Raises UsageError, naming the nearest."""
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
    """dinfer's own errors are told without a traceback; any other is a mistake in dinfer, and keeps it."""
    try:
        yield
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        text = error.args[0] if isinstance(error, KeyError) else error
        raise UsageError(str(text)) from None
