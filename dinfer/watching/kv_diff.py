"""What is wrong with the KV of watched ranks, in the words of a run's diff, as far as digests of rows tell."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dinfer.kv.rows import Nearby, concerned, identify, numbers_text, repeats
from dinfer.verdict.completed import OpFinding
from dinfer.verdict.where import ranks_text
from dinfer.watching.held_rows import HeldRows, LayerRows, Layers


def differences(by_rank: Mapping[int, Layers]) -> list[OpFinding]:
    """See `WatchedKv.diff`."""
    found: dict[tuple[str, tuple[int, ...], str], list[_RowFinding]] = defaultdict(list)
    for key in sorted({key for layers in by_rank.values() for key in layers}):
        for one in _of_layer(by_rank, key):
            found[one.kind, one.ranks, one.text].append(one)
    return [_together(some) for some in found.values()]


class _RowFinding(NamedTuple):
    """A finding in one layer; its text has a place for `{layers}`."""

    kind: str
    ranks: tuple[int, ...]
    text: str
    layer: int
    chunk: int | None


def _of_layer(by_rank: Mapping[int, Layers], key: tuple[int, int]) -> Iterator[_RowFinding]:
    holders = {rank: layers[key] for rank, layers in by_rank.items() if key in layers}
    alike: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for rank, held in holders.items():
        alike[held.shape, held.rows.identity].append(rank)
    groups = sorted(alike.values(), key=lambda ranks: (-len(ranks), len(holders[ranks[0]].repeated), ranks))
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
    """As `dinfer.kv.rows` takes them: int64 [rows, tensors, 1]."""
    digests, tensors = rows.digests
    return torch.frombuffer(digests, dtype=torch.int64).view(-1, tensors, 1).clone()


def _span(start: int, count: int) -> str:
    return numbers_text(range(start, start + count))
