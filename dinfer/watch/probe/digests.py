"""Digests of rows: 64 bits each, the same on every device, sensitive to order.

Each 64-bit word of a row has a number added that depends on its place, and is then mixed by the finaliser of splitmix64
(Steele, Lea and Flood 2014), which is a bijection; the digest is the sum modulo 2^64. On CUDA one kernel mixes a word,
where torch's own operations would take thirteen: a prefill of small chunks is bound by kernel launches.

`dinfer.kv.digests` says what such digests can and cannot tell, and what they are used for beside the probe.
"""

import logging
from collections.abc import Callable
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from .captures import captures

log = logging.getLogger(__name__)

_STEP = -7046029254386353131  # 2^64 / golden ratio, as a signed number: multiples of it do not repeat

# 0xBF58476D1CE4E5B9 and 0x94D049BB133111EB, signed
_MULTIPLIERS = (-4658895280553007687, -7723592293110705685)

_KERNEL = """
template <typename T> T dinfer_mix(T word, T place) {
    unsigned long long mixed = static_cast<unsigned long long>(word) + static_cast<unsigned long long>(place);
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9ULL;
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EBULL;
    return static_cast<T>(mixed ^ (mixed >> 31));
}
"""


def mixed_sum(words: Tensor, *, first: int = -1) -> Tensor:
    """Mix int64 words with their places along the last dimension, and along `first` if it is another one, and sum over
    these dimensions."""
    dims = sorted({first % words.dim(), words.dim() - 1})
    sizes = [size if dim in dims else 1 for dim, size in enumerate(words.shape)]
    count = prod(sizes)
    places = _constant(_make_places, 1 << (count - 1).bit_length(), words.device)[:count].view(sizes)
    return _mixer(words.device.type)(words, places).sum(dims)


class _Constant:
    """A tensor that is made once on its device. The host never waits for it: another stream than that on which it was
    made does, until it is known to be there."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._made_on: Any = None
        self._made: Any = None
        if tensor.device.type == "cuda":
            self._made_on = torch.cuda.current_stream(tensor.device)
            self._made = self._made_on.record_event()

    def ready(self) -> Tensor:
        """It, for use on the current stream."""
        if self._made is not None:
            stream: Any = torch.cuda.current_stream(self.tensor.device)
            if stream != self._made_on:
                stream.wait_event(self._made)
            captures.unless_capturing(self._ask)
        return self.tensor

    def _ask(self) -> None:
        if self._made is not None and self._made.query():
            self._made = None


_constants: dict[tuple[object, ...], _Constant] = {}


def _constant(make: Callable[[int, torch.device], Tensor], size: int, device: torch.device) -> Tensor:
    """What `make` makes, made once and kept; while a CUDA graph is captured, made for that graph alone, to which a
    stream outside of it may not lead."""
    key = (make, size, device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return make(size, device)
    if key not in _constants:
        _constants[key] = _Constant(make(size, device))
    return _constants[key].ready()


def _make_places(count: int, device: torch.device) -> Tensor:
    """The numbers that are added, by place."""
    return torch.arange(1, count + 1, device=device, dtype=torch.int64) * _STEP


@cache
def _mixer(kind: str) -> Callable[[Tensor, Tensor], Tensor]:
    if kind != "cuda":
        return _mix
    try:
        fused: Callable[[Tensor, Tensor], Tensor] = torch.cuda.jiterator._create_jit_fn(_KERNEL)
        one = torch.ones(1, dtype=torch.int64, device=kind)
        fused(one, one)
    except (AttributeError, RuntimeError) as error:  # a beta feature of torch, which needs a compiler
        log.info("digests are computed by torch's own operations, which take longer: %s", error)
        return _mix
    return fused


def _mix(words: Tensor, places: Tensor) -> Tensor:
    mixed = words + places
    # one for all rounds: new memory for each would cost a fifth of the time
    shifted = torch.empty_like(mixed)
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        mixed ^= _shift(mixed, shift, shifted)
        mixed *= multiplier
    mixed ^= _shift(mixed, 31, shifted)
    return mixed


def _shift(words: Tensor, bits: int, out: Tensor) -> Tensor:
    """Shift right and fill with zeros; torch's own shift of signed numbers copies the sign."""
    return torch.bitwise_right_shift(words, bits, out=out).bitwise_and_((1 << (64 - bits)) - 1)


INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
"""by their size in bytes, the largest first"""


def row_digests(block: Tensor) -> Tensor:
    """The digest of each row of a block [tokens, 2, kv_heads, head_dim]: int64 [tokens, 2, kv_heads].

    A row is read as words of 8 bytes or, if its length is no multiple of that, of 4, 2 or 1.
    """
    return mixed_sum(_words(block))


def _words(rows: Tensor) -> Tensor:
    """Rows of any dtype as rows of integers."""
    width = rows.shape[-1] * rows.element_size()
    dtype = next(dtype for size, dtype in INTEGERS.items() if width % size == 0)
    return rows.contiguous().view(dtype).to(torch.int64)


def token_digests(values: Tensor) -> Tensor:
    """The digest of each token's values in all heads: of [..., heads, tokens, width] int64 [..., tokens]."""
    rows = values.detach().transpose(-3, -2).flatten(-2)
    return mixed_sum(_words(rows))


def last_dim_digests(values: Tensor) -> Tensor:
    """The digest of each row of [..., width]: int64 [...]."""
    return mixed_sum(_words(values.detach()))


SKETCH = 16
"""numbers of a sketch"""


def row_sketches(values: Tensor) -> Tensor:
    """A sketch of each row of [..., width]: float32 [..., SKETCH], its products with fixed vectors of signs.

    The root mean square of a sketch is about the row's length, and that of the difference of two sketches about the
    length of the rows' difference (Achlioptas, Database-friendly random projections, 2003): to a quarter, mostly.
    """
    rows = values.detach().to(torch.float32)
    return rows @ _constant(_make_signs, rows.shape[-1], rows.device)


def _make_signs(width: int, device: torch.device) -> Tensor:
    """[width, SKETCH] of 1 and -1, the same on every device."""
    places = _make_places(width * SKETCH, device)
    bits = _mix(torch.zeros_like(places), places) & 1
    return (2 * bits - 1).view(width, SKETCH).to(torch.float32)


def token_sketches(values: Tensor) -> Tensor:
    """A sketch of each token's values in all heads: of [..., heads, tokens, width] float32 [..., tokens, SKETCH]."""
    return row_sketches(values.transpose(-3, -2).flatten(-2))
