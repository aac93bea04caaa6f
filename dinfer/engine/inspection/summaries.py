"""Summaries: a block's K and V in a few numbers a head, computed where the block lies."""

from typing import Any

import torch
from torch import Tensor

FIELDS = ("min", "max", "mean", "absmax", "nan", "inf", "zeros")
"""of K and of V, by head; `zeros`: their share. NaN and Inf are left out of the other figures."""


def per_head(block: Tensor) -> dict[str, list[list[float]]]:
    """Of a block [tokens, 2, kv_heads, head_dim]: each field as [2, kv_heads]; all NaN where there is no number."""
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
