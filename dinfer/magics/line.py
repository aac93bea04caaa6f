"""From a line to a call: the table of verbs, and how the words of a line become the arguments of one.

A new verb is a function under `@verb()`, or a line that names the method to call with the words as they are.
"""

# IPython's decorators have no types.
# mypy: allow-untyped-calls

import difflib
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from IPython.core.error import UsageError
from IPython.core.magic import no_var_expand
from IPython.core.magic_arguments import MagicArgumentParser, argument

import dinfer
from dinfer.display import DisplayableText
from dinfer.errors import NotPossible
from dinfer.magics.words import number_or_word, read, split

if TYPE_CHECKING:
    from dinfer.session.session import Session


class Call(NamedTuple):
    """The shell and the parsed words of a line."""

    shell: Any
    words: Namespace

    @property
    def session(self) -> "Session":
        """The variable `session`, else the newest Session in a variable. Raises NotPossible."""
        names = self.shell.user_ns
        made = sys.modules.get("dinfer.session.session")  # importing it here would bring PyTorch
        for value in (names.get("session"), *reversed(list(names.values()))):
            if made and isinstance(value, made.Session):
                found: Session = value
                return found
        raise NotPossible("there is no session yet: %dinfer connect, or session = dinfer.connect(n=3).")

    @property
    def run(self) -> Any:
        return self.session.run

    @property
    def given(self) -> dict[str, Any]:
        """The words that the line has, by name."""
        return {name: value for name, value in vars(self.words).items() if value is not None}


VerbFunction = Callable[[Call], Any]


class Verb(NamedTuple):
    """`about`: its help; `words`: what may follow it in a line."""

    act: VerbFunction
    about: str
    words: tuple[argument, ...]

    def parser(self, name: str) -> MagicArgumentParser:
        parser = MagicArgumentParser(f"dinfer {name}", description=self.about)  # IPython puts the % before it
        for word in self.words:
            word.add_to_parser(parser, None)
        return parser


VERBS: dict[str, Verb] = {}
"""in the order in which they are listed"""


# -- from a line to a call


def load_into(shell: Any) -> None:
    """Register `%dinfer` with an IPython shell, and import `dinfer` there."""
    shell.push({"dinfer": dinfer}, interactive=False)
    # Else IPython would put a variable's text into the line, to be split into words.
    line_magic = no_var_expand(lambda line: act(shell, line))
    shell.register_magic_function(line_magic, "line", "dinfer")


def act(shell: Any, line: str) -> Any:
    """Run a line. Raises UsageError, which IPython shows as one message, for every error that is an answer."""
    name, *words = split(line) or ["help"]
    found = _verb_of(name)
    if {"-h", "--help", "-?"} & set(words):
        return DisplayableText(usage(name))
    try:
        return found.act(Call(shell, read(found.parser(name), words, getattr(shell, "user_ns", {}))))
    except (RuntimeError, ValueError, OSError, KeyError) as error:  # others are bugs: their tracebacks stay
        raise UsageError(str(error.args[0] if isinstance(error, KeyError) else error)) from None


def usage(name: str) -> str:
    """The usage text of a verb. Raises UsageError, which names the nearest verb, for an unknown one."""
    return _verb_of(name).parser(name).format_help().replace("::\n\n", "").strip()


def _verb_of(name: str) -> Verb:
    if name in VERBS:
        return VERBS[name]
    near = difflib.get_close_matches(name, VERBS, n=1, cutoff=0.4)
    meant = f" Did you mean {near[0]}?" if near else ""
    raise UsageError(f"%dinfer knows no {name!r}.{meant} The verbs are {', '.join(VERBS)}.")


# -- the verbs


def verb(*words: argument) -> Callable[[VerbFunction], VerbFunction]:
    """Makes a function the verb of its name, which its docstring explains."""

    def made(function: VerbFunction) -> VerbFunction:
        VERBS[function.__name__.strip("_")] = Verb(function, function.__doc__ or "", words)
        return function

    return made


def method(path: str, about: str, *words: argument, name: str = "") -> None:
    """Makes a method of the session or of its run a verb: it is called with the words in their order."""
    VERBS[name or path.split(".")[1]] = Verb(
        lambda call: attrgetter(path)(call)(*vars(call.words).values()), about, words
    )


def _numbers(word: str) -> list[int]:
    return [int(one) for one in word.split(",")]


def _layers(word: str) -> bool | list[int]:
    return word == "all" if word in ("all", "none") else _numbers(word)


setting = partial(argument, "--set", nargs="+", default=[])
UNIT = argument("unit", nargs="?", default="layer", help="op, layer (the default), wave, chunk or token")
HOW_MANY = argument("-n", type=number_or_word, default=1, help="how many")
LAYER = argument("layer", nargs="?", type=number_or_word, help="the layer; none: all")
OF_LAYER = argument("--layer", type=number_or_word)
OF_CHUNK = argument("--chunk", type=number_or_word)
OF_RANK = argument("--rank", type=number_or_word)


@verb(
    argument("where", nargs="?", default="ipyparallel", help="ipyparallel (the default) or threads"),
    argument("-n", type=int, help="how many ranks; by default 3, or all of a profile of `dinfer profile`"),
    argument("--profile", default="default", help="the IPython profile of the cluster"),
    argument("--cluster-id", help="which of its clusters"),
    argument(
        "--take", action="store_true", help="take over engines that another session holds, with model and run"
    ),
)
def connect(call: Call) -> None:
    """Join the running cluster, or start one; the session is `session` from then on."""
    on_cluster = {"cluster_id": call.words.cluster_id, "take": call.words.take}
    options = {} if call.words.where == "threads" else on_cluster
    options |= {"profile": call.words.profile}
    call.shell.user_ns["session"] = dinfer.connect(call.words.where, call.words.n, **options)


@verb(
    argument("model_path", nargs="?", default="demo", help="folder of a checkpoint, or demo (the default)"),
    argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16"),
    argument("--gpu-ids", default="", help="the GPU of each rank, such as 0,1,2; none: the CPU"),
    argument("--threads", type=int, default=0, help="CPU threads of each rank; 0: the cores shared out"),
)
def load(call: Call) -> "Session":
    """Load a checkpoint on every rank."""
    gpu_ids = [int(word) for word in call.words.gpu_ids.split(",") if word.strip()]
    return call.session.load(**{**vars(call.words), "gpu_ids": gpu_ids})


@verb(
    argument("prompt", nargs="+", help="the text, or $name for the text in a variable"),
    argument("--free", action="store_true", help="run at once, not paused before the first op"),
    setting(metavar="KEY=VALUE", help="chunk_size=8 schedule=lockstep …"),
)
def prefill(call: Call) -> Any:
    """Begin a run of this prompt, paused before its first op; parameters of `dinfer run` as key=value."""
    parameters = dict(word.split("=", 1) for word in call.words.set)
    return call.session.prefill(" ".join(call.words.prompt), paused=not call.words.free, **parameters)


@verb(
    argument(
        "prompts",
        nargs="+",
        help="texts, each in quotation marks, or $name for the text, or list of texts, in a variable",
    ),
    setting(metavar="KEY=VALUE,…", help="chunk_size=8,16 sync_strategy=pairwise,ring …"),
)
def sweep(call: Call) -> Any:
    """Run every prompt with every combination of these parameters; a table."""
    chosen = dict(word.split("=", 1) for word in call.words.set)
    return call.session.sweep(call.words.prompts, **{name: some.split(",") for name, some in chosen.items()})


@verb()
def run(call: Call) -> Any:
    """The current run."""
    return call.run


method("run.where", "The position of each rank.")
method("run.verdict", "Why the run does not move: who waits for whom, and who is to blame.", name="why")
method("run.step", "Move on by ops, layers, waves, chunks or tokens.", UNIT, HOW_MANY)
method("run.step_back", "Undo the last ops, layers, waves, chunks or tokens.", UNIT, HOW_MANY, name="back")
method(
    "run.run_to",
    "Run to just after that block is on every rank, forward or back.",
    argument("chunk", type=int),
    argument("layer", type=int),
    name="to",
)
method(
    "run.play",
    "Step by itself, to the next breakpoint or the end of prefill; returns at once.",
    UNIT,
    argument("per_second", nargs="?", type=float, default=2.0, help="steps a second (2)"),
)
method("run.undo", "Undo the last action, whatever it was; the next undo goes further back.")
method("run.resume", "Let the ranks go on to the next breakpoint, or the end of prefill; returns at once.")
method("run.pause", "Stop at the nearest cut.")
method(
    "run.wait",
    "Wait until the run stands, and a play has ended.",
    argument("timeout", nargs="?", type=float, help="seconds to wait at most"),
)


@verb(
    OF_LAYER,
    OF_CHUNK,
    OF_RANK,
    argument("--op", help="layer (the default), embed, send, recv or norm"),
    argument("--when", nargs="+", metavar="CONDITION", help="nan, inf, absmax > 100, digest differs, …"),
    argument("--hit", type=number_or_word, help="stop only at its hit of this number, from 1"),
)
def break_(call: Call) -> Any:
    """Stop after such ops: layer=7 chunk=1 rank=2 op=recv when=slower than 5 ms, or as flags."""
    given = call.given
    if "when" in given:
        given["when"] = " ".join(given["when"])
    return call.run.break_at(**given)


@verb()
def breaks(call: Call) -> Any:
    """The breakpoints that are set."""
    return call.run.breakpoints


@verb(argument("numbers", nargs="*", type=int, metavar="NUMBER", help="those to remove; none: all"))
def clear(call: Call) -> Any:
    """Remove breakpoints."""
    return _without(call.run.breakpoints, call.words.numbers, is_all=True)


method(
    "run.decode",
    "Run prefill to its end if need be, then generate.",
    argument("max_new_tokens", nargs="?", type=int, help="how many more tokens"),
)
method("run.restart", "Begin the run again, paused at its start.")


@verb(LAYER, OF_CHUNK, OF_RANK)
def kv(call: Call) -> Any:
    """The KV that the ranks hold: kv 5 rank=1 chunk=0."""
    return call.run.kv(**vars(call.words))


@verb(LAYER, OF_CHUNK, argument("--ranks", type=_numbers, help="such as 0,2; none: all"))
def diff(call: Call) -> Any:
    """Where the ranks' KV differs: diff, diff 5 chunk=1 ranks=0,2."""
    return call.run.kv(layer=call.words.layer, chunk=call.words.chunk).diff(ranks=call.words.ranks)


@verb(
    argument("what", nargs="?", default="reference", help="with what: reference, transformers' own forward"),
    argument("--unchunked", action="store_true", help="the prompt at once, not in the run's chunks"),
    argument("--dtype", help="float32, bfloat16 or float16; the run's own by default"),
)
def compare(call: Call) -> Any:
    """Compare what the ranks hold with transformers' own forward."""
    words = call.words
    return call.run.compare(words.what, chunked=False if words.unchunked else None, dtype=words.dtype)


@verb(
    argument("against", nargs="?", default="reference", help="reference, or the folder of a saved run"),
    OF_RANK,
    argument("--what", help="tokens, logits or hidden; by default the first that differs"),
)
def bisect(call: Call) -> Any:
    """Find the block with which the answer turns wrong."""
    words = call.words
    against = words.against if words.against == "reference" else dinfer.open(words.against)
    return call.run.bisect(against, rank=words.rank, what=words.what)


@verb(
    argument(
        "kind",
        help="bitflip, nan, zero, stale, swap_kv, permute, lost, append_twice, head_shift, cast, 'slow link', …",
    ),
    OF_RANK,
    OF_LAYER,
    OF_CHUNK,
    argument("--tensor", help="K or V"),
    argument("--head", type=number_or_word),
    argument("--token", type=number_or_word, help="a position in the prompt"),
    argument("--dim", type=number_or_word),
    argument("--bit", type=number_or_word),
    argument("--where", help="memory, wire or compute"),
    argument("--dtype", help="through which to cast"),
    argument("--seed", type=int, help="of permute"),
    argument("--source", type=number_or_word, help="of a slow link, the rank that sends"),
    argument("--target", type=number_or_word, help="of a slow link, the rank that receives"),
    argument("--ms", type=float, help="of a slow link or rank, milliseconds more"),
    argument("--factor", type=float, help="of a slow rank, times as long"),
)
def inject(call: Call) -> Any:
    """Break something on purpose: bitflip layer=7 rank=2 tensor=K head=3 token=141 where=memory, …"""
    given = call.given
    return call.run.inject(given.pop("kind"), **given)


@verb(
    argument("clear", nargs="?", choices=["clear"], help="disarm them"),
    argument("numbers", nargs="*", type=int, metavar="NUMBER", help="those to disarm; none: all"),
)
def faults(call: Call) -> Any:
    """The faults that are armed, and what they have done; or disarm them."""
    return _without(call.run.faults, call.words.numbers, is_all=bool(call.words.clear))


def _without(found: Any, numbers: list[int], *, is_all: bool) -> Any:
    """Breakpoints or faults after some were removed; all if none is named and `is_all`."""
    for number in numbers:
        found.remove(number)
    if is_all and not numbers:
        found.clear()
    return found


method("session.debugger", "Show the current run as a map with buttons.", name="panel")


@verb(
    argument("path", nargs="?", default="report.html", help="the file to write (report.html)"),
    argument("--prompt", action="store_true", help="with the prompt and the text that came of it"),
    argument("--environment", action="store_true", help="with this process's environment variables"),
)
def report(call: Call) -> DisplayableText:
    """Write a report of the current run to one HTML file."""
    return DisplayableText(f"report: {call.run.report(**vars(call.words))}")


@verb(
    argument("folder", help="where to save it"),
    argument("--kv", type=_layers, default=True, help="all (the default), none, or layers such as 0,1"),
    argument("--no-hidden", action="store_true", help="without the hidden states that entered each rank"),
    argument("--prompt", action="store_true", help="with the text of the prompt and of new tokens"),
)
def save(call: Call) -> DisplayableText:
    """Save the current run to a folder, for dinfer.open."""
    words = call.words
    path = call.run.save(words.folder, kv=words.kv, hidden=not words.no_hidden, prompt=words.prompt)
    return DisplayableText(f"saved: {path}")


@verb(argument("-n", type=int, default=20, help="how many lines, the newest"))
def log(call: Call) -> DisplayableText:
    """What has happened in this session."""
    return DisplayableText("\n".join(call.session.log[-call.words.n :] if call.words.n > 0 else []))


method(
    "session.watch",
    "See every torch.distributed call of %%px cells; say why one hangs.",
    argument(
        "--compare", action="store_true", help="take what watch.compare('reference') needs of models, too"
    ),
)
method("session.recover", "After a failure: restart lost ranks and free stuck ones.")
method(
    "session.listen_for_debugger",
    "Let VS Code, or another client of debugpy, attach to a rank.",
    argument("rank", type=int, help="the rank to attach to"),
    argument("--port", type=int, default=0, help="where it listens; by default 5678 + rank"),
    name="debug",
)
method("session.close", "Leave the ranks: a cluster that dinfer started ends.")


@verb(argument("verb", nargs="?", help="the verb to explain"))
def help_(call: Call) -> DisplayableText:
    """List the verbs, or explain one."""
    if call.words.verb:
        return DisplayableText(usage(call.words.verb))
    width = max(map(len, VERBS)) + 2
    lines = [f"{name:<{width}}{one.about}" for name, one in VERBS.items()]
    return DisplayableText("\n".join(["%dinfer VERB …; %dinfer VERB --help says more.", *lines]))
