"""Whose KV is what, in other people's code: from the digests that the probe took of rows as they were added to caches.

Ranks are compared only where they hold the same layer in the same shape and agree on most rows: ranks that split heads
hold other rows by design.
"""

from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dinfer.display import Displayable, Table
from dinfer.kv.rows import Nearby, concerned, identify, numbers_text, repeats
from dinfer.verdict.completed import OpFinding
from dinfer.verdict.where import ranks_text
from dinfer.watch.probe.rows import RowsTaken

RowDigests = tuple[int, ...]

MOST_GAP = 1 << 16
"""positions between two rows of one cache"""

MOST_REPEATED = 100
"""findings of one layer"""

KV_ROWS = "kv"
"""the name of rows of KV; taps have others"""


class HeldRows(Mapping[int, RowDigests]):
    """The digests of a layer's rows by position, of K and of V or of one tensor, in few bytes: a run of days has many
    rows."""

    def __init__(self) -> None:
        self._base = self._parts = 0
        self._digests, self._held = array("Q"), bytearray()
        self.dropped = 0
        """rows so far from all others that no cache has them there, or of another number of tensors"""

    def put(self, start: int, digests: Sequence[RowDigests]) -> None:
        """Rows from position `start` on; what was there before is replaced."""
        if not self._held:
            self._base, self._parts = start, len(digests[0])
        at, parts = start - self._base, self._parts
        if at < -MOST_GAP or at > len(self._held) + MOST_GAP or any(len(row) != parts for row in digests):
            self.dropped += len(digests)
            return
        if at < 0:
            self._digests[:0], self._held[:0] = array("Q", [0]) * (-at * parts), bytes(-at)
            self._base, at = start, 0
        lacks = at + len(digests) - len(self._held)
        if lacks > 0:
            self._digests.extend([0] * (lacks * parts))
            self._held.extend(bytes(lacks))
        stop = at + len(digests)
        self._digests[at * parts : stop * parts] = array("Q", chain.from_iterable(digests))
        self._held[at:stop] = b"\1" * len(digests)

    def __len__(self) -> int:
        return self._held.count(1)

    def __iter__(self) -> Iterator[int]:
        return (self._base + at for at, is_held in enumerate(self._held) if is_held)

    def __contains__(self, position: object) -> bool:
        at = position - self._base if isinstance(position, int) else -1
        return 0 <= at < len(self._held) and bool(self._held[at])

    def __getitem__(self, position: int) -> RowDigests:
        if position not in self:
            raise KeyError(position)
        at = (position - self._base) * self._parts
        return tuple(self._digests[at : at + self._parts])

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal for the same rows at the same positions. (What is not held is 0.)"""
        held = self._held.rstrip(b"\0")
        return self._base, bytes(held), self._digests[: len(held) * self._parts].tobytes()

    def tensor(self) -> Tensor:
        """Those of a cache without a gap, as `dinfer.kv.rows` takes them: int64 [rows, parts, 1]."""
        return torch.frombuffer(self._digests, dtype=torch.int64).view(-1, self._parts, 1).clone()


class LayerRows(NamedTuple):
    """One layer of a rank's newest cache, of one sequence: its rows, and its findings' words."""

    rows: HeldRows
    repeated: list[tuple[int, int, int | None]]
    """first position, count and chunk of rows that were added a second time"""
    shape: tuple[int, ...]
    starts: dict[int, int | None]
    """by the first position of what was added at a time, its chunk; rows that came one by one count as one piece"""

    def chunk_of(self, position: int) -> int | None:
        begun = [start for start in self.starts if start <= position]
        return self.starts[max(begun)] if begun else None


Layers = dict[tuple[int, int], LayerRows]
"""by layer and sequence of the batch"""


class WatchedKv(Displayable):
    """What `watch.kv()` returns: how many tokens of which layer each rank holds. `diff()` says what is wrong."""

    def __init__(self, layers: Mapping[int, Layers] | None = None) -> None:
        """`layers`: by rank."""
        self.layers = dict(layers or {})

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
            alike[held.shape, held.rows.identity].append(rank)
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
    got, want = mine.rows.tensor(), theirs.rows.tensor()
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


def layers_of(taken: Iterable[RowsTaken]) -> Layers:
    """The layers of the cache that was used last."""
    newest = 0
    found: Layers = {}
    before: dict[tuple[int, int], tuple[int, tuple[RowDigests, ...], int | None]] = {}
    for one in taken:
        if one.name != KV_ROWS or one.layer is None or one.cache < newest:
            continue
        if one.cache > newest:
            newest, found, before = one.cache, {}, {}
        for sequence, digests in enumerate(one.digests):
            if not digests:  # rows of another request
                continue
            key = (one.layer, sequence)
            held = found.setdefault(key, LayerRows(HeldRows(), [], one.shape[:-2] + one.shape[-1:], {}))
            at, last, chunk = before.get(key, (-1, (), None))
            is_new = one.start not in held.rows and len(held.repeated) < MOST_REPEATED
            if digests == last and is_new:
                held.repeated.append((one.start, len(digests), one.chunk))
            if not (len(digests) == len(last) == 1 and (one.start, one.chunk) == (at + 1, chunk)):
                held.starts[one.start] = one.chunk
            before[key] = one.start, digests, one.chunk
            held.rows.put(one.start, digests)
    return found


def _count(held: LayerRows | None) -> str:
    return "–" if held is None else str(len(held.rows))


def _span(start: int, count: int) -> str:
    return numbers_text(range(start, start + count))
