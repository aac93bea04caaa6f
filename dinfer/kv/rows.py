"""Rows: which rows a rank holds in place of the right ones, told from digests alone. Pure.

Equal rows have equal digests wherever they lie, so rows that were moved, repeated or exchanged can be found again; what
is left over has other values. A place is a row's index in a layer's cache; digests are int64 [places, 2, heads], the
second index K and V, those of a whole row the digests of all its heads.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Literal, NamedTuple

import torch
from torch import Tensor

KV = ("K", "V")


def span_text(start: int, stop: int) -> str:
    """Places as people write them: row 5, rows 26–51."""
    return f"row {start}" if stop - start == 1 else f"rows {start}–{stop - 1}"


def numbers_text(places: Sequence[int]) -> str:
    """Runs of numbers: 3, 5–9."""
    runs = []
    for _, group in groupby(enumerate(sorted(places)), key=lambda one: one[1] - one[0]):
        run = [place for _, place in group]
        runs.append(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}")
    return ", ".join(runs[:4]) + (f" and {len(runs) - 4} runs more" if len(runs) > 4 else "")


def places_text(places: Sequence[int]) -> str:
    return f"row{'s' * (len(places) != 1)} {numbers_text(places)}"


def rows_text(places: Sequence[int], start: int) -> str:
    return places_text([start + place for place in places])


def tokens_text(cells: Tensor, start: int) -> str:
    return rows_text(concerned(cells), start)


def tensors_text(cells: Tensor) -> str:
    return " and ".join(KV[n] for n in (0, 1) if cells[:, n].any())


def what_text(cells: Tensor) -> str:
    """K and V, or K alone, and which heads of it, where not all."""
    heads = cells.any(0).any(0).nonzero().flatten().tolist()
    some = "" if len(heads) == cells.shape[2] else f", head{'s' * (len(heads) > 1)} {numbers_text(heads)}"
    return f"{tensors_text(cells)}{some}"


def concerned(cells: Tensor) -> list[int]:
    found: list[int] = cells.flatten(1).any(1).nonzero().flatten().tolist()
    return found


def are(places: Sequence[int]) -> str:
    return "is" if len(places) == 1 else "are"


def keys_of(rows: Tensor) -> list[bytes]:
    """Each row's digests as one key; the places of `rows` come first."""
    return [row.tobytes() for row in rows.flatten(1).contiguous().numpy()] if len(rows) else []


def places_of(keys: Sequence[bytes]) -> dict[bytes, int]:
    """The first place of each row."""
    found = dict[bytes, int]()
    for place, key in enumerate(keys):
        found.setdefault(key, place)
    return found


RowKind = Literal[
    "value", "missing", "repeated", "shifted", "stale", "permuted", "swapped", "heads", "empty", "extra"
]


class Finding(NamedTuple):
    """What has become of some rows: `cells` [places, 2, heads] are those concerned, of the tensors that were given;
    `source`: the first place of the rows that they repeat, where they do."""

    kind: RowKind
    text: str
    cells: Tensor
    source: int | None = None


class RowFinding(NamedTuple):
    """`left`: cells that differ and are no other row's: other values."""

    findings: list[Finding]
    left: Tensor


def identify(
    got: Tensor,
    want: Tensor,
    start: int,
    before: Callable[[], tuple[int, Tensor]],
    zero: int,
    known: Tensor | None = None,
) -> RowFinding:
    """What the rows `got` are, in the places from `start` on where `want` should be; both are of one length.

    `before()`: the first place and the right rows of the block before; `zero`: the digest of a row of zeros; `known`:
    cells that need no explanation any more.
    """
    looks: list[Callable[[Tensor], list[Finding]]] = [
        lambda left: _empty(got, left, zero, start),
        lambda left: _moved(got, want, left, start, before),
        lambda left: _swapped(got, want, left, start),
        lambda left: _heads(got, want, left, start),
    ]
    found, left = list[Finding](), (got != want) & (True if known is None else ~known)
    for look in looks:
        for finding in look(left) if left.any() else []:
            found.append(finding)
            left = left & ~finding.cells
    return RowFinding(found, left)


def _empty(got: Tensor, left: Tensor, zero: int, start: int) -> list[Finding]:
    cells = left & (got == zero)
    if not cells.any():
        return []
    text = f"{what_text(cells)} of {tokens_text(cells, start)} {are(concerned(cells))} all zeros"
    return [Finding("empty", text, cells)]


def _moved(
    got: Tensor, want: Tensor, left: Tensor, start: int, before: Callable[[], tuple[int, Tensor]]
) -> list[Finding]:
    """Tokens that hold other tokens' rows: of all heads that differ at once, else of K and V or each head alone."""
    found = list[Finding]()
    one_value = int(left.sum()) == 1 < got.shape[2]  # no row of all heads: not worth the block before
    at, earlier = (start, got[:0]) if one_value else before()
    for columns in _groups(left):
        left = left & ~torch.stack([one.cells for one in found]).any(0) if found else left
        if not (left & columns).any():
            continue
        rows, right, past = (keys_of(part[:, columns]) for part in (got, want, earlier))
        places = concerned(left & columns)
        finding = _move(rows, right, past, places, start, at)
        if finding:
            kind, text, moved = finding
            cells = torch.zeros(got.shape, dtype=torch.bool)
            cells[moved] = columns
            cells &= left
            part = "" if bool(columns.all()) else f"{what_text(cells)}: "
            found.append(Finding(kind, part + text, cells))
    return found


def _groups(left: Tensor) -> list[Tensor]:
    """The columns [2, heads] that differ: all, those of K, those of V, each one."""
    all_of_it = left.any(0)
    singles = []
    for tensor, head in all_of_it.nonzero().tolist():
        one = torch.zeros_like(all_of_it)
        one[tensor, head] = True
        singles.append(one)
    halves = []
    for tensor in (0, 1):
        half = torch.zeros_like(all_of_it)
        half[tensor] = all_of_it[tensor]
        halves.append(half)
    return [all_of_it, *halves, *singles]


def _move(
    rows: list[bytes], right: list[bytes], past: list[bytes], places: list[int], start: int, at: int
) -> tuple[RowKind, str, list[int]] | None:
    """How the differing `places` (within the block) are other rows; None where none of them is."""
    known = places_of(right)
    known_past = places_of(past)
    mine = [n for n in places if rows[n] in known or rows[n] in known_past]
    if not mine:
        return None
    if len(past) and all(n < len(past) and rows[n] == past[n] for n in mine):
        hold = "holds" if len(mine) == 1 else "hold"
        return (
            "stale",
            f"stale: {rows_text(mine, start)} {hold} {rows_text(mine, at)} of the chunk before",
            mine,
        )
    if Counter(rows[n] for n in mine) == Counter(right[n] for n in mine):
        return "permuted", f"{rows_text(mine, start)} {are(mine)} in another order", mine
    sources = [_nearest(rows, n, known, known_past, start, at) for n in mine]
    by = {start + n - source for n, source in zip(mine, sources, strict=True)}
    if len(by) == 1 and len(mine) > 1 and {s - start for s in sources} & set(mine):
        n = by.pop()
        return "shifted", f"{rows_text(mine, start)} {are(mine)} shifted by {n:+d}", mine
    pairs = _Pairs(zip((start + n for n in mine), sources, strict=True))
    return "repeated", "; ".join(pairs.texts()), mine


def _nearest(
    rows: list[bytes], n: int, known: dict[bytes, int], known_past: dict[bytes, int], start: int, at: int
) -> int:
    """The place whose row this one holds."""
    key = rows[n]
    return start + known[key] if key in known else at + known_past[key]


class _Pairs:
    """Places and what they hold, in runs."""

    def __init__(self, pairs: Iterable[tuple[int, int]]) -> None:
        self._pairs = list(pairs)

    def texts(self) -> list[str]:
        found = []
        for _, group in groupby(
            enumerate(self._pairs), key=lambda one: (one[1][0] - one[0], one[1][1] - one[0])
        ):
            run = [pair for _, pair in group]
            here = span_text(run[0][0], run[-1][0] + 1)
            there = span_text(run[0][1], run[-1][1] + 1)
            found.append(f"{here} {'repeats' if len(run) == 1 else 'repeat'} {there}")
        return found


def _swapped(got: Tensor, want: Tensor, left: Tensor, start: int) -> list[Finding]:
    cells = left & (got == want.flip(1))
    if not cells.any():
        return []
    held = ["K holds V's rows"] * bool(cells[:, 0].any()) + ["V holds K's rows"] * bool(cells[:, 1].any())
    text = " and ".join(held)
    return [Finding("swapped", f"swapped: {text} in {tokens_text(cells, start)}", cells)]


def _heads(got: Tensor, want: Tensor, left: Tensor, start: int) -> list[Finding]:
    heads = got.shape[2]
    tried = [(n, left & (got == want.roll(n, dims=2))) for n in range(1, heads)]
    by, cells = max(tried, key=lambda one: int(one[1].sum()), default=(0, torch.zeros_like(left)))
    if not cells.any():
        return []
    where = f"{tensors_text(cells)} of {tokens_text(cells, start)}"
    text = f"heads shifted by {by} in {where}: head {by} holds head 0's rows"
    return [Finding("heads", text, cells)]
