"""What is wrong with the KV of watched ranks, in the words of a run's diff, as far as digests of rows tell.

Data-parallel ranks have prompts of their own, which often begin alike: rows behind the common beginning are not
compared. Digests tell such prompts from wrong rows by the layers: another token changes the row of the first layer and
all rows behind it in all others; a row that was spoiled changes only itself, or nothing of the first layer.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dinfer.kv.rows import Nearby, concerned, identify, numbers_text, repeats
from dinfer.verdict.completed import OpFinding
from dinfer.verdict.where import ranks_text
from dinfer.watching.held_rows import AddedBy, HeldRows, LayerRows, Layers, RowDigests


class RowDifferences(NamedTuple):
    """What a comparison of ranks' rows says. `other_prompts`: sentences on ranks whose prompts only begin alike."""

    findings: list[OpFinding]
    other_prompts: list[str]


def differences(by_rank: Mapping[int, Layers]) -> RowDifferences:
    """Compare the rows of the ranks."""
    prompts = _Prompts(by_rank)
    found: dict[tuple[str, tuple[int, ...], str], list[_RowFinding]] = defaultdict(list)
    keys = sorted({key for layers in by_rank.values() for key in layers})
    for key in keys:
        for one in _of_layer(by_rank, key, prompts):
            found[one.kind, one.ranks, one.text].append(one)
    has_one = len({sequence for _, sequence in keys}) <= 1
    findings = [_together(alike, has_one=has_one) for some in found.values() for alike in _by_sequences(some)]
    return RowDifferences(findings, prompts.texts())


class _Parted(NamedTuple):
    """Two ranks have other tokens from the place `at` on. `is_fed_alike`: what is before came to both in the same
    pieces; else the same computation may round otherwise, and rows that differ say nothing."""

    at: int
    is_fed_alike: bool


class _Prompts:
    """Which ranks have been fed other tokens, and from which on."""

    def __init__(self, by_rank: Mapping[int, Layers]) -> None:
        self._by_rank = by_rank
        self._parted: dict[tuple[int, int, int], _Parted | None] = {}
        """by two ranks and the sequence"""

    def parted(self, rank: int, other: int, sequence: int) -> _Parted | None:
        """Where these ranks have other tokens in a sequence, as their rows of all layers say; None: they have the same,
        or nothing in common."""
        key = (min(rank, other), max(rank, other), sequence)
        if key not in self._parted:
            self._parted[key] = self._part_at(*key)
        return self._parted[key]

    def texts(self) -> list[str]:
        """A sentence for each two ranks and sequence that were found to have other prompts."""
        how = {
            True: "compared before it",
            False: "not compared, as they were fed in other pieces, which may round otherwise",
        }
        return [
            f"ranks {rank} and {other} have other prompts from token {found.at} on (sequence {sequence}): "
            f"{how[found.is_fed_alike]}"
            for (rank, other, sequence), found in sorted(self._parted.items())
            if found is not None
        ]

    def _part_at(self, rank: int, beside: int, sequence: int) -> _Parted | None:
        lowest = self._lowest(sequence)
        pairs = {
            layer: (mine, theirs)
            for (layer, one), mine in self._by_rank[rank].items()
            if one == sequence
            and (theirs := self._by_rank[beside].get((layer, one))) is not None
            and _are_comparable(mine, theirs)
        }
        deeper = [_parts_for_good(*pair) for layer, pair in pairs.items() if layer != lowest]
        if deeper:
            if any(one is None for one in deeper):
                return None
            at = max(one.start for one in deeper if one is not None)
            if not any(one is not None and one.stop > at for one in deeper):
                return None
        elif lowest in pairs and (found := _parts_mostly(*pairs[lowest])) is not None:
            at = found
        else:
            return None
        other = self._other_token(at, lowest, sequence, (rank, beside))
        if other is None:
            return None
        return _Parted(
            other, all(mine.pieces(other) == theirs.pieces(other) for mine, theirs in pairs.values())
        )

    def _lowest(self, sequence: int) -> int:
        """The first layer that several ranks hold."""
        counts = Counter(
            layer for layers in self._by_rank.values() for layer, one in layers if one == sequence
        )
        return min(layer for layer, count in counts.items() if count > 1)

    def _other_token(self, start: int, lowest: int, sequence: int, pair: tuple[int, int]) -> int | None:
        """The first place from `start` on at which both ranks have other rows in the first layer, of K and of V; where
        one of them does not hold that layer, any two ranks."""
        holders = {rank for rank, layers in self._by_rank.items() if (lowest, sequence) in layers}
        asked = sorted(holders) if not holders.issuperset(pair) else pair
        held = [self._by_rank[rank][lowest, sequence] for rank in asked]
        places = (
            at
            for one, other in combinations(held, 2)
            if _are_comparable(one, other)
            for at in one.rows.keys() & other.rows.keys()
            if at >= start
            and all(mine != theirs for mine, theirs in zip(one.rows[at], other.rows[at], strict=True))
        )
        return min(places, default=None)


def _are_comparable(mine: LayerRows, theirs: LayerRows) -> bool:
    """Not where they are of other heads, or have no beginning in common."""
    if mine.shape != theirs.shape or not mine.rows.keys() & theirs.rows.keys():
        return False
    known = set(theirs.rows.values())
    return 2 * sum(row in known for row in mine.rows.values()) > min(len(mine.rows), len(theirs.rows))


def _parts_for_good(mine: LayerRows, theirs: LayerRows) -> range | None:
    """The places from the first on at which no row is one of the other's; None if that is not how they differ."""
    common = mine.rows.keys() & theirs.rows.keys()
    start = max((at for at in common if mine.rows[at] == theirs.rows[at]), default=-1) + 1
    for one, other in ((mine, theirs), (theirs, mine)):
        known, behind = set(other.rows.values()), [row for at, row in one.rows.items() if at >= start]
        if _are_one(behind) or any(row in known for row in behind):
            return None  # no tokens, or rows that lie elsewhere, or are lacking
    return range(start, max(common) + 1)


def _parts_mostly(mine: LayerRows, theirs: LayerRows) -> int | None:
    """The same of the first layer, where a token that is the same at the same place again has the same row."""
    common = sorted(mine.rows.keys() & theirs.rows.keys())
    start = next((at for at in common if mine.rows[at] != theirs.rows[at]), None)
    if start is None:
        return None
    behind = [at for at in common if at >= start]
    for one, other in ((mine, theirs), (theirs, mine)):
        known = set(other.rows.values())
        rows = [one.rows[at] for at in behind]
        if _are_one(rows) or 2 * sum(row in known for row in rows) >= len(rows):
            return None
    return start


def _are_one(rows: Sequence[RowDigests]) -> bool:
    """Whether several rows are one and the same, as rows that nobody has filled are, and no tokens' at other places."""
    return len(rows) > 1 and len(set(rows)) == 1


class _RowFinding(NamedTuple):
    """A finding in one layer; its text has a place for `{layers}`."""

    kind: str
    ranks: tuple[int, ...]
    text: str
    layer: int
    sequence: int
    chunk: int | None
    by: AddedBy
    """of the first row"""


def _of_layer(
    by_rank: Mapping[int, Layers], key: tuple[int, int], prompts: _Prompts
) -> Iterator[_RowFinding]:
    holders = {rank: layers[key] for rank, layers in by_rank.items() if key in layers}
    alike: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for rank, held in holders.items():
        alike[held.shape, held.rows.identity].append(rank)
    groups = sorted(alike.values(), key=lambda ranks: (-len(ranks), len(holders[ranks[0]].repeated), ranks))
    right = groups[0]
    named = set[int]()
    for ranks in groups[1:]:
        mine, theirs = holders[ranks[0]], holders[right[0]]
        if not _are_comparable(mine, theirs):
            continue
        parted = prompts.parted(ranks[0], right[0], key[1])
        if parted is not None and not parted.is_fed_alike:
            continue
        if parted is not None:
            mine, theirs = mine.before(parted.at), theirs.before(parted.at)
        if mine.is_paged and theirs.is_paged and mine.begin != theirs.begin:  # one shares what is before
            begin = max(mine.begin, theirs.begin)
            mine, theirs = mine.since(begin), theirs.since(begin)
        for one in _between(mine, theirs, ranks, right):
            named.update(ranks)
            yield one._replace(layer=key[0], sequence=key[1])
    for rank, held in holders.items():
        for start, count, chunk in held.repeated if rank not in named else ():
            text = f"rows {_span(start, count)} of {{layers}} repeat rows {_span(start - count, count)}"
            by = held.added_by(start)
            yield _RowFinding("rows repeated", (rank,), f"rank {rank}: {text}", *key, chunk, by)


def _by_sequences(some: Sequence[_RowFinding]) -> Iterator[list[_RowFinding]]:
    """The same said of several layers and sequences, parted so that each part is of all its layers in all its
    sequences."""
    by_sequence: dict[int, list[_RowFinding]] = defaultdict(list)
    for one in some:
        by_sequence[one.sequence].append(one)
    by_layers: dict[frozenset[int], list[_RowFinding]] = defaultdict(list)
    for found in by_sequence.values():
        by_layers[frozenset(one.layer for one in found)] += found
    yield from by_layers.values()


def _together(some: Sequence[_RowFinding], *, has_one: bool) -> OpFinding:
    """The same in several layers and sequences; which these are is not said where a rank `has_one` only."""
    named = _numbered("layer", {one.layer for one in some})
    if not has_one:
        named += f" of {_numbered('sequence', {one.sequence for one in some})}"
    first = some[0]
    line, function = first.by
    by = f" (added at {line} in {function})" if line else ""
    text = f"{first.text.format(layers=named)}{by}"
    return OpFinding(first.kind, first.ranks, text, first.layer, first.chunk, line or None)


def _between(
    mine: LayerRows, theirs: LayerRows, ranks: Sequence[int], right: Sequence[int]
) -> Iterator[_RowFinding]:
    """What is wrong with the rows that `ranks` hold, beside those of the ranks that are taken to be right."""
    common = mine.rows.keys() & theirs.rows.keys()
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
            yield _RowFinding(
                f"rows {one.kind}", tuple(ranks), text, 0, 0, mine.chunk_of(at), mine.added_by(at)
            )
    differ = sorted(at for at in common if mine.rows[at] != theirs.rows[at] and at not in explained)
    if differ and not (
        is_explained and len(mine.rows) != len(theirs.rows)
    ):  # else what follows is only shifted
        text = (
            f"ranks {right[0]} and {ranks[0]} hold other KV in {len(differ)} of {len(common)} rows of {{layers}}, the "
            f"first at token {differ[0]}"
        )
        first = differ[0]
        yield _RowFinding(
            "rows differ", (ranks[0], right[0]), text, 0, 0, mine.chunk_of(first), mine.added_by(first)
        )
    if len(mine.rows) != len(theirs.rows) and not is_explained:
        less = len(mine.rows) < len(theirs.rows)
        text = f"{who} {hold} {len(mine.rows)} rows of {{layers}}, {others} {len(theirs.rows)}"
        yield _RowFinding("rows missing", blamed if less else (*right, *ranks), text, 0, 0, None, AddedBy())


def _is_whole(held: LayerRows) -> bool:
    return len(held.rows) == max(held.rows) + 1


class _Misplaced(NamedTuple):
    """Some rows that are others, or are missing; `text` as a run's diff says it."""

    kind: str
    text: str
    places: list[int]


def _misplaced(mine: LayerRows, theirs: LayerRows) -> list[_Misplaced]:
    """Rows that lie where others should, as a run's diff finds them."""
    got, want = _tensor(mine.rows), _tensor(theirs.rows)
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


def _tensor(rows: HeldRows) -> Tensor:
    """As `dinfer.kv.rows` takes them: int64 [rows, 2, 1]. Of a cache of one tensor, as latent attention has, it stands
    for K and for V."""
    digests, tensors = rows.digests
    found = torch.frombuffer(digests, dtype=torch.int64).view(-1, tensors, 1)
    return found.expand(-1, 2, 1).clone()


def _numbered(noun: str, numbers: Iterable[int]) -> str:
    found = sorted(numbers)
    return f"{noun}{'s' * (len(found) > 1)} {numbers_text(found)}"


def _span(start: int, count: int) -> str:
    return numbers_text(range(start, start + count))
