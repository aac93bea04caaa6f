"""Detail: from a block that is wrong to the rows, and from those to the values: each fetched only where it differs."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dinfer.kv.difference import Difference
from dinfer.kv.digests import row_digests
from dinfer.kv.origin import Origin
from dinfer.kv.rows import Finding, concerned, identify
from dinfer.kv.source import Side, Subject, chunk_of

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_NAMES: tuple[Literal["K"], Literal["V"]] = ("K", "V")


class WrongBlock(NamedTuple):
    """A wrong block: on one side what is there, on the other what should be; None where nobody holds it any more, but
    the ledger of rank `maker` has its rows' digests. `span` is an index into the subject's; `hops`: how many the block
    has come."""

    side: Side
    right: Side | None
    maker: int
    layer: int
    span: int
    places: range
    origin: Origin
    hops: int


class Details:
    """The differences of any number of cases. `limit`: of how many tokens, in all cases together, values are fetched;
    None: of all. `known`: cells of a rank's layer, by (name, layer), that are explained already."""

    def __init__(self, limit: int | None, known: dict[tuple[str, int], Tensor]) -> None:
        self.rows = self.unfetched = 0
        self.values: dict[str, int] = {}
        """how many values are known to differ, by whose they are"""
        self._left, self._known = limit, known
        self._read: dict[tuple[int, int, int, range], Tensor] = {}

    def of(self, case: WrongBlock) -> list[Difference]:
        got, want = self._both(case)
        if want is None:
            return [
                _difference(case, None, note="nobody holds these rows, and no ledger knows their digests")
            ]
        places = range(case.places.start, case.places.start + min(len(got), len(want)))
        got, want = got[: len(places)], want[: len(places)]
        known = self._known.get((case.side.name, case.layer))
        skip = None if known is None else _padded(known, places)
        found = identify(
            got, want, places.start, lambda: self._before(case), _zero(case.side.source.subject), skip
        )
        differences = [one for finding in found.findings for one in self._of_rows(case, finding)]
        return differences + self._of_values(case, places, found.left)

    # -- rows

    def _both(self, case: WrongBlock) -> tuple[Tensor, Tensor | None]:
        got = self._rows(case.side, case.layer, case.places)
        if case.right:
            return got, self._rows(case.right, case.layer, case.places)
        return got, case.side.source.noted_rows(case.maker, case.span, case.layer)

    def _rows(self, side: Side, layer: int, places: range) -> Tensor:
        key = (id(side.source), side.rank, layer, places)
        if key not in self._read:
            self._read[key] = side.source.rows(side.rank, layer, places)
        return self._read[key]

    def _before(self, case: WrongBlock) -> tuple[int, Tensor]:
        """The block before: its first place, and its rows as they should be, or else as they are."""
        spans = case.side.source.subject.spans
        places = spans[case.span - 1] if case.span else range(0)
        return places.start, self._rows(case.right or case.side, case.layer, places)

    def _of_rows(self, case: WrongBlock, finding: Finding) -> list[Difference]:
        self.rows += int(finding.cells.sum())
        subject, at = case.side.source.subject, f"layer {case.layer}, {_block_text(case)}"
        note = f"{case.side.name}, {at}: {finding.text}"
        found = []
        for tensor in (0, 1):
            cells = finding.cells[:, tensor]
            if cells.any():
                heads = cells.any(0).nonzero().flatten().tolist()
                token = case.places.start + concerned(finding.cells[:, tensor : tensor + 1])[0]
                found.append(
                    _difference(
                        case, token, tensor=_NAMES[tensor], head=heads[0] if len(heads) == 1 else None,
                        kind=finding.kind, rows=int(cells.sum()), note=note, label=_label(subject, token),
                    )
                )  # fmt: skip
        return found

    # -- values

    def _of_values(self, case: WrongBlock, places: range, left: Tensor) -> list[Difference]:
        self.rows += int(left.sum())
        tokens = [places.start + n for n in concerned(left)]
        fetched = tokens if self._left is None else tokens[: self._left]
        if not _has_values(case):
            fetched = []
        if self._left is not None:
            self._left -= len(fetched)
        found = self._fetched(case, fetched, left[[token - places.start for token in fetched]])
        rest = left.clone()
        rest[[token - places.start for token in fetched]] = False
        if _has_values(case):
            self.unfetched += int(rest.sum())
        return found + self._by_digest(case, places, rest)

    def _fetched(self, case: WrongBlock, tokens: Sequence[int], cells: Tensor) -> list[Difference]:
        if not tokens or case.right is None:
            return []
        mine = case.side.source.values(case.side.rank, case.layer, tokens)
        theirs = case.right.source.values(case.right.rank, case.layer, tokens)
        differs = _bits(mine) != _bits(theirs)
        found = []
        for n, tensor, head in cells.nonzero().tolist():
            dims = differs[n, tensor, head].nonzero().flatten().tolist()
            self.values[case.side.name] = self.values.get(case.side.name, 0) + len(dims)
            dim = dims[0] if dims else None
            pair = None if dim is None else tuple(float(one[n, tensor, head, dim]) for one in (mine, theirs))
            found.append(
                _difference(
                    case, tokens[n], tensor=_NAMES[tensor], head=head, dim=dim, values=pair,
                    count=len(dims), label=_label(case.side.source.subject, tokens[n]),
                )
            )  # fmt: skip
        return found

    def _by_digest(self, case: WrongBlock, places: range, cells: Tensor) -> list[Difference]:
        """Rows whose values are not fetched: one difference for all of them, of K and of V."""
        found = []
        for tensor in (0, 1):
            rows = cells[:, tensor].nonzero().tolist()
            if rows:
                token, head = places.start + rows[0][0], rows[0][1]
                note = f"and {len(rows) - 1} rows more of this block" if len(rows) > 1 else ""
                note = "; ".join(filter(None, [note, _why_no_values(case)]))
                found.append(
                    _difference(
                        case, token, tensor=_NAMES[tensor], head=head, rows=len(rows), note=note,
                        label=_label(case.side.source.subject, token),
                    )
                )  # fmt: skip
        return found


def _difference(
    case: WrongBlock,
    token: int | None,
    *,
    tensor: Literal["K", "V"] | None = None,
    head: int | None = None,
    dim: int | None = None,
    values: tuple[float, ...] | None = None,
    count: int | None = None,
    kind: str = "value",
    rows: int = 1,
    note: str = "",
    label: str = "",
) -> Difference:
    subject = case.side.source.subject
    return Difference(
        rank=case.side.rank, layer=case.layer, chunk=chunk_of(subject, case.span), tensor=tensor, head=head,
        token=token, dim=dim, values=(values[0], values[1]) if values else None, op=case.origin.op,
        kind=kind,  # type: ignore[arg-type] # a Finding's, or the default
        where=case.origin.where, rows=rows, count=count, name=case.side.name, label=label, note=note,
        came=case.origin.text, hops=case.hops, dtype=subject.dtype,
    )  # fmt: skip


def _has_values(case: WrongBlock) -> bool:
    sides = [case.side, case.right]
    return all(side is not None and side.source.has_values(case.layer) for side in sides)


def _why_no_values(case: WrongBlock) -> str:
    if case.right is None:
        return 'no rank holds what was computed: run.compare("reference")'
    return "" if _has_values(case) else "its values were not saved"


def _block_text(case: WrongBlock) -> str:
    chunk = chunk_of(case.side.source.subject, case.span)
    return "new tokens" if chunk is None else f"chunk {chunk}"


def _label(subject: Subject, token: int) -> str:
    return subject.texts[token].strip() if token < len(subject.texts) else ""


def _padded(known: Tensor, places: range) -> Tensor:
    """Of a layer's cells, those in these places; none are known behind their end."""
    cells = torch.zeros((len(places), *known.shape[1:]), dtype=torch.bool)
    part = known[places.start : places.stop]
    cells[: len(part)] = part
    return cells


def _zero(subject: Subject) -> int:
    """The digest of a row of zeros."""
    return int(row_digests(torch.zeros(1, 1, 1, subject.head_dim, dtype=subject.dtype)))


def _bits(values: Tensor) -> Tensor:
    return values.contiguous().view(_INTEGERS[values.element_size()])
