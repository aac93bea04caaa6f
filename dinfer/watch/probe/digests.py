"""Digests of rows: 64 bits each, the same on every device, sensitive to order.

Those of dinfer's own runs (`row_digests`): each 64-bit word of a row has a number added that depends on its place, and
is then mixed by the finaliser of splitmix64 (Steele, Lea and Flood 2014), which is a bijection; the digest is the sum
modulo 2^64. `dinfer.kv.digests` says what such digests can and cannot tell.

Those of a watched program, whose time is not ours (`together`, `token_digests`, `last_dim_digests`), take a quarter of
that on a CPU: each 32 bits of a row are multiplied by a fixed random number of 64 bits, and the digest is the sum
modulo 2^64 (Thorup, High speed hashing for integers and strings, 2015). Rows that differ agree with a probability of
2^-32 at the most, where their top bits alone differ, and of about 2^-64 where their lowest do. A CPU is fastest at
products of matrices of floating-point numbers: so each of the fixed numbers is taken as five digits of 13 bits, for
which sums of 1,024 products are exact in float64, and these five sums are put together.

On CUDA one kernel mixes a word, where torch's own operations would take up to thirteen: a prefill of small chunks is
bound by kernel launches.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from .captures import captures

log = logging.getLogger(__name__)

STEP = -7046029254386353131  # 2^64 / golden ratio, as a signed number: multiples of it do not repeat

# 0xBF58476D1CE4E5B9 and 0x94D049BB133111EB, signed
MULTIPLIERS = (-4658895280553007687, -7723592293110705685)

_KERNEL = """
template <typename T> T dinfer_mix(T word, T place) {
    unsigned long long mixed = static_cast<unsigned long long>(word) + static_cast<unsigned long long>(place);
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9ULL;
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EBULL;
    return static_cast<T>(mixed ^ (mixed >> 31));
}
"""


_WEIGHING = """
template <typename T> T dinfer_weigh(T word, T lower, T upper) {
    unsigned long long low = static_cast<unsigned long long>(static_cast<long long>(static_cast<int>(word)));
    unsigned long long high = static_cast<unsigned long long>(word >> 32);
    return static_cast<T>(low * static_cast<unsigned long long>(lower) + high * static_cast<unsigned long long>(upper));
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
        made = self._made  # another thread may find it there meanwhile
        if made is not None:
            stream: Any = torch.cuda.current_stream(self.tensor.device)
            if stream != self._made_on:
                stream.wait_event(made)
            captures.unless_capturing(self._ask)
        return self.tensor

    def _ask(self) -> None:
        made = self._made
        if made is not None and made.query():
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
    return torch.arange(1, count + 1, device=device, dtype=torch.int64) * STEP


@cache
def _mixer(kind: str) -> Callable[[Tensor, Tensor], Tensor]:
    return _fused(_KERNEL, 2, _mix) if kind == "cuda" else _mix


def _fused(kernel: str, inputs: int, plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A kernel for CUDA that does the same as `plain`; that one, where it cannot be had."""
    try:
        fused: Callable[..., Tensor] = torch.cuda.jiterator._create_jit_fn(kernel)
        fused(*[torch.ones(1, dtype=torch.int64, device="cuda")] * inputs)
    except (AttributeError, RuntimeError) as error:  # a beta feature of torch, which needs a compiler
        log.info("digests are computed by torch's own operations, which take longer: %s", error)
        return plain
    return fused


def _mix(words: Tensor, places: Tensor) -> Tensor:
    mixed = words + places
    # one for all rounds: new memory for each would cost a fifth of the time
    shifted = torch.empty_like(mixed)
    for shift, multiplier in zip((30, 27), MULTIPLIERS, strict=True):
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


DIGITS, DIGIT_BITS = 5, 13
SMALL = 32768
"""Tensors of fewer numbers are in the cache anyway: rather one pass more over them than calls of torch."""

EXACT = 1024
"""So many products of 32 bits and a digit add up to no more than 2^53, below which float64 is exact."""


def together(values: Sequence[Tensor], dims: int = 1) -> Tensor:
    """The digests of rows of several tensors that are alike: int64 [..., tensors], of what the last `dims` dimensions
    hold. Nothing is read back from a device."""
    if values[0].device.type != "cpu" or values[0].numel() < SMALL:  # the fewer calls, the better
        return digests_of(torch.stack(tuple(values), -dims - 1), dims)
    parts = [_integers(value) for value in values]  # one pass over the tensors as they lie
    words, at = parts[0], parts[0].dim() - dims
    shape = (*words.shape[:at], len(parts), *words.shape[at:])
    rows = torch.empty(shape, dtype=torch.float64, device="cpu")  # whatever device the program has by default
    for number, part in enumerate(parts):
        rows.select(at, number).copy_(part)
    return _exact_sums(rows, dims)


def digests_of(rows: Tensor, dims: int) -> Tensor:
    """The digests of what the last `dims` dimensions of a contiguous tensor hold: int64 [...]."""
    if rows.device.type != "cpu":
        return digests_by_integers(rows, dims)
    return _exact_sums(_integers(rows).to(torch.float64), dims)


def digests_by_integers(rows: Tensor, dims: int) -> Tensor:
    """The same by integers, as on other devices than CPUs."""
    return _weighted_sums(_integers(rows).flatten(-dims))


def _exact_sums(rows: Tensor, dims: int) -> Tensor:
    """The same of integers as float64."""
    shape = rows.shape[:-dims]
    count = prod(rows.shape[-dims:])
    rows, digits = rows.view(-1, count), _digits(count)
    if count <= EXACT:
        sums = (rows @ digits).to(torch.int64)
    else:
        pieces = zip(rows.split(EXACT, 1), digits.split(EXACT), strict=True)  # type: ignore[no-untyped-call]
        sums = torch.stack([piece @ part for piece, part in pieces]).to(torch.int64).sum(0)
    return torch.mv(sums, _shifts()).view(shape)


def _weighted_sums(rows: Tensor) -> Tensor:
    """The same of rows of integers, by integers."""
    count, kind = rows.shape[-1], rows.device.type
    weights = _constant(_make_weights, count, rows.device)
    if rows.dtype != torch.int32 or count % 2:
        return (rows.to(torch.int64) * weights).sum(-1)
    lower, upper = weights.view(-1, 2).unbind(-1)
    return _weigher(kind)(rows.view(torch.int64), lower, upper).sum(-1)


def _integers(values: Tensor) -> Tensor:
    """Values of any dtype as integers of 32 bits or, where the last dimension is no multiple of that, of 16 or 8."""
    if values.element_size() == 4 and not values.dtype.is_complex:
        return values.view(torch.int32)
    width = values.shape[-1] * values.element_size()
    dtype = next(dtype for size, dtype in INTEGERS.items() if size <= 4 and width % size == 0)
    try:
        return values.view(dtype)
    except RuntimeError:  # it lies so that no words can be seen in it
        return values.contiguous().view(dtype)


@cache
def _weigher(kind: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return _fused(_WEIGHING, 3, _weigh) if kind == "cuda" else _weigh


def _weigh(words: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    high = words >> 32
    low = words - (high << 32)
    low -= (low >> 31) << 32  # as signed
    return low.mul_(lower).add_(high.mul_(upper))


@cache
def _digits(count: int) -> Tensor:
    return _make_digits(count, torch.device("cpu")).to(torch.float64)


def _make_digits(count: int, device: torch.device) -> Tensor:
    """Of the fixed numbers the digits, from the lowest on, each between -4,096 and 4,095: int64 [count, DIGITS]."""
    places = _make_places(count, device)
    bits = _mix(torch.zeros_like(places), places) | 1  # odd numbers, so that each bit of a word counts
    size = 1 << DIGIT_BITS
    digits = [((bits >> DIGIT_BITS * place) & (size - 1)) - size // 2 for place in range(DIGITS - 1)]
    return torch.stack([*digits, bits >> DIGIT_BITS * (DIGITS - 1)], -1)


@cache
def _shifts() -> Tensor:
    return torch.tensor([1 << DIGIT_BITS * place for place in range(DIGITS)], device="cpu")


def _make_weights(count: int, device: torch.device) -> Tensor:
    """The fixed numbers: int64 [count]."""
    places = torch.arange(DIGITS, device=device) * DIGIT_BITS
    return (_make_digits(count, device) << places).sum(-1)


def _words(rows: Tensor) -> Tensor:
    """Rows of any dtype as rows of integers."""
    width = rows.shape[-1] * rows.element_size()
    dtype = next(dtype for size, dtype in INTEGERS.items() if width % size == 0)
    return rows.contiguous().view(dtype).to(torch.int64)


def token_digests(values: Tensor) -> Tensor:
    """The digest of each token's values in all heads: of [..., heads, tokens, width] int64 [..., tokens]."""
    return together([values.detach().transpose(-3, -2)], 2)[..., 0]


def last_dim_digests(values: Tensor) -> Tensor:
    """The digest of each row of [..., width]: int64 [...]."""
    return together([values.detach()])[..., 0]


SKETCH = 16
"""numbers of a sketch"""


def row_sketches(values: Tensor) -> Tensor:
    """A sketch of each row of [..., width]: float32 [..., SKETCH], its products with fixed vectors of signs.

    The root mean square of a sketch is about the row's length, and that of the difference of two sketches about the
    length of the rows' difference (Achlioptas, Database-friendly random projections, 2003): to a quarter, mostly.
    """
    rows = values.detach().to(torch.float32)
    with torch.autocast(rows.device.type, enabled=False):  # which would make them shorter numbers
        return rows @ _constant(_make_signs, rows.shape[-1], rows.device)


def _make_signs(width: int, device: torch.device) -> Tensor:
    """[width, SKETCH] of 1 and -1, the same on every device."""
    places = _make_places(width * SKETCH, device)
    bits = _mix(torch.zeros_like(places), places) & 1
    return (2 * bits - 1).view(width, SKETCH).to(torch.float32)


def token_sketches(values: Tensor) -> Tensor:
    """A sketch of each token's values in all heads: of [..., heads, tokens, width] float32 [..., tokens, SKETCH]."""
    return row_sketches(values.transpose(-3, -2).flatten(-2))
