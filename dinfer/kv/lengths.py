"""Overlong: layers of which a rank holds more rows than it should, or fewer, and what those rows are."""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from dinfer.kv.difference import Difference
from dinfer.kv.origin import BlockRoute
from dinfer.kv.rows import (
    Finding,
    RowKind,
    are,
    concerned,
    keys_of,
    numbers_text,
    places_of,
    places_text,
    span_text,
)
from dinfer.kv.source import HeldSpans, Side, Subject, chunk_of


def repeats(got: Tensor, want: Tensor) -> list[Finding]:
    """Of a layer's rows `got`, where `want` should be, longer or shorter than that: which repeat earlier ones, which
    stand elsewhere, which of those behind its end are no row of it, which of its rows are missing."""
    mine, right = keys_of(got), keys_of(want)
    seen, rightful = dict[bytes, int](), places_of(right)
    sources = list[tuple[str, int]]()
    for place, key in enumerate(mine):
        if key in seen:
            sources.append(("repeat", _source(sources, place, "repeat", seen[key], mine, key)))
        elif key in rightful:
            sources.append(("is", rightful[key] if place >= len(right) or right[place] != key else place))
        else:
            sources.append(("none", place))
        seen.setdefault(key, place)
    found = [_run_finding(got, run, len(right)) for run in _runs(sources)]
    return [one for one in found if one] + _missing(got, right, set(mine), sources)


class _Run(NamedTuple):
    """Consecutive places with consecutive sources."""

    what: str
    start: int
    stop: int
    source: int


def _source(
    sources: Sequence[tuple[str, int]], place: int, what: str, first: int, mine: Sequence[bytes], key: bytes
) -> int:
    """Of which earlier row this one is the repeat: of the one after what its neighbour repeats, if it can be."""
    if place and sources[place - 1][0] == what:
        follows = sources[place - 1][1] + 1
        if follows < place and mine[follows] == key:
            return follows
    return first


def _runs(sources: Sequence[tuple[str, int]]) -> list[_Run]:
    numbered = list(enumerate(sources))
    runs = list[_Run]()
    for (what, _), group in groupby(numbered, key=lambda one: (one[1][0], one[1][1] - one[0])):
        places = list(group)
        runs.append(_Run(what, places[0][0], places[-1][0] + 1, places[0][1][1]))
    return runs


def _run_finding(got: Tensor, run: _Run, right: int) -> Finding | None:
    cells = torch.zeros(got.shape, dtype=torch.bool)
    cells[run.start : run.stop] = True
    here, there = span_text(run.start, run.stop), span_text(run.source, run.source + run.stop - run.start)
    one = run.stop - run.start == 1
    if run.what == "repeat":
        return Finding("repeated", f"{here} {'repeats' if one else 'repeat'} {there}", cells, run.source)
    if run.what == "none" and run.start < right:  # other values, which are looked at in their place
        return None
    if run.what == "none":
        return Finding("extra", f"{here} {'is no row' if one else 'are no rows'} of the others", cells)
    if run.source == run.start:
        return None
    by, way = abs(run.start - run.source), "later" if run.start > run.source else "earlier"
    return Finding("shifted", f"{here} should be {there}: shifted, {by} {way}", cells)


def _missing(
    got: Tensor, right: Sequence[bytes], mine: set[bytes], sources: Sequence[tuple[str, int]]
) -> list[Finding]:
    """Right rows that are nowhere, but for those in whose place are other values."""
    other = {place for place, (what, _) in enumerate(sources) if what == "none"}
    gone = [place for place, key in enumerate(right) if key not in mine and place not in other]
    cells = torch.zeros(got.shape, dtype=torch.bool)
    return [Finding("missing", f"{places_text(gone)} of the others {are(gone)} missing", cells)] * bool(gone)


GoodSide = Callable[[Side, int], Side | None]
"""another side whose layer is as it should be, if there is one"""


class _Wrong(NamedTuple):
    """One layer of one rank."""

    side: Side
    layer: int
    rows: int
    right: int
    findings: list[Finding]

    @property
    def looks(self) -> tuple[int, int, str]:
        """What is said of it, which may be said of others too."""
        return self.rows, self.right, "; ".join(finding.text for finding in self.findings)


class Overlong:
    """Of the layers of some sides. `known`: the cells that are explained, by the side's name and layer."""

    def __init__(
        self,
        subject: Subject,
        sides: Sequence[tuple[Side, HeldSpans]],
        layers: Sequence[int],
        way: BlockRoute,
    ) -> None:
        self._subject, self._sides, self._layers, self._way = subject, sides, layers, way
        self.known: dict[tuple[str, int], Tensor] = {}

    def differences(self, good: GoodSide) -> list[Difference]:
        """One for each layer of a rank that is too long or too short."""
        wrong = [
            self._wrong(side, layer, held.rows[layer], right, good)
            for side, held in self._sides
            for layer in self._layers
            if held.rows[layer] != (right := self._right(held, layer))
        ]
        return [self._difference(one, wrong) for one in wrong]

    def _right(self, held: HeldSpans, layer: int) -> int:
        return self._subject.spans[held.spans[layer] - 1].stop if held.spans[layer] else 0

    def _wrong(self, side: Side, layer: int, rows: int, right: int, good: GoodSide) -> _Wrong:
        got = side.source.rows(side.rank, layer, range(rows))
        other = good(side, layer)
        want = other.source.rows(other.rank, layer, range(right)) if other else got
        findings = repeats(got, want)
        explained = [one.cells for one in findings]
        if explained:
            self.known[side.name, layer] = torch.stack(explained).any(0)
        return _Wrong(side, layer, rows, right, findings)

    def _difference(self, one: _Wrong, wrong: Sequence[_Wrong]) -> Difference:
        source = next((f.source for f in one.findings if f.source is not None), None)
        place = next((concerned(f.cells)[0] for f in one.findings if f.cells.any()), None)
        span = self._span(source if source is not None else min(place or 0, one.right - 1))
        chunk = chunk_of(self._subject, span)
        op = "decode" if chunk is None else self._way.op(one.side.rank, chunk, one.layer)
        after = op if chunk is None else f"after `{op}` in rank {one.side.rank}'s memory"
        return Difference(
            rank=one.side.rank, layer=one.layer, chunk=chunk, tensor=None, head=None, token=place, dim=None,
            values=None, op=after, kind=_kind(one), where="compute" if chunk is None else "memory",
            rows=abs(one.rows - one.right), name=one.side.name, note=self._note(one, wrong),
        )  # fmt: skip

    def _span(self, place: int) -> int:
        return next((n for n, span in enumerate(self._subject.spans) if place in span), 0)

    def _note(self, one: _Wrong, wrong: Sequence[_Wrong]) -> str:
        """For example `rank 0 holds 52 tokens of layer 0, the others 26; rows 26–51 repeat rows 0–25`."""
        alike = [other for other in wrong if other.looks == one.looks]
        names = list(dict.fromkeys(other.side.name for other in alike if other.layer == one.layer))
        layers = sorted({other.layer for other in alike if other.side.name == one.side.name})
        everyone = len(names) == len(self._sides) > 1
        who = f"all {len(names)} ranks hold" if everyone else f"{one.side.name} holds"
        lone = len(self._sides) == 1 or any(
            other.layer == one.layer and other.side.name != one.side.name for other in wrong
        )
        right = f"it should be {one.right}" if everyone or lone else f"the others {one.right}"
        which = f"layer{'s' * (len(layers) > 1)} {numbers_text(layers)}"
        texts = [finding.text for finding in one.findings]
        few = texts[:4] + [f"and {len(texts) - 4} more such"] * (len(texts) > 4)
        return "; ".join([f"{who} {one.rows} tokens of {which}, {right}", *few])


def _kind(one: _Wrong) -> RowKind:
    found = [finding.kind for finding in one.findings]
    order: tuple[RowKind, ...] = ("repeated", "missing", "shifted", "extra")
    return next((kind for kind in order if kind in found), "extra" if one.rows > one.right else "missing")
