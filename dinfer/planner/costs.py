"""What one layer costs on one rank, as a function of a chunk's position and length, fitted to measured times."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from math import fsum
from statistics import median
from typing import NamedTuple

from dinfer.plan.ops import PlanError


class LayerTime(NamedTuple):
    """A measured time of one layer: the chunk's first token, its number of tokens, and seconds."""

    position: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class LayerCost:
    """Seconds of one layer for x tokens after L others: `fixed` + `per_cached` · L + `per_token` · x + `per_pair` ·
    (2Lx + x²). The last term is attention: each token with all before it, counted twice."""

    fixed: float = 0.0
    per_cached: float = 0.0
    per_token: float = 0.0
    per_pair: float = 0.0

    def seconds(self, position: int, tokens: int) -> float:
        parts = zip(astuple(self), _terms(position, tokens), strict=True)
        return fsum(factor * term for factor, term in parts)

    def times(self, factor: float) -> "LayerCost":
        """The cost on a rank that takes `factor` times as long."""
        return LayerCost(*(part * factor for part in astuple(self)))


def _terms(position: int, tokens: int) -> tuple[float, float, float, float]:
    return 1.0, float(position), float(tokens), float(2 * position * tokens + tokens * tokens)


def fit(measured: Sequence[LayerTime]) -> LayerCost:
    """The cost that is closest to these times by least squares of relative errors, with no negative part.

    The times must be warm: of the first run of a shape, kernels and caches are cold, so whoever measures leaves it out.
    Raises PlanError without times, or for times that are not positive.
    """
    if not measured:
        raise PlanError("no layer times are given, so no cost can be fitted: measure at least one.")
    if wrong := [one for one in measured if one.seconds <= 0]:
        raise PlanError(f"a layer took {wrong[0].seconds} s by the measurement; times must be above 0.")
    rows = [[term / one.seconds for term in _terms(one.position, one.tokens)] for one in measured]
    scales = [max(abs(row[n]) for row in rows) or 1.0 for n in range(4)]
    scaled = [[value / scale for value, scale in zip(row, scales, strict=True)] for row in rows]
    factors = _not_negative(scaled)
    return LayerCost(*(factor / scale for factor, scale in zip(factors, scales, strict=True)))


def as_in_run(cost: LayerCost, measured: Sequence[LayerTime]) -> LayerCost:
    """The cost of a layer by itself, made one among the other ops of a run, by some times measured there: so many times
    as much (cores and caches are shared), and so much more for each op. The cost itself without such times."""
    known = [(cost.seconds(one.position, one.tokens), one.seconds) for one in measured]
    known = [(alone, there) for alone, there in known if alone > 0 and there > 0]
    if not known:
        return cost
    found = _least_squares([[alone / there, 1 / there] for alone, there in known])
    if found is None or min(found) < 0:  # of one length, or too noisy for two numbers
        found = [median(there / alone for alone, there in known), 0.0]
    scaled = cost.times(found[0])
    return replace(scaled, fixed=scaled.fixed + found[1])


def _not_negative(rows: Sequence[Sequence[float]]) -> list[float]:
    """The factors, none below 0, whose products with each row come closest to 1.

    By trying every set of columns: there are 15 (Lawson and Hanson's method is for more).
    """
    best, least = [0.0] * 4, float("inf")
    for chosen in range(1, 16):
        columns = [n for n in range(4) if chosen >> n & 1]
        found = _least_squares([[row[n] for n in columns] for row in rows])
        if found is None or min(found) < 0:
            continue
        factors = [0.0] * 4
        for n, factor in zip(columns, found, strict=True):
            factors[n] = factor
        off = fsum((fsum(f * v for f, v in zip(factors, row, strict=True)) - 1) ** 2 for row in rows)
        if off < least - 1e-12:
            best, least = factors, off
    return best


def _least_squares(rows: Sequence[Sequence[float]]) -> list[float] | None:
    """The factors whose products with each row come closest to 1, by the normal equations; None if there are many."""
    size = len(rows[0])
    table = [
        [fsum(row[a] * row[b] for row in rows) for b in range(size)] + [fsum(row[a] for row in rows)]
        for a in range(size)
    ]
    for n in range(size):
        pivot = max(range(n, size), key=lambda r: abs(table[r][n]))
        table[n], table[pivot] = table[pivot], table[n]
        if abs(table[n][n]) < 1e-10:
            return None
        for other in range(size):
            if other != n:
                factor = table[other][n] / table[n][n]
                table[other] = [a - factor * b for a, b in zip(table[other], table[n], strict=True)]
    return [table[n][size] / table[n][n] for n in range(size)]
