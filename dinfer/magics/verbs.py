"""The verbs of `%dinfer`: each makes one call with its parsed words, and returns its result."""

# IPython's decorators have no types.
# mypy: allow-untyped-calls, allow-untyped-decorators

from argparse import Namespace
from typing import Any, NamedTuple

from IPython.core.magic_arguments import argument, magic_arguments

import dinfer
from dinfer.display import DisplayableText
from dinfer.errors import NotPossible
from dinfer.magics.words import number_or_word
from dinfer.session.session import Session


class Call(NamedTuple):
    """The shell and the parsed words of a line."""

    shell: Any
    words: Namespace

    @property
    def session(self) -> Session:
        """The variable `session`, else the newest Session in a variable. Raises NotPossible."""
        names = self.shell.user_ns
        for value in (names.get("session"), *reversed(list(names.values()))):
            if isinstance(value, Session):
                return value
        raise NotPossible("there is no session yet: %dinfer connect, or session = dinfer.connect(n=3).")

    @property
    def run(self) -> Any:
        return self.session.run


@magic_arguments()
def run(call: Call) -> Any:
    """The current run."""
    return call.run


@magic_arguments()
@argument("unit", nargs="?", default="layer", help="op, layer (the default), wave, chunk or token")
@argument("-n", type=number_or_word, default=1, help="how many")
def step(call: Call) -> Any:
    """Move on by ops, layers, waves, chunks or tokens."""
    return call.run.step(call.words.unit, call.words.n)


@magic_arguments()
@argument("unit", nargs="?", default="layer", help="op, layer (the default), wave, chunk or token")
@argument("-n", type=number_or_word, default=1, help="how many")
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
    """The position of each rank."""
    return call.run.where()


@magic_arguments()
def why(call: Call) -> Any:
    """Why the run does not move: who waits for whom, and who is to blame."""
    return call.run.verdict()


@magic_arguments()
@argument("--layer", type=number_or_word)
@argument("--chunk", type=number_or_word)
@argument("--rank", type=number_or_word)
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
@argument("numbers", nargs="*", type=int, metavar="NUMBER", help="those to remove; none: all")
def clear(call: Call) -> Any:
    """Remove breakpoints."""
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
    """Begin the run again, paused at its start."""
    return call.run.restart()


@magic_arguments()
@argument("kind", help="bitflip, nan, zero, stale, swap_kv, permute, lost, append_twice, head_shift, cast, …")
@argument("--rank", type=number_or_word)
@argument("--layer", type=number_or_word)
@argument("--chunk", type=number_or_word)
@argument("--tensor", help="K or V")
@argument("--head", type=number_or_word)
@argument("--token", type=number_or_word, help="a position in the prompt")
@argument("--dim", type=number_or_word)
@argument("--bit", type=number_or_word)
@argument("--where", help="memory, wire or compute")
@argument("--dtype", help="through which to cast")
@argument("--seed", type=int, help="of permute")
def inject(call: Call) -> Any:
    """Break something on purpose: bitflip layer=7 rank=2 tensor=K head=3 token=141 where=memory, …"""
    given = {name: value for name, value in vars(call.words).items() if value is not None}
    return call.run.inject(given.pop("kind"), **given)


@magic_arguments()
@argument("clear", nargs="?", choices=["clear"], help="disarm them")
@argument("numbers", nargs="*", type=int, metavar="NUMBER", help="those to disarm; none: all")
def faults(call: Call) -> Any:
    """The faults that are armed, and what they have done; or disarm them."""
    found = call.run.faults
    for number in call.words.numbers:
        found.remove(number)
    if call.words.clear and not call.words.numbers:
        found.clear()
    return found


def _layers(word: str) -> bool | list[int]:
    """The layers whose values to save."""
    return word == "all" if word in ("all", "none") else [int(one) for one in word.split(",")]


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
@argument("prompt", nargs="+", help="the text, or $name for the text in a variable")
@argument("--free", action="store_true", help="run at once, not paused before the first op")
@argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="chunk_size=8 schedule=lockstep …")
def prefill(call: Call) -> Any:
    """Begin a run of this prompt, paused before its first op; parameters of `dinfer run` as key=value."""
    parameters = dict(word.split("=", 1) for word in call.words.set)
    prompt = " ".join(call.words.prompt)
    return call.session.prefill(prompt, paused=not call.words.free, **parameters)


@magic_arguments()
@argument(
    "prompts",
    nargs="+",
    help="texts, each in quotation marks, or $name for the text, or list of texts, in a variable",
)
@argument(
    "--set",
    nargs="+",
    default=[],
    metavar="KEY=VALUE,…",
    help="chunk_size=8,16 sync_strategy=pairwise,ring …",
)
def sweep(call: Call) -> Any:
    """Run every prompt with every combination of these parameters; a table."""
    chosen = dict(word.split("=", 1) for word in call.words.set)
    return call.session.sweep(call.words.prompts, **{name: some.split(",") for name, some in chosen.items()})


@magic_arguments()
def recover(call: Call) -> Any:
    """After a failure: restart lost ranks and free stuck ones."""
    return call.session.recover()


@magic_arguments()
@argument("-n", type=int, default=20, help="how many lines, the newest")
def log(call: Call) -> DisplayableText:
    """What has happened in this session."""
    return DisplayableText("\n".join(call.session.log[-call.words.n :] if call.words.n > 0 else []))


@magic_arguments()
def panel(call: Call) -> Any:
    """Show the current run as a map with buttons."""
    return call.session.debugger()


@magic_arguments()
@argument("path", nargs="?", default="report.html", help="the file to write (report.html)")
@argument("--prompt", action="store_true", help="with the prompt and the text that came of it")
@argument("--environment", action="store_true", help="with this process's environment variables")
def report(call: Call) -> DisplayableText:
    """Write a report of the current run to one HTML file."""
    words = call.words
    path = call.run.report(words.path, prompt=words.prompt, environment=words.environment)
    return DisplayableText(f"report: {path}")


@magic_arguments()
@argument("folder", help="where to save it")
@argument("--kv", type=_layers, default=True, help="all (the default), none, or layers such as 0,1")
@argument("--no-hidden", action="store_true", help="without the hidden states that entered each rank")
@argument("--prompt", action="store_true", help="with the text of the prompt and of new tokens")
def save(call: Call) -> DisplayableText:
    """Save the current run to a folder, for dinfer.open."""
    words = call.words
    path = call.run.save(words.folder, kv=words.kv, hidden=not words.no_hidden, prompt=words.prompt)
    return DisplayableText(f"saved: {path}")


@magic_arguments()
@argument("rank", type=int, help="the rank to attach to")
@argument("--port", type=int, default=0, help="where it listens; by default 5678 + rank")
def debug(call: Call) -> Any:
    """Let VS Code, or another client of debugpy, attach to a rank."""
    return call.session.listen_for_debugger(call.words.rank, call.words.port)


@magic_arguments()
def close(call: Call) -> None:
    """Leave the ranks: a cluster that dinfer started ends."""
    call.session.close()


@magic_arguments()
@argument("layer", nargs="?", type=number_or_word, help="the layer; none: all")
@argument("--chunk", type=number_or_word)
@argument("--rank", type=number_or_word)
def kv(call: Call) -> Any:
    """The KV that the ranks hold: kv 5 rank=1 chunk=0."""
    return call.run.kv(**vars(call.words))


@magic_arguments()
@argument("layer", nargs="?", type=number_or_word, help="the layer; none: all")
@argument("--chunk", type=number_or_word)
@argument("--ranks", type=lambda word: [int(one) for one in word.split(",")], help="such as 0,2; none: all")
def diff(call: Call) -> Any:
    """Where the ranks' KV differs: diff, diff 5 chunk=1 ranks=0,2."""
    return call.run.kv(layer=call.words.layer, chunk=call.words.chunk).diff(ranks=call.words.ranks)


@magic_arguments()
@argument("what", nargs="?", default="reference", help="with what: reference, transformers' own forward")
@argument("--unchunked", action="store_true", help="the prompt at once, not in the run's chunks")
@argument("--dtype", help="float32, bfloat16 or float16; the run's own by default")
def compare(call: Call) -> Any:
    """Compare what the ranks hold with transformers' own forward."""
    words = call.words
    return call.run.compare(words.what, chunked=not words.unchunked, dtype=words.dtype)
