"""The result of a comparison of what ranks have computed with the reference: where they first differ, and why."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dinfer.display import Composed, Displayable, Table, Tidy
from dinfer.kv.reference.judge import CauseKind
from dinfer.kv.rows import places_text
from dinfer.severity import Severity
from dinfer.tabular import TableRow, Tabular
from dinfer.verdict.where import ranks_text
from dinfer.watch.probe.tensors import HIDDEN, OUTPUT
from dinfer.watching.taken import AFTER_ALL, LOGITS, ORDER, Rows, TapKey


class RowDeviation(NamedTuple):
    """Where a rank first differs from the reference.

    `ranks`: those that differ there; `right`: those that have the reference's row; `difference`: about how far the row
    lies from the reference's, as a share of that one's length, NaN if unknown; `tolerated`: what rounding explains of
    it; `source`: the token whose row it is, if it is another's.
    """

    kind: Literal["wire", "compute", "placement"]
    ranks: tuple[int, ...]
    right: tuple[int, ...]
    chunk: int
    layer: int
    tensor: str
    token: int
    difference: float
    tolerated: float
    source: int | None


class ComparedRows(NamedTuple):
    """One tensor of one rank beside the reference, row by row: `share` is the difference as a share of the length."""

    rank: int
    key: TapKey
    start: int
    changed: Tensor
    share: Tensor
    tolerated: float

    @property
    def wrong(self) -> Tensor:
        return self.changed & ~(self.share <= self.tolerated)

    def only(self, is_attended: Sequence[bool]) -> "ComparedRows":
        """Without what differs in rows of padding, which nobody uses."""
        keep = torch.tensor(is_attended[self.start : self.start + len(self.share)])
        share = torch.where(keep, self.share, torch.zeros_like(self.share))
        return self._replace(changed=self.changed & keep, share=share)

    def has(self, row: int) -> bool:
        return self.start <= row < self.start + len(self.share)


class WatchedComparison(Tidy, Tabular, Composed):
    """What `watch.compare("reference")` returns. `first`: the first place where a rank differs from the reference by
    more than rounding explains, None if there is none; `not_compared`: names of taps that the reference does not
    have."""

    INTERNAL = frozenset({"severity"})

    def __init__(
        self,
        compared: Sequence[ComparedRows],
        tensors: Mapping[int, Mapping[TapKey, Sequence[Rows]]],
        reference: Mapping[TapKey, Rows],
        pieces: Sequence[range],
        about: str,
        not_compared: Sequence[str],
    ) -> None:
        self._compared, self._tensors, self._reference = compared, tensors, reference
        self._pieces, self._about, self.not_compared = pieces, about, list(not_compared)
        self.first: RowDeviation | None = self._first(lambda one: one.wrong)

    @property
    def equal(self) -> bool:
        """Whether all that was compared is the reference's, bit for bit."""
        return not any(bool(one.changed.any()) for one in self._compared)

    @property
    def within_tolerance(self) -> bool:
        return self.first is None

    @property
    def kind(self) -> CauseKind:
        """ "equal"; "wire": bytes changed on the wire or in memory; "compute": they were computed wrong; "placement":
        rows lie where others should; "drift": rounding explains all differences."""
        if self.first:
            return self.first.kind
        return "equal" if self.equal else "drift"

    @property
    def severity(self) -> Severity:
        return Severity.OK if self.within_tolerance else Severity.ERROR

    @property
    def verdict(self) -> str:
        """One sentence."""
        who = ranks_text(sorted({one.rank for one in self._compared}))
        if self.equal:
            return f"equal: {who} computed what transformers' own forward makes, bit for bit"
        if self.first is None:
            furthest = max(self._compared, key=lambda one: float(one.share.max()) / one.tolerated)
            part = float(furthest.share.max()) / furthest.tolerated
            place = _place_text(furthest.key[1], furthest.key[2])
            return (
                f"within tolerance: what {who} computed differs from the reference by at most {part:.2g} of what "
                f"rounding explains ({place})"
            )
        words = {
            "wire": "the wire or memory changed bytes",
            "compute": "the compute differs",
            "placement": "placement is wrong",
        }
        return f"{words[self.first.kind]}: {self._text(self.first)}"

    def table(self) -> Table:
        """The largest difference of each layer and tensor on any rank, as a share of the row's length."""
        layers = sorted({one.key[1] for one in self._compared})
        names = [name for name in ORDER if any(one.key[2] == name for one in self._compared)]
        lines = []
        for layer in layers:
            mine = [one for one in self._compared if one.key[1] == layer]
            shares = {name: [float(one.share.max()) for one in mine if one.key[2] == name] for name in names}
            cells = [f"{max(shares[name]):.2g}" if shares[name] else "–" for name in names]
            lines.append(["end" if layer == AFTER_ALL else layer, *cells, f"{mine[0].tolerated:.2g}"])
        return Table(["layer", *names, "tolerated"], lines, about=ABOUT_COLUMNS)

    def _tabulated(self) -> tuple[Sequence[str], Iterable[TableRow]]:
        return self.table()._tabulated()

    def _parts(self) -> Iterable[str | Displayable]:
        lines = [self.verdict, self._about, self._extent()]
        if not self.equal and self.first is None and (bits := self._first(lambda one: one.changed)):
            lines.append(f"bit for bit, the first that differs is {self._where(bits)}")
        yield "\n".join(lines)
        if not self.equal:
            yield self.table()

    def _extent(self) -> str:
        names = [name for name in ORDER if any(one.key[2] == name for one in self._compared)]
        layers = sorted({one.key[1] for one in self._compared} - {AFTER_ALL})
        rows = sum(len(one.share) for one in self._compared)
        text = f"compared: {', '.join(names)} of {len(layers)} layers, {rows:,} rows"
        return text + (f"; not compared: {', '.join(self.not_compared)}" if self.not_compared else "")

    # -- the first deviation

    def _first(self, which: Callable[[ComparedRows], Tensor]) -> RowDeviation | None:
        """The first in the order of computing: by piece, layer, tensor and token."""
        found: list[tuple[tuple[int, int, int, int], ComparedRows, int]] = []
        for one in self._compared:
            places = which(one).nonzero().flatten()
            if len(places):
                row = one.start + int(places[0])
                token = self._pieces[row].stop - 1 if one.key[2] == LOGITS else row
                found.append(((self._piece(token), one.key[1], ORDER.index(one.key[2]), token), one, row))
        if not found:
            return None
        order, one, row = min(found, key=lambda each: (each[0], each[1].rank))
        ranks = {other.rank for at, other, _ in found if at == order and other.key == one.key}
        right = tuple(
            sorted(
                {other.rank for other in self._compared if other.key == one.key and other.has(row)} - ranks
            )
        )
        source = self._source(one, row)
        return RowDeviation(
            self._kind(one, row, right, source), tuple(sorted(ranks)), right, order[0], one.key[1], one.key[2],
            order[3], float(one.share[row - one.start]), one.tolerated, source,
        )  # fmt: skip

    def _kind(
        self, one: ComparedRows, row: int, right: Sequence[int], source: int | None
    ) -> Literal["wire", "compute", "placement"]:
        sequence, layer, tensor = one.key
        if source is not None:
            return "placement"
        made_by = (sequence, layer - 1, OUTPUT)
        is_made = any(other.key == made_by and other.has(row) for other in self._compared)
        # What made it comes before in the order, so it is right.
        return "wire" if right or (tensor == HIDDEN and is_made) else "compute"

    def _source(self, one: ComparedRows, row: int) -> int | None:
        """The token of the reference whose row this is, bit for bit."""
        for part in self._tensors[one.rank][one.key] if one.key[2] != LOGITS else ():
            if part.start <= row < part.stop:
                mine, theirs = part.digests[row - part.start], self._reference[one.key]
                places = (theirs.digests == mine).nonzero().flatten()
                if len(places) and part.dtype == theirs.dtype:
                    return theirs.start + int(places[0])
        return None

    def _piece(self, token: int) -> int:
        return next((n for n, piece in enumerate(self._pieces) if token in piece), len(self._pieces))

    def _where(self, one: RowDeviation) -> str:
        return f"{_place_text(one.layer, one.tensor)}, chunk {one.chunk}, token {one.token}, on {ranks_text(one.ranks)}"

    def _text(self, one: RowDeviation) -> str:
        if one.source is not None:
            return f"{self._where(one)}: it holds what belongs to {places_text([one.source])}"
        how = "by an unknown amount: only digests were taken, a watch with compare=True takes more"
        if not math.isnan(one.difference):
            how = (
                f"about {one.difference:.2g} of its length from the reference's, where rounding explains "
                f"{one.tolerated:.2g}"
            )
        beside = ""
        if one.kind == "wire" and one.right:
            has = "has" if len(one.right) == 1 else "have"
            beside = f"; {ranks_text(one.right)} {has} the reference's"
        elif one.kind == "wire":
            beside = f"; what left layer {one.layer - 1} is the reference's"
        return f"{self._where(one)}: {how}{beside}"


ABOUT_COLUMNS = {
    HIDDEN: "what enters the layer: its largest difference from the reference, as a share of the row's length",
    OUTPUT: "what leaves the layer",
    "tolerated": "up to this share is what rounding explains",
}


def _place_text(layer: int, tensor: str) -> str:
    if layer == AFTER_ALL:
        return tensor
    return {HIDDEN: f"what enters layer {layer}", OUTPUT: f"what leaves layer {layer}"}.get(
        tensor, f"layer {layer}, {tensor}"
    )
