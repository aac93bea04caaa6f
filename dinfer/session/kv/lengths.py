"""Lengths: what the rows of a layer are that holds too many of them, or too few, told from digests alone. Pure."""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from dinfer.session.kv.rows import Finding
from dinfer.session.kv.words import are, keys_of, places_of, places_text, span_text


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
