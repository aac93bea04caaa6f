"""Verbs that break things on purpose: each parses its words, makes one call, and returns what that returns."""
# IPython's decorators have no types.
# mypy: allow-untyped-calls, allow-untyped-decorators

from typing import Any

from IPython.core.magic_arguments import argument, magic_arguments

from dinfer.magics.call import Call
from dinfer.magics.words import number_or_word


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
