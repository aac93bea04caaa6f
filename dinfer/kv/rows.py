"""Rows: which rows a rank holds in place of the right ones, told from digests alone. Pure.

Equal rows have equal digests wherever they lie, so rows that were moved, repeated or exchanged can be found again; what
is left over has other values. `identify` names the rows of one block, `repeats` those of a layer of the wrong length;
`misplaced_in_blocks` and `misplaced_rows` do so beside the reference. All comparisons of KV use them, so that each kind
of row is named in one way.

A place is a row's index in a layer's cache; digests are int64 [places, 2, heads], the second index K and V, those of a
whole row the digests of all its heads.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import groupby
from typing import Literal, NamedTuple

import torch
from torch import Tensor

RowKind = Literal[
    "value", "missing", "repeated", "shifted", "stale", "permuted", "swapped", "heads", "empty", "extra"
]


class Finding(NamedTuple):
    """What has become of some rows: `cells` [places, 2, heads] are those concerned, of the tensors that were given;
    `source`: the first place of the rows that they hold instead, where these are one run; `text`: a sentence."""

    kind: RowKind
    text: str
    cells: Tensor
    source: int | None = None


class Nearby(NamedTuple):
    """Rows beside a block, in which its rows may be found again: right ones, from the place `start` on. `previous`: the
    place where the block before begins; None for the first block."""

    start: int
    rows: Tensor
    previous: int | None


class Misplaced(NamedTuple):
    """A finding as plain values: it concerns places `start` to `stop` (exclusive) of `tensors`, "K", "V" or "KV";
    `source` as in Finding, -1 for none."""

    start: int
    stop: int
    kind: RowKind
    tensors: str
    source: int
    text: str


def misplaced_rows(got: Tensor, want: Tensor) -> list[Misplaced]:
    """What `repeats` finds in a layer of the wrong length, but for missing rows."""
    return [_plain(one, 0) for one in repeats(got, want) if one.cells.any()]


def misplaced_in_blocks(got: Tensor, want: Tensor, blocks: Sequence[range], zero: int) -> list[Misplaced]:
    """Which of a layer's rows, `got`, are other rows than they should be, `want`; both are of one length.

    `blocks`: the places of each block; `zero` as for `identify`. Only whole rows count, of all heads, and only where
    other rows of the layer explain all of K or V of a block: in a block of other values, single rows may be another's
    by chance, as K of the first layer is for equal tokens at shifted positions.
    """
    found, previous = list[Misplaced](), None
    for block in blocks:
        mine, right = got[block.start : block.stop], want[block.start : block.stop]
        nearby = partial(Nearby, 0, want, previous)
        findings, _ = identify(mine, right, block.start, nearby, zero)
        whole = [one for one in findings if one.cells[one.cells.any(2)].all()]
        left = mine != right
        for one in whole:
            left &= ~one.cells
        unexplained = left.any(2).any(0)
        found += [_plain(one, block.start) for one in whole if not unexplained[one.cells.any(2).any(0)].any()]
        previous = block.start
    return found


def _plain(one: Finding, start: int) -> Misplaced:
    places = concerned(one.cells)
    tensors = "".join(name for n, name in enumerate("KV") if one.cells[:, n].any())
    source = -1 if one.source is None else one.source
    return Misplaced(start + places[0], start + places[-1] + 1, one.kind, tensors, source, one.text)


def identify(
    got: Tensor,
    want: Tensor,
    start: int,
    nearby: Callable[[], Nearby],
    zero: int,
    known: Tensor | None = None,
) -> tuple[list[Finding], Tensor]:
    """What the rows `got` are, in the places from `start` on where `want` should be; both are of one length. Second,
    the cells that differ and are no other row's: other values.

    `nearby` is called only if rows of other blocks may explain something; `zero`: the digest of a row of zeros;
    `known`: cells that are explained already.
    """
    found, left = list[Finding](), (got != want) & (True if known is None else ~known)

    def empty(left: Tensor) -> list[Finding]:
        cells = left & (got == zero)
        text = f"{_what_text(cells)} of {_tokens_text(cells, start)} {_are(concerned(cells))} all zeros"
        return [Finding("empty", text, cells)] * bool(cells.any())

    def swapped(left: Tensor) -> list[Finding]:
        cells = left & (got == want.flip(1))
        held = ["K holds V's rows"] * bool(cells[:, 0].any()) + ["V holds K's rows"] * bool(cells[:, 1].any())
        text = f"swapped: {' and '.join(held)} in {_tokens_text(cells, start)}"
        return [Finding("swapped", text, cells)] * bool(cells.any())

    for look in (
        empty,
        lambda left: _moved(got, want, left, start, nearby),
        swapped,
        lambda left: _heads(got, want, left, start),
    ):
        for finding in look(left) if left.any() else []:
            found.append(finding)
            left = left & ~finding.cells
    return found, left


def _moved(
    got: Tensor, want: Tensor, left: Tensor, start: int, nearby: Callable[[], Nearby]
) -> list[Finding]:
    """Tokens that hold other tokens' rows: of all heads that differ at once, else of K or V or each head alone."""
    found = list[Finding]()
    others = Nearby(start, got[:0], None)
    if int(left.sum()) > 1 or got.shape[2] == 1:  # one head of many is no row: not worth reading other blocks
        others = nearby()
    # the columns [2, heads] that differ: all of them, those of K, those of V, each one
    differ = left.any(0)
    halves = [differ & (torch.arange(2)[:, None] == n) for n in (0, 1)]
    singles = torch.eye(differ.numel(), dtype=torch.bool)[differ.flatten()]
    for columns in (differ, *halves, *(one.view_as(differ) for one in singles)):
        if not (left & columns).any():
            continue
        rows, right, beside = (_keys(part[:, columns]) for part in (got, want, others.rows))
        sources = _first_places(beside, others.start) | _first_places(right, start)
        mine = [n for n in concerned(left & columns) if rows[n] in sources]
        if not mine:
            continue
        kind, text, source = _move(rows, right, beside, mine, sources, start, others)
        cells = torch.zeros(got.shape, dtype=torch.bool)
        cells[mine] = columns
        cells &= left
        left = left & ~cells
        part = "" if bool(columns.all()) else f"{_what_text(cells)}: "
        found.append(Finding(kind, part + text, cells, source))
    return found


def _move(
    rows: list[bytes],
    right: list[bytes],
    beside: list[bytes],
    mine: list[int],
    sources: dict[bytes, int],
    start: int,
    others: Nearby,
) -> tuple[RowKind, str, int | None]:
    """What has become of the rows `mine` of a block, numbered from its own start, which are other rows: of what kind
    that is, a sentence, and the first place that they hold. `sources`: where rows should lie."""
    here = places_text([start + n for n in mine])
    if others.previous is not None:
        before = beside[others.previous - others.start :][: start - others.previous]
        if all(n < len(before) and rows[n] == before[n] for n in mine):
            hold = "holds" if len(mine) == 1 else "hold"
            there = places_text([others.previous + n for n in mine])
            return "stale", f"stale: {here} {hold} {there} of the chunk before", others.previous + mine[0]
    if Counter(rows[n] for n in mine) == Counter(right[n] for n in mine):
        return "permuted", f"{here} {_are(mine)} in another order", None
    pairs = [(start + n, sources[rows[n]]) for n in mine]
    by = {place - source for place, source in pairs}
    if len(by) == 1 and len(mine) > 1 and {source - start for _, source in pairs} & set(mine):
        return "shifted", f"{here} {_are(mine)} shifted by {by.pop():+d}", pairs[0][1]
    runs = _runs_of([("repeat", *pair) for pair in pairs])
    return "repeated", "; ".join(map(_repeat_text, runs)), pairs[0][1]


def _heads(got: Tensor, want: Tensor, left: Tensor, start: int) -> list[Finding]:
    tried = [(n, left & (got == want.roll(n, dims=2))) for n in range(1, got.shape[2])]
    by, cells = max(tried, key=lambda one: int(one[1].sum()), default=(0, torch.zeros_like(left)))
    where = f"{_tensors_text(cells)} of {_tokens_text(cells, start)}"
    text = f"heads shifted by {by} in {where}: head {by} holds head 0's rows"
    return [Finding("heads", text, cells)] * bool(cells.any())


# -- layers of another length


class _Run(NamedTuple):
    """Consecutive places, `start` to `stop`, with consecutive sources; `what`: "repeat" (of an earlier row), "right"
    (the row of the place `source`) or "other" (no right row)."""

    what: str
    start: int
    stop: int
    source: int


def repeats(got: Tensor, want: Tensor) -> list[Finding]:
    """Of a layer's rows `got`, where `want` should be, longer or shorter than that: which repeat earlier ones, which
    stand elsewhere, which of those behind its end are no row of it, which of its rows are missing."""
    mine, right = _keys(got), _keys(want)
    seen, rightful = dict[bytes, int](), _first_places(right)
    found = list[tuple[str, int, int]]()
    for place, key in enumerate(mine):
        if key in seen:
            last, _, source = found[-1]
            follows = last == "repeat" and source + 1 < place and mine[source + 1] == key
            found.append(("repeat", place, source + 1 if follows else seen[key]))
        elif key in rightful:
            moved = place >= len(right) or right[place] != key
            found.append(("right", place, rightful[key] if moved else place))
        else:
            found.append(("other", place, place))
        seen.setdefault(key, place)
    named = [_of_run(got, run, len(right)) for run in _runs_of(found)]
    replaced = {place for what, place, _ in found if what == "other"}
    gone = [place for place, key in enumerate(right) if key not in seen and place not in replaced]
    missing = f"{places_text(gone)} of the others {_are(gone)} missing"
    nothing = torch.zeros(got.shape, dtype=torch.bool)
    return [one for one in named if one] + [Finding("missing", missing, nothing)] * bool(gone)


def _of_run(got: Tensor, run: _Run, right: int) -> Finding | None:
    cells = torch.zeros(got.shape, dtype=torch.bool)
    cells[run.start : run.stop] = True
    count = run.stop - run.start
    here, there = (places_text(range(at, at + count)) for at in (run.start, run.source))
    if run.what == "repeat":
        return Finding("repeated", _repeat_text(run), cells, run.source)
    if run.what == "right" and run.source != run.start:
        by, direction = abs(run.start - run.source), "later" if run.start > run.source else "earlier"
        return Finding("shifted", f"{here} should be {there}: shifted, {by} {direction}", cells)
    if run.what == "other" and run.start >= right:
        return Finding("extra", f"{here} {'is no row' if count == 1 else 'are no rows'} of the others", cells)
    return None  # right, or other values, which are looked at in their place


def _runs_of(found: Iterable[tuple[str, int, int]]) -> list[_Run]:
    """Of (what, place, source), split where one of them does not go on as before, by one each."""
    groups = groupby(enumerate(found), key=lambda one: (one[1][0], one[1][1] - one[0], one[1][2] - one[0]))
    runs = [[one for _, one in group] for _, group in groups]
    return [_Run(run[0][0], run[0][1], run[-1][1] + 1, run[0][2]) for run in runs]


# -- words


def _repeat_text(run: _Run) -> str:
    """For example `rows 26–51 repeat rows 0–25`."""
    count = run.stop - run.start
    verb = "repeats" if count == 1 else "repeat"
    here, there = (places_text(range(at, at + count)) for at in (run.start, run.source))
    return f"{here} {verb} {there}"


def places_text(places: Sequence[int]) -> str:
    """For example `row 5`, `rows 3, 26–51`."""
    return f"row{'s' * (len(places) != 1)} {numbers_text(places)}"


def numbers_text(numbers: Sequence[int]) -> str:
    """Runs of numbers: 3, 5–9."""
    runs = []
    for _, group in groupby(enumerate(sorted(numbers)), key=lambda one: one[1] - one[0]):
        run = [number for _, number in group]
        runs.append(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}")
    return ", ".join(runs[:4]) + (f" and {len(runs) - 4} runs more" if len(runs) > 4 else "")


def _tokens_text(cells: Tensor, start: int) -> str:
    return places_text([start + n for n in concerned(cells)])


def _tensors_text(cells: Tensor) -> str:
    return " and ".join(name for n, name in enumerate("KV") if cells[:, n].any())


def _what_text(cells: Tensor) -> str:
    """K and V, or K alone, and which heads of it, where not all."""
    heads = cells.any(0).any(0).nonzero().flatten().tolist()
    some = "" if len(heads) == cells.shape[2] else f", head{'s' * (len(heads) > 1)} {numbers_text(heads)}"
    return f"{_tensors_text(cells)}{some}"


def _are(places: Sequence[int]) -> str:
    return "is" if len(places) == 1 else "are"


# -- digests


def concerned(cells: Tensor) -> list[int]:
    """The places with at least one cell."""
    found: list[int] = cells.flatten(1).any(1).nonzero().flatten().tolist()
    return found


def _keys(rows: Tensor) -> list[bytes]:
    """Each row's digests as one key; the places of `rows` come first."""
    return [row.tobytes() for row in rows.flatten(1).contiguous().numpy()] if len(rows) else []


def _first_places(keys: Sequence[bytes], start: int = 0) -> dict[bytes, int]:
    """The first place of each row, counted from `start`."""
    return {key: start + n for n, key in reversed(list(enumerate(keys)))}
