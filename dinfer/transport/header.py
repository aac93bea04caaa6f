"""Header: 64 bytes before each payload that say what follows, checked against the plan.

A message longer than its recv would abort the process, so a header is received and checked before its payload.
"""

import struct
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from dinfer.codec.choice import NONE, Codec, CodecError
from dinfer.plan.ops import Op, Value, ValueKind

HEADER_BYTES = 64

_LAYOUT = struct.Struct("<4s?BBBQiii4xQQQQ")
assert _LAYOUT.size == HEADER_BYTES

SIGNED = slice(40, 64)
"""the bytes of a header's signature, three 64-bit numbers: the digests of K and V, and `changed`. They may be written
on the payload's device"""

_MAGIC = b"dinf"
_WHATS: tuple[ValueKind, ...] = ("hidden", "kv", "final")
_DTYPES = ("float32", "bfloat16", "float16", "float64")


class TransferError(RuntimeError):
    """A message is not the one that the plan has at this place. `came`: its header, if it was one; `here`: the id of
    this rank's plan."""

    def __init__(self, message: str, came: "Header | None" = None, here: int = 0) -> None:
        super().__init__(message)
        self.came, self.here = came, here


@dataclass(frozen=True)
class Header:
    """Announces `nbytes` bytes of `value`, `tokens` long, in `dtype` before `codec`, by plan `plan_id`. What a plan
    expects of a codec whose size depends on the values is the largest.

    `digests`: of K and V as they were computed, (0, 0) if digests are off. `changed`: the first rank that received
    other bytes, plus one; 0 if none did. A `void` header announces nothing: it releases a recv that was posted too
    early.
    """

    plan_id: int
    value: Value
    tokens: int
    dtype: str
    nbytes: int
    void: bool = False
    digests: tuple[int, int] = field(default=(0, 0), compare=False)
    changed: int = field(default=0, compare=False)
    codec: Codec = NONE

    def pack(self) -> bytes:
        """The header as HEADER_BYTES bytes."""
        what, chunk, layer = self.value
        kinds = not self.void, _WHATS.index(what), _DTYPES.index(self.dtype), self.codec.number
        sizes = chunk, layer, self.tokens, self.nbytes
        return _LAYOUT.pack(_MAGIC, *kinds, self.plan_id, *sizes, *self.digests, self.changed)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """The inverse of `pack`. Raises TransferError for bytes that are not a header."""
        magic, full, what, dtype, codec, plan_id, chunk, layer, tokens, nbytes, k, v, changed = (
            _LAYOUT.unpack(data)
        )
        if magic != _MAGIC or what >= len(_WHATS) or dtype >= len(_DTYPES):
            raise TransferError(
                f"{data[:16].hex()}… is not a header: the stream between two ranks is out of step."
            )
        value, sums = Value(_WHATS[what], chunk, layer), (k, v)
        try:
            way = Codec.numbered(codec)
        except CodecError as error:
            raise TransferError(f"the header of {value} is damaged: {error}") from None
        return cls(plan_id, value, tokens, _DTYPES[dtype], nbytes, not full, sums, changed, way)

    def __str__(self) -> str:
        plural = "" if self.tokens == 1 else "s"
        coded = "" if self.codec.is_none else f" by codec {self.codec}"
        return f"{self.value}, {self.tokens} token{plural}, {self.dtype}{coded}, {self.nbytes:,} bytes"


VOID_HEADER = Header(0, Value("final"), 0, "float32", 0, void=True).pack()
"""releases a recv that was posted too early"""


def signature_of(header: bytes) -> Tensor:
    """The signature in a packed header, int64 [3]."""
    return torch.frombuffer(bytearray(header[SIGNED]), dtype=torch.int64)


def signed(header: bytes, signature: Tensor) -> bytes:
    """The packed header with this signature, int64 [3]. Waits for the signature's device."""
    return header[: SIGNED.start] + signature.cpu().numpy().tobytes()


def check(came: Header, expected: Header, op: Op) -> None:
    """Raises TransferError if a header is not the expected one; the message names both."""
    here = expected.plan_id
    if came.plan_id != here:
        ids = f"id {came.plan_id:016x}, here {here:016x}"
        raise TransferError(
            f"rank {op.peer} runs another plan ({ids}): at `{op}` it sent {came}.", came, here
        )
    wanted = expected
    if not expected.codec.is_sized and came.nbytes <= expected.nbytes:
        wanted = replace(expected, nbytes=came.nbytes)
    if came != wanted:
        raise TransferError(f"at `{op}` the plan expects {expected}; rank {op.peer} sent {came}.", came, here)
