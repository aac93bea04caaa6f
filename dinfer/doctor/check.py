"""Check: what one look at this host has found, as every part of the doctor says it."""

import math
from dataclasses import dataclass
from typing import Literal

CheckState = Literal["ok", "warn", "fail", "unchecked"]


@dataclass(frozen=True)
class Check:
    """`found` says what is there, or why it could not be looked at; `fix` is the one thing to do about it."""

    name: str
    state: CheckState
    found: str
    fix: str = ""


def gib(size: float) -> str:
    """Bytes as text, such as 1.5 GiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def significant(value: float, digits: int = 2) -> str:
    """A positive number for reading: 0.0123 → 0.012, 1234.5 → 1,234."""
    decimals = max(0, digits - 1 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:,.{decimals}f}"


def rate(bytes_per_s: float) -> str:
    """Bytes a second as text, such as 1.4 GB/s."""
    for unit, size in (("GB/s", 1e9), ("MB/s", 1e6)):
        if bytes_per_s >= size:
            return f"{significant(bytes_per_s / size)} {unit}"
    return f"{significant(bytes_per_s / 1e3)} kB/s"
