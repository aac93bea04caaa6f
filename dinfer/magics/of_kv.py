"""Verbs that look at the KV: each parses its words, makes one call, and returns what that returns."""
# IPython's decorators have no types.
# mypy: allow-untyped-calls, allow-untyped-decorators

from typing import Any

from IPython.core.magic_arguments import argument, magic_arguments

from dinfer.magics.call import Call
from dinfer.magics.words import number_or_word


@magic_arguments()
@argument("layer", nargs="?", type=number_or_word, help="the layer; none: all")
@argument("--chunk", type=number_or_word)
@argument("--rank", type=number_or_word)
def kv(call: Call) -> Any:
    """What KV the ranks hold: kv 5 rank=1 chunk=0."""
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
