"""Measure: how one tensor differs from another of the same shape, and each head of a block, in a few figures.

They are computed on the tensors' device. Whether a difference is a fault or rounding is judged elsewhere.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dinfer.kv.digests import INTEGERS


class Spot(NamedTuple):
    """One value in two tensors: its index, and what it is in each."""

    at: tuple[int, ...]
    mine: float
    theirs: float


class CellDifference(NamedTuple):
    """How two tensors, mine and theirs, differ. `absolute`: the largest difference, infinite if one of the two values
    is NaN; `relative`: the largest relative to the larger of the two values; `scale`: the largest absolute value of
    theirs; `largest`: where `absolute` is; `changed`: how many values differ, in any bit if both have the same dtype;
    `first`: the first of these; `nans`: the number of NaN in mine and in theirs."""

    absolute: float
    relative: float
    scale: float
    largest: Spot
    changed: int
    first: Spot | None
    nans: tuple[int, int]

    def with_(self, later: "CellDifference") -> "CellDifference":
        """The difference of both together; `later` is of the rows that follow."""
        larger = self if self.absolute >= later.absolute else later
        return CellDifference(
            larger.absolute, max(self.relative, later.relative), max(self.scale, later.scale), larger.largest,
            self.changed + later.changed, self.first or later.first,
            (self.nans[0] + later.nans[0], self.nans[1] + later.nans[1]),
        )  # fmt: skip


def measure(mine: Tensor, theirs: Tensor, row: int = 0) -> CellDifference:
    """Compare two tensors of one shape. The first index of a Spot counts from `row`."""
    differs = changed(mine, theirs)
    count = int(differs.sum())
    one, other = mine.double(), theirs.double()
    numbers = other.abs().nan_to_num(nan=0.0, posinf=0.0)
    scale, nans = float(numbers.max()), (int(one.isnan().sum()), int(other.isnan().sum()))
    if not count:
        return CellDifference(0.0, 0.0, scale, _at(one, other, 0, row), 0, None, nans)
    apart = torch.where(differs, (one - other).abs(), 0.0).nan_to_num(nan=torch.inf)
    size = torch.maximum(one.abs(), other.abs())
    relative = torch.where(apart > 0, apart / size, 0.0).nan_to_num(nan=torch.inf)
    largest = _at(one, other, int(apart.argmax()), row)
    first = _at(one, other, int(differs.int().argmax()), row)
    return CellDifference(float(apart.max()), float(relative.max()), scale, largest, count, first, nans)


def changed(mine: Tensor, theirs: Tensor) -> Tensor:
    """Which values differ; in their bits, if both have the same dtype: NaN may equal NaN, and 0 differs from -0."""
    if mine.dtype != theirs.dtype:
        return mine.double() != theirs.double()
    bits = INTEGERS[mine.element_size()]
    return mine.contiguous().view(bits) != theirs.contiguous().view(bits)


def _at(mine: Tensor, theirs: Tensor, flat: int, row: int) -> Spot:
    index = [int(i) for i in torch.unravel_index(torch.tensor(flat), mine.shape)]
    values = float(mine[tuple(index)]), float(theirs[tuple(index)])
    return Spot((index[0] + row, *index[1:]), *values)


FIELDS = ("min", "max", "mean", "absmax", "nan", "inf", "zeros")
"""of K and of V, by head; `nan` and `inf` are counts, `zeros` is a share. The other figures leave NaN and Inf out."""


def per_head(block: Tensor) -> dict[str, list[list[float]]]:
    """Each field of a block [tokens, 2, kv_heads, head_dim] as [2, kv_heads]; NaN where a head has no finite value."""
    values = block.detach().permute(1, 2, 0, 3).flatten(2).float()
    finite = torch.isfinite(values)
    counts = finite.sum(-1)
    figures: dict[str, Any] = {
        "min": torch.where(finite, values, torch.inf).amin(-1) if values.shape[-1] else counts * torch.nan,
        "max": torch.where(finite, values, -torch.inf).amax(-1) if values.shape[-1] else counts * torch.nan,
        "mean": torch.where(finite, values, 0.0).double().sum(-1) / counts,
        "nan": values.isnan().sum(-1),
        "inf": values.isinf().sum(-1),
        "zeros": (values == 0).sum(-1) / max(1, values.shape[-1]),
    }
    figures["absmax"] = torch.maximum(figures["max"], -figures["min"])
    for name in ("min", "max", "mean", "absmax"):
        figures[name] = torch.where(counts > 0, figures[name], torch.nan)
    return {name: figures[name].tolist() for name in FIELDS}
