"""Verbs of a run: each parses its words, makes one call, and returns what that returns."""
# IPython's decorators have no types.
# mypy: allow-untyped-calls, allow-untyped-decorators

from typing import Any

from IPython.core.magic_arguments import argument, magic_arguments

from dinfer.magics.call import Call
from dinfer.magics.words import number_or_word


@magic_arguments()
def run(call: Call) -> Any:
    """What the current run is."""
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
    """Where each rank stands."""
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
