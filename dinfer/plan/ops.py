"""Op: one action of one rank, what it needs and what it makes, and its text form.

Ops name values (a hidden state, a block, the final state); dependencies are that data flow and nothing else.
Nothing here knows how an op is carried out.
"""

import re
from typing import Literal, NamedTuple

from dinfer.errors import DinferError

OpKind = Literal["embed", "layer", "norm", "send", "recv"]

What = Literal["hidden", "kv", "final"]

Communicator = Literal["hidden", "kv"]


class PlanError(DinferError, ValueError):
    """A plan, or a piece of its text, that cannot be used; the message says what was given and is allowed."""


class Value(NamedTuple):
    """Something that a rank can hold.

    `hidden c l` is the hidden state of chunk c before layer l (l == layers: after the last one), `kv c l` is
    the block of layer l for chunk c, `final` is the normed hidden state of the prompt's last token.
    """

    what: What
    chunk: int = -1
    layer: int = -1

    def __str__(self) -> str:
        if self.what == "final":
            return "final"
        name = "block" if self.what == "kv" else "hidden"
        return f"{name} c{self.chunk} l{self.layer}"


FINAL = Value("final")


class Op(NamedTuple):
    """One action of one rank. `peer` and `tokens` are set for `send` and `recv` only."""

    kind: OpKind
    chunk: int
    layer: int = -1
    what: What = "hidden"
    peer: int = -1
    tokens: int = 0

    @property
    def is_transfer(self) -> bool:
        return self.kind in ("send", "recv")

    @property
    def communicator(self) -> Communicator:
        """The group that carries this transfer: blocks have one of their own, not to delay hidden states."""
        return "kv" if self.what == "kv" else "hidden"

    @property
    def value(self) -> Value:
        """The value that a transfer carries."""
        return FINAL if self.what == "final" else Value(self.what, self.chunk, self.layer)

    def needs(self) -> list[Value]:
        """Values that must be on this rank before the op may start."""
        if self.kind == "layer":
            earlier = [Value("kv", chunk, self.layer) for chunk in range(self.chunk)]
            return [Value("hidden", self.chunk, self.layer), *earlier]
        if self.kind == "norm":
            return [Value("hidden", self.chunk, self.layer)]
        return [self.value] if self.kind == "send" else []

    def makes(self) -> tuple[Value, ...]:
        """Values that are on this rank once the op has ended."""
        if self.kind == "layer":
            return (Value("kv", self.chunk, self.layer), Value("hidden", self.chunk, self.layer + 1))
        if self.kind == "embed":
            return (Value("hidden", self.chunk, 0),)
        if self.kind == "norm":
            return (FINAL,)
        return (self.value,) if self.kind == "recv" else ()

    def __str__(self) -> str:
        """The op's line in a plan, for example `send kv c0 l5 -> 2, 128 tokens`."""
        if self.kind == "embed":
            return f"embed c{self.chunk}"
        if not self.is_transfer:
            return f"{self.kind} c{self.chunk} l{self.layer}"
        carried = "final" if self.what == "final" else f"{self.what} c{self.chunk} l{self.layer}"
        arrow = "->" if self.kind == "send" else "<-"
        plural = "" if self.tokens == 1 else "s"
        return f"{self.kind} {carried} {arrow} {self.peer}, {self.tokens} token{plural}"


def embed(chunk: int) -> Op:
    return Op("embed", chunk)


def layer(chunk: int, index: int) -> Op:
    return Op("layer", chunk, index)


def norm(chunk: int, layers: int) -> Op:
    """The last op of compute: the model's final norm over the hidden state after all `layers`."""
    return Op("norm", chunk, layers)


def send(value: Value, peer: int, tokens: int) -> Op:
    return Op("send", value.chunk, value.layer, value.what, peer, tokens)


def recv(value: Value, peer: int, tokens: int) -> Op:
    return Op("recv", value.chunk, value.layer, value.what, peer, tokens)


_COMPUTE = re.compile(r"(embed) c(\d+)|(layer|norm) c(\d+) l(\d+)")

_TRANSFER = re.compile(r"(send|recv) (?:(final)|(hidden|kv) c(\d+) l(\d+)) (->|<-) (\d+), (\d+) tokens?")

_EXAMPLES = (
    "'embed c0', 'layer c0 l3', 'norm c7 l36', 'send kv c0 l3 -> 1, 128 tokens', 'recv final <- 2, 1 token'"
)


def parse_op(text: str) -> Op:
    """The op that `text` names; the inverse of `str(op)`. Raises PlanError."""
    line = " ".join(text.split())
    if match := _COMPUTE.fullmatch(line):
        if match[1]:
            return embed(int(match[2]))
        kind: OpKind = "layer" if match[3] == "layer" else "norm"
        return Op(kind, int(match[4]), int(match[5]))
    if (match := _TRANSFER.fullmatch(line)) and (match[1] == "send") == (match[6] == "->"):
        value = (
            FINAL if match[2] else Value("kv" if match[3] == "kv" else "hidden", int(match[4]), int(match[5]))
        )
        make = send if match[1] == "send" else recv
        return make(value, int(match[7]), int(match[8]))
    raise PlanError(f"{line!r} is not an op. An op reads like {_EXAMPLES}.")
