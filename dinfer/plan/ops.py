"""Op: one action of one rank, the values that it needs and makes, and its text form.

A value is a hidden state, a block or the final state. Dependencies between ops are this data flow and nothing else.
"""

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Literal, NamedTuple

from dinfer.errors import DinferError, excerpt
from dinfer.severity import Severity

OpKind = Literal["embed", "layer", "norm", "send", "recv"]
ValueKind = Literal["hidden", "kv", "final"]


class PlanError(DinferError, ValueError):
    """A plan, its text, or a place in it is invalid; the message names the given value and the allowed ones."""


class NothingYet(PlanError):
    """What was asked for is not computed yet, or not everywhere: nothing is wrong, and the message says how far the run
    is."""

    severity = Severity.NOTE


class Value(NamedTuple):
    """A value that a rank can hold.

    hidden: the hidden state of a chunk before a layer (layer == layers: after the last one); kv: the block of a layer
    for a chunk; final: the normed hidden state of the prompt's last token.
    """

    what: ValueKind
    chunk: int = -1
    layer: int = -1

    def __str__(self) -> str:
        if self.what == "final":
            return "final"
        return f"{'block' if self.what == 'kv' else 'hidden'} c{self.chunk} l{self.layer}"


FINAL = Value("final")


class Op(NamedTuple):
    """One action of one rank. `peer` and `tokens` are set for `send` and `recv` only.

    `norm` is the last op of compute: the model's final norm over the hidden state after all layers.
    """

    kind: OpKind
    chunk: int
    layer: int = -1
    what: ValueKind = "hidden"
    peer: int = -1
    tokens: int = 0

    @property
    def is_transfer(self) -> bool:
        """Whether it is a send or a recv."""
        return self.kind in ("send", "recv")

    @property
    def communicator(self) -> Literal["hidden", "kv"]:
        """The process group of this transfer. Blocks have their own, so that they do not delay hidden states."""
        return "kv" if self.what == "kv" else "hidden"

    @property
    def value(self) -> Value:
        """The value that a transfer carries."""
        return FINAL if self.what == "final" else Value(self.what, self.chunk, self.layer)

    def needs(self) -> list[Value]:
        """The values that must be on this rank before the op may start."""
        if self.kind == "layer":
            earlier = [Value("kv", chunk, self.layer) for chunk in range(self.chunk)]
            return [Value("hidden", self.chunk, self.layer), *earlier]
        if self.kind == "norm":
            return [Value("hidden", self.chunk, self.layer)]
        return [self.value] if self.kind == "send" else []

    def makes(self) -> tuple[Value, ...]:
        """The values that the op adds to this rank."""
        return _made_by(self)

    def __str__(self) -> str:
        """The op's line in a plan, for example `send kv c0 l5 -> 2, 128 tokens`."""
        if self.kind == "embed":
            return f"embed c{self.chunk}"
        if not self.is_transfer:
            return f"{self.kind} c{self.chunk} l{self.layer}"
        carried = "final" if self.what == "final" else f"{self.what} c{self.chunk} l{self.layer}"
        arrow = "->" if self.kind == "send" else "<-"
        return (
            f"{self.kind} {carried} {arrow} {self.peer}, {self.tokens} token{'' if self.tokens == 1 else 's'}"
        )


@lru_cache(maxsize=1024)  # a lane asks for those of its op several times
def _made_by(op: Op) -> tuple[Value, ...]:
    if op.kind == "layer":
        return (Value("kv", op.chunk, op.layer), Value("hidden", op.chunk, op.layer + 1))
    if op.kind == "embed":
        return (Value("hidden", op.chunk, 0),)
    if op.kind == "norm":
        return (FINAL,)
    return (op.value,) if op.kind == "recv" else ()


def new_needs(ops: Iterable[Op]) -> list[tuple[Value, ...]]:
    """What each op of a lane needs that no op before it on the lane has needed or made.

    A layer needs the blocks of all chunks before its own: looking for each of them, for each layer of each chunk, would
    take a time that grows with the square of the chunks.
    """
    found: list[tuple[Value, ...]] = []
    there: set[Value] = set()
    awaited: dict[int, int] = {}
    """by layer, of how many chunks from the first on the blocks are known to be there"""
    for op in ops:
        needs = [op.value] if op.kind == "send" else []
        if op.kind in ("layer", "norm"):
            needs = [Value("hidden", op.chunk, op.layer)]
        if op.kind == "layer":
            first = awaited.get(op.layer, 0)
            needs += [Value("kv", chunk, op.layer) for chunk in range(first, op.chunk)]
            awaited[op.layer] = max(first, op.chunk)
        found.append(tuple(need for need in needs if need not in there))
        there.update(found[-1], op.makes())
    return found


def send(value: Value, peer: int, tokens: int) -> Op:
    return Op("send", value.chunk, value.layer, value.what, peer, tokens)


def recv(value: Value, peer: int, tokens: int) -> Op:
    return Op("recv", value.chunk, value.layer, value.what, peer, tokens)


DIGITS = 12
"""most digits of a number in a plan"""

_N = rf"([0-9]{{1,{DIGITS}}})"
_COMPUTE = re.compile(rf"(embed) c{_N}|(layer|norm) c{_N} l{_N}")
_TRANSFER = re.compile(rf"(send|recv) (?:(final)|(hidden|kv) c{_N} l{_N}) (->|<-) {_N}, {_N} tokens?")
_EXAMPLES = (
    "'embed c0', 'layer c0 l3', 'norm c7 l36', 'send kv c0 l3 -> 1, 128 tokens', 'recv final <- 2, 1 token'"
)


def parse_op(text: str) -> Op:
    """The inverse of `str(op)`. Raises PlanError for any other text."""
    line = " ".join(text.split())
    if match := _COMPUTE.fullmatch(line):
        if match[1]:
            return Op("embed", int(match[2]))
        return Op("layer" if match[3] == "layer" else "norm", int(match[4]), int(match[5]))
    if (match := _TRANSFER.fullmatch(line)) and (match[1] == "send") == (match[6] == "->"):
        what: ValueKind = "kv" if match[3] == "kv" else "hidden"
        value = FINAL if match[2] else Value(what, int(match[4]), int(match[5]))
        return (send if match[1] == "send" else recv)(value, int(match[7]), int(match[8]))
    raise PlanError(f"{excerpt(line)} is not an op. Examples of ops: {_EXAMPLES}.")
