"""Which codec K and V take on the wire, and how many bytes they then have. Imports no torch."""

from collections.abc import Mapping
from typing import NamedTuple, Self

from dinfer.errors import DinferError, excerpt

ABOUT: Mapping[str, str] = {
    "none": "as computed",
    "lossless": "bfloat16 with its exponents by a codebook; the same bits arrive",
    "bf16": "float32 rounded to bfloat16",
    "fp8": "8-bit floats (e4m3) with a scale for each token and head",
    "int8": "8-bit whole numbers with a scale for each token and head",
    "int4": "4-bit whole numbers with a scale for each 32 values of a token and head",
}
"""all codecs, and what each does"""

STEPS: Mapping[str, float] = {"bf16": 2.0**-8, "fp8": 2.0**-3, "int8": 1 / 127, "int4": 1 / 7}
"""the lossy codecs; how far apart two of their numbers are at most, as a share of the largest of a row"""

LOSSY = tuple(STEPS)

DTYPES: Mapping[str, str] = {"lossless": "bfloat16", "bf16": "float32"}
"""codecs of one dtype only"""

TYPICAL_LOSSLESS = 1.35
"""how many times smaller KV of language models becomes without loss, where nothing was measured; 1.3 is published"""

GROUP = 32
"""values of int4 that share a scale"""

SCALE_BYTES = 2
"""of a scale, bfloat16"""

LENGTH_BYTES = 4
"""before K and V: how many bytes are K's"""

ITEM_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


class CodecError(DinferError, ValueError):
    """A codec that there is not, or that does not fit the dtype; or bytes that no codec has written."""


class BlockSize(NamedTuple):
    """The size of a block: tokens, heads of K (V has as many), values of each, and their dtype, such as "bfloat16"."""

    tokens: int
    kv_heads: int
    head_dim: int
    dtype: str

    @property
    def values(self) -> int:
        """Of K; V has as many."""
        return self.tokens * self.kv_heads * self.head_dim

    @property
    def nbytes(self) -> int:
        """As computed, K and V."""
        return 2 * self.values * ITEM_BYTES[self.dtype]


class Codec(NamedTuple):
    """The codec of K and that of V, each one of ABOUT."""

    k: str = "none"
    v: str = "none"

    @classmethod
    def of(cls, text: str) -> Self:
        """Reads `int8`, or `k=int8,v=fp8`, of which one may be left out: it is sent as computed. Raises CodecError."""
        if text in ABOUT:
            return cls(text, text)
        parts = dict(part.split("=", 1) for part in text.replace(" ", "").split(",") if "=" in part)
        count = len([part for part in text.split(",") if part.strip()])
        if (
            not parts
            or len(parts) != count
            or not set(parts) <= {"k", "v"}
            or not set(parts.values()) <= set(ABOUT)
        ):
            raise CodecError(
                f"codec is {excerpt(text)}; it must be one of {', '.join(ABOUT)}, or one for each of K and V, such as "
                "k=int8,v=fp8."
            )
        return cls(**parts)

    def __str__(self) -> str:
        return self.k if self.k == self.v else f"k={self.k},v={self.v}"

    @property
    def is_none(self) -> bool:
        return self == NONE

    @property
    def is_lossy(self) -> bool:
        """Whether other values may arrive than were computed."""
        return self.k in LOSSY or self.v in LOSSY

    @property
    def is_sized(self) -> bool:
        """Whether the number of bytes follows from the block's size alone."""
        return "lossless" not in self

    @property
    def step(self) -> float:
        """How far apart two numbers of it are at most, as a share of the largest value of a row; 0 without loss."""
        return max(STEPS.get(self.k, 0.0), STEPS.get(self.v, 0.0))

    @property
    def number(self) -> int:
        """One byte, for a header."""
        names = list(ABOUT)
        return names.index(self.k) << 4 | names.index(self.v)

    @classmethod
    def numbered(cls, number: int) -> Self:
        """The inverse of `number`. Raises CodecError."""
        names = list(ABOUT)
        if max(number >> 4, number & 15) >= len(names):
            raise CodecError(f"{number} is the number of no codec.")
        return cls(names[number >> 4], names[number & 15])

    def check(self, dtype: str) -> None:
        """Raises CodecError unless it is for KV of that dtype, such as "float32"."""
        for name in self:
            if DTYPES.get(name, dtype) != dtype:
                others = ", ".join(one for one in ABOUT if DTYPES.get(one, dtype) == dtype)
                raise CodecError(
                    f"codec {name} is for KV in {DTYPES[name]}, and this is in {dtype}: take one of {others}."
                )

    def largest(self, size: BlockSize) -> int:
        """The most bytes that an encoded block has; the very number if `is_sized`."""
        if self.is_none:
            return size.nbytes
        return LENGTH_BYTES + part_bytes(self.k, size) + part_bytes(self.v, size)

    def typical(self, size: BlockSize) -> float:
        """How many bytes to expect."""
        if self.is_sized:
            return self.largest(size)
        parts = (
            size.nbytes / 2 / TYPICAL_LOSSLESS if name == "lossless" else part_bytes(name, size)
            for name in self
        )
        return LENGTH_BYTES + sum(parts)


NONE = Codec()


def part_bytes(name: str, size: BlockSize) -> int:
    """The most bytes of K, or of V, by one of the codecs."""
    rows, values = size.tokens * size.kv_heads, size.values
    match name:
        case "bf16":
            return 2 * values
        case "fp8" | "int8":
            return values + SCALE_BYTES * rows
        case "int4":
            return (values + 1) // 2 + SCALE_BYTES * rows * -(-size.head_dim // GROUP)
        case "lossless":  # where a codebook does not help, the bits follow as they are
            return values * ITEM_BYTES[size.dtype] + 1
        case _:
            return values * ITEM_BYTES[size.dtype]
