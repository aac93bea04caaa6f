"""Whose KV is what, in other people's code: from the digests that the probe took of rows as they were added to caches.

Ranks are compared only where they hold the same layer in the same shape and agree on most rows: ranks that split heads
hold other rows by design.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dinfer.display import Displayable, Table
from dinfer.kv.rows import Nearby, concerned, identify, numbers_text, repeats
from dinfer.verdict.completed import OpFinding
from dinfer.verdict.where import ranks_text
from dinfer.watch.probe.rows import RowsTaken

RowDigests = tuple[int, ...]

KV_ROWS = "kv"
"""the name of rows of KV; taps have others"""


class LayerRows(NamedTuple):
    """One layer of a rank's newest cache, of one sequence: digests by position, and its findings' words."""

    rows: dict[int, RowDigests]
    repeated: list[tuple[int, int, int | None]]
    """first position, count and chunk of rows that were added a second time"""
    shape: tuple[int, ...]
    starts: dict[int, int | None]
    """by the first position of what was added at a time, its chunk"""

    def chunk_of(self, position: int) -> int | None:
        begun = [start for start in self.starts if start <= position]
        return self.starts[max(begun)] if begun else None


class WatchedKv(Displayable):
    """What `watch.kv()` returns: how many tokens of which layer each rank holds. `diff()` says what is wrong."""

    def __init__(self, taken: Mapping[int, Sequence[RowsTaken]]) -> None:
        self.layers: dict[int, dict[tuple[int, int], LayerRows]] = {
            rank: _layers(rows) for rank, rows in taken.items()
        }
        """by rank, by layer and sequence of the batch"""

    def diff(self) -> list[OpFinding]:
        """What is wrong, in the words of a run's diff: rows that are repeated, stale, shifted, permuted, rows of other
        values, rows that a rank lacks. Ranks that hold the same in most layers are found to be wrong where they do not;
        of two, the one with fewer repetitions is taken to be right, then the first."""
        found: dict[tuple[str, tuple[int, ...], str], list[_RowFinding]] = defaultdict(list)
        for key in sorted({key for layers in self.layers.values() for key in layers}):
            for one in self._of_layer(key):
                found[one.kind, one.ranks, one.text].append(one)
        return [_together(some) for some in found.values()]

    def table(self) -> Table:
        """Tokens by layer and rank."""
        ranks = sorted(self.layers)
        keys = sorted({key for layers in self.layers.values() for key in layers})
        rows = [
            [layer, sequence, *(_count(self.layers[rank].get((layer, sequence))) for rank in ranks)]
            for layer, sequence in keys
        ]
        return Table(["layer", "sequence", *(f"rank {rank}, tokens" for rank in ranks)], rows)

    def __str__(self) -> str:
        if not any(self.layers.values()):
            return "no rows of KV were seen: transformers' caches are, others by --kv, or dinfer.tap('kv', …)"
        return "\n".join([str(self.table()), *(one.text for one in self.diff())])

    def _of_layer(self, key: tuple[int, int]) -> "Iterator[_RowFinding]":
        holders = {rank: layers[key] for rank, layers in self.layers.items() if key in layers}
        alike: dict[tuple[object, ...], list[int]] = defaultdict(list)
        for rank, held in holders.items():
            alike[held.shape, tuple(sorted(held.rows.items()))].append(rank)
        groups = sorted(
            alike.values(), key=lambda ranks: (-len(ranks), len(holders[ranks[0]].repeated), ranks)
        )
        right = groups[0]
        named = set[int]()
        for ranks in groups[1:]:
            for one in _between(holders[ranks[0]], holders[right[0]], ranks, right):
                named.update(ranks)
                yield one._replace(layer=key[0])
        for rank, held in holders.items():
            for start, count, chunk in held.repeated if rank not in named else ():
                text = f"rows {_span(start, count)} of {{layers}} repeat rows {_span(start - count, count)}"
                yield _RowFinding("rows repeated", (rank,), f"rank {rank}: {text}", key[0], chunk)


class _RowFinding(NamedTuple):
    """A finding in one layer; its text has a place for `{layers}`."""

    kind: str
    ranks: tuple[int, ...]
    text: str
    layer: int
    chunk: int | None


def _together(some: Sequence[_RowFinding]) -> OpFinding:
    """The same in several layers."""
    layers = sorted({one.layer for one in some})
    named = f"layer{'s' * (len(layers) > 1)} {numbers_text(layers)}"
    first = some[0]
    return OpFinding(first.kind, first.ranks, first.text.format(layers=named), first.layer, first.chunk)


def _between(
    mine: LayerRows, theirs: LayerRows, ranks: Sequence[int], right: Sequence[int]
) -> Iterator[_RowFinding]:
    """What is wrong with the rows that `ranks` hold, beside those of the ranks that are taken to be right."""
    common = mine.rows.keys() & theirs.rows.keys()
    known = set(theirs.rows.values())
    alike = sum(row in known for row in mine.rows.values())
    if mine.shape != theirs.shape or not common or 2 * alike <= min(len(mine.rows), len(theirs.rows)):
        return  # other heads, or another prompt
    who, others = ranks_text(ranks), ranks_text(right)
    blamed = (*ranks, *right)
    hold = "holds" if len(ranks) == 1 else "hold"
    explained, is_explained = set[int](), False
    if _is_whole(mine) and _is_whole(theirs):
        is_longer = all(mine.rows[at] == theirs.rows[at] for at in common)
        for one in _misplaced(mine, theirs):
            if one.kind == "extra" and is_longer:  # the others lack them
                continue
            is_explained = True
            explained.update(one.places)
            at = one.places[0] if one.places else 0
            lengths = ""
            if len(mine.rows) != len(theirs.rows):
                lengths = f"{hold} {len(mine.rows)} rows of {{layers}}, {others} {len(theirs.rows)}: "
            text = f"{who} {lengths or 'in {layers}: '}{one.text}"
            yield _RowFinding(f"rows {one.kind}", tuple(ranks), text, 0, mine.chunk_of(at))
    differ = sorted(at for at in common if mine.rows[at] != theirs.rows[at] and at not in explained)
    if differ and not (
        is_explained and len(mine.rows) != len(theirs.rows)
    ):  # else what follows is only shifted
        text = (
            f"ranks {right[0]} and {ranks[0]} hold other KV in {len(differ)} of {len(common)} rows of {{layers}}, the "
            f"first at token {differ[0]}"
        )
        yield _RowFinding("rows differ", (ranks[0], right[0]), text, 0, mine.chunk_of(differ[0]))
    if len(mine.rows) != len(theirs.rows) and not is_explained:
        less = len(mine.rows) < len(theirs.rows)
        text = f"{who} {hold} {len(mine.rows)} rows of {{layers}}, {others} {len(theirs.rows)}"
        yield _RowFinding("rows missing", blamed if less else (*right, *ranks), text, 0, None)


def _is_whole(held: LayerRows) -> bool:
    return len(held.rows) == max(held.rows) + 1


class _Misplaced(NamedTuple):
    """Some rows that are others, or are missing; `text` as a run's diff says it."""

    kind: str
    text: str
    places: list[int]


def _misplaced(mine: LayerRows, theirs: LayerRows) -> list[_Misplaced]:
    """Rows that lie where others should, as a run's diff finds them."""
    got, want = _tensor(mine), _tensor(theirs)
    if len(got) != len(want):
        whole = [_Misplaced(one.kind, one.text, concerned(one.cells)) for one in repeats(got, want)]
        # Rows behind those that are repeated or missing are shifted by these.
        causes = [one for one in whole if one.kind != "shifted"]
        return causes or whole
    found, previous = list[_Misplaced](), None
    starts = sorted({0, *mine.starts})
    for start, stop in pairwise([*(at for at in starts if at < len(got)), len(got)]):
        differs = got[start:stop] != want[start:stop]
        nearby = partial(Nearby, 0, want, previous)
        for one in identify(got[start:stop], want[start:stop], start, nearby, NO_ZERO)[0]:
            rows = concerned(one.cells)
            if bool(
                (one.cells | ~differs)[rows].all()
            ):  # not K alone, which may be another token's by chance
                found.append(_Misplaced(one.kind, one.text, [start + at for at in rows]))
        previous = start
    return found


NO_ZERO = -(1 << 63)
"""no row's digest, but by chance: of a row of zeros it is not known here, as rows are of any length"""


def _tensor(held: LayerRows) -> Tensor:
    """Digests as `kv.rows` takes them: int64 [places, 2, 1]."""
    half = 1 << 63
    rows = [[[n - 2 * half if n >= half else n] for n in held.rows[at]] for at in range(len(held.rows))]
    return torch.tensor(rows, dtype=torch.int64)


def _layers(taken: Sequence[RowsTaken]) -> dict[tuple[int, int], LayerRows]:
    """The layers of the cache that was used last."""
    rows = [one for one in taken if one.name == KV_ROWS and one.layer is not None]
    newest = max((one.cache for one in rows), default=0)
    found: dict[tuple[int, int], LayerRows] = {}
    before: dict[tuple[int, int], tuple[RowDigests, ...]] = defaultdict(tuple)
    for one in rows:
        if one.cache != newest or one.layer is None:
            continue
        for sequence, digests in enumerate(one.digests):
            if not digests:  # rows of another request
                continue
            key = (one.layer, sequence)
            held = found.setdefault(key, LayerRows({}, [], one.shape[:-2] + one.shape[-1:], {}))
            if digests == before[key] and one.start not in held.rows:
                held.repeated.append((one.start, len(digests), one.chunk))
            before[key] = digests
            held.rows.update(enumerate(digests, one.start))
            held.starts[one.start] = one.chunk
    return found


def _count(held: LayerRows | None) -> str:
    return "–" if held is None else str(len(held.rows))


def _span(start: int, count: int) -> str:
    return numbers_text(range(start, start + count))
