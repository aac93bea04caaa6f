"""Quantise: values as bytes for a heatmap with a diverging colour scale. Pure: numpy in, numpy out.

A byte is a value between −scale and +scale, in 250 steps around ZERO; values outside are clipped. Four bytes are
special: NaN, the two infinities, and missing values.
"""

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

NAN, ZERO, STEPS = 0, 126, 125

PLUS_INF, MINUS_INF, MISSING = 252, 253, 255

FAINTEST = 20
"""steps of the smallest difference, so that it is visible"""

Values = NDArray[np.floating]
"""[heads, tokens, dims]"""

Scale = Literal["robust", "full"] | float


class Quantised(NamedTuple):
    """`scale`: the value at the end of the colour scale; `special`: (head, token, dim) of the first NaN and Inf."""

    codes: NDArray[np.uint8]
    scale: float
    nan: int
    inf: int
    special: list[list[int]]


def quantise(values: Values, scale: Scale = "robust", *, difference: bool = False) -> Quantised:
    """Values as bytes. `difference`: every value but zero gets at least FAINTEST steps."""
    top = scale_of(values, scale)
    finite = np.isfinite(values)
    whole = bool(finite.all())
    with np.errstate(over="ignore"):  # values far outside the scale are clipped
        steps = np.clip(
            np.rint((values if whole else np.where(finite, values, 0)) / top * STEPS), -STEPS, STEPS
        )
    if difference:
        faint = (values != 0) & (np.abs(steps) < FAINTEST)
        steps[faint] = np.copysign(FAINTEST, values[faint])
    codes = (steps + ZERO).astype(np.uint8)
    if whole:
        return Quantised(codes, top, 0, 0, [])
    nan = np.isnan(values)
    codes[nan] = NAN
    codes[~finite & ~nan] = np.where(values[~finite & ~nan] > 0, PLUS_INF, MINUS_INF)
    count = int(nan.sum())
    return Quantised(codes, top, count, int((~finite).sum()) - count, np.argwhere(~finite)[:60].tolist())


def scale_of(values: Values, scale: Scale) -> float:
    """The value at the end of the colour scale: "robust" ignores the few largest, "full" none."""
    if isinstance(scale, int | float):
        return float(scale) if np.isfinite(scale) and scale > 0 else 1.0
    flat = values.reshape(-1)
    if scale == "robust":
        some = np.abs(flat[:: max(1, flat.size // 200_000)])
        some = some[np.isfinite(some)]
        top = float(np.percentile(some, 99.5)) if some.size else 0.0
        if top > 0:
            return top
    size = np.abs(flat)
    top = float(np.max(size, initial=0.0, where=np.isfinite(size)))
    return top or 1.0


def figures(values: Values) -> list[list[float]]:
    """By head: minimum, maximum, mean, and the shares of NaN or Inf and of zeros."""
    found = []
    for head in values:
        finite = head[np.isfinite(head)]
        some = (finite.min(), finite.max(), finite.mean(dtype=np.float64)) if finite.size else (np.nan,) * 3
        count = max(1, head.size)
        found.append([*map(float, some), (head.size - finite.size) / count, float((head == 0).sum() / count)])
    return found
