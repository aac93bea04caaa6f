"""The lossless codec of bfloat16: sign and fraction as they are, exponents by a small codebook, escapes for the rest.

The exponents of KV are few: some seven of 256 make up nearly all. Each of these has a code of 2 to 4 bits, by what
is smallest for these values; one code means that the exponent follows at the end, as a byte. Values are numpy arrays of
bytes on the host.
"""

from itertools import pairwise
from math import inf

import numpy as np
from numpy.typing import NDArray

from dinfer.codec.choice import CodecError

ByteArray = NDArray[np.uint8]

WIDTHS = (2, 3, 4)
"""bits of a code"""

PLAIN = 0
"""instead of a width: the values follow as they are"""


def encode(values: ByteArray) -> ByteArray:
    """The bytes of bfloat16 values (little-endian, two a value), encoded: at most one byte more."""
    words = values.view(np.uint16)
    exponents = (words >> 7).astype(np.uint8)
    counts = np.bincount(exponents, minlength=256)
    order = np.argsort(-counts, kind="stable")
    width, size = PLAIN, float(len(values) + 1)
    for bits in WIDTHS:
        escapes = len(words) - int(counts[order[: _known(bits)]].sum())
        wanted = 1 + _known(bits) + len(words) + bits * _plane_bytes(len(words)) + escapes
        if wanted < size:
            width, size = bits, wanted
    if width == PLAIN:
        return np.concatenate([np.array([PLAIN], np.uint8), values])
    book = order[: _known(width)].astype(np.uint8)
    code_of = np.full(256, len(book), np.uint8)
    code_of[book] = np.arange(len(book), dtype=np.uint8)
    codes = np.take(code_of, exponents)
    planes = [np.packbits(codes >> bit & 1) for bit in range(width)]
    rest = (words >> 8 & 0x80 | words & 0x7F).astype(np.uint8)
    escaped = exponents[codes == len(book)]
    return np.concatenate([np.array([width], np.uint8), book, rest, *planes, escaped])


def decode(data: ByteArray, count: int) -> ByteArray:
    """The inverse of `encode` for so many values. Raises CodecError for bytes that it has not written."""
    width = int(data[0]) if len(data) else inf
    if width == PLAIN:
        if len(data) != 1 + 2 * count:
            raise CodecError(f"{len(data) - 1} bytes are not {count} values of bfloat16.")
        return data[1:]
    if width not in WIDTHS:
        raise CodecError(f"a code of {width} bits is none of the lossless codec's.")
    known, plane = _known(int(width)), _plane_bytes(count)
    ends = np.cumsum([1, known, count, *[plane] * int(width)])
    if len(data) < ends[-1]:
        raise CodecError(f"{len(data)} bytes are too few for {count} values in codes of {width} bits.")
    book, rest, *planes = (data[a:b] for a, b in pairwise(ends))
    codes = np.zeros(count, np.uint8)
    for bit, packed in enumerate(planes):
        codes |= np.unpackbits(packed, count=count) << bit
    escaped = codes == known
    found = data[ends[-1] :]
    if int(escaped.sum()) != len(found):
        raise CodecError(f"{len(found)} exponents follow where {int(escaped.sum())} are missing.")
    exponents = np.take(np.append(book, np.uint8(0)), codes)
    exponents[escaped] = found
    words = (rest & 0x80).astype(np.uint16) << 8 | exponents.astype(np.uint16) << 7 | rest & 0x7F
    return words.view(np.uint8)


def _known(width: int) -> int:
    """How many exponents have a code of their own."""
    return (1 << width) - 1


def _plane_bytes(count: int) -> int:
    """ByteArray of one bit of each code."""
    return -(-count // 8)
