"""Judge: from the ranks' reports, the first thing that differs from the reference, exactly where, and its cause.

Wrong lengths and misplaced rows come before values. Among values the one that a run computes first comes first, since
the others may follow from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from dinfer.kv.difference import KvPlace
from dinfer.kv.measure import CellDifference, Spot
from dinfer.kv.origin import BlockRoute
from dinfer.kv.reference.reports import HIDDEN, Examined, HeldDigests, TensorKey, ToleranceMeasure, keys_of
from dinfer.kv.rows import Misplaced
from dinfer.plan.ops import Op
from dinfer.plan.plan import Plan

CauseKind = Literal["equal", "wire", "compute", "placement", "drift"]


class TensorEvidence(NamedTuple):
    """What is known of one tensor of one block.

    `exact`: it should equal the reference bit for bit, so that every difference counts; otherwise those beyond the
    tolerance do. `differing`, `right`: the ranks that hold it and differ from the reference, and those that hold it and
    do not. `alike`: all of them hold the same bytes. `owner`: the rank that computed it for all; None: each rank
    computed it itself. `made_right`: whether the owner's bytes were the reference's when it had computed them; None:
    unknown. `misplaced`: its rows are other rows.
    """

    exact: bool
    differing: tuple[int, ...]
    right: tuple[int, ...]
    alike: bool
    owner: int | None
    made_right: bool | None = None
    misplaced: bool = False


def counts(evidence: TensorEvidence) -> bool:
    """Whether it differs from the reference, or the ranks differ from one another."""
    return bool(evidence.differing) or evidence.misplaced or not evidence.alike


def kind_of(evidence: TensorEvidence) -> CauseKind:
    """The cause; "equal" unless `counts`.

    Misplaced rows are "placement", whatever put them there. If a rank holds the right bytes, or they were right when
    they were computed, the wire or memory changed them. If no rank holds the right bytes, they were computed wrong; but
    if all ranks agree and another dtype or other chunks may explain the difference, it is "drift".
    """
    if not counts(evidence):
        return "equal"
    if evidence.misplaced:
        return "placement"
    if not evidence.exact and evidence.alike:
        return "drift"
    if evidence.made_right is not None:
        return "wire" if evidence.made_right else "compute"
    if evidence.owner is None or not (evidence.right or not evidence.differing):
        return "compute"
    return "wire"


@dataclass(frozen=True, kw_only=True)
class Deviation(KvPlace):
    """The first thing that is not as the reference has it.

    `rank` holds it, as do all of `ranks`; `right`: the ranks that hold what the reference has; `owner`: the rank that
    computed it by `op`, None where every rank did for itself. `chunk`: the number of chunks for new tokens; `tensor`:
    "K", "V", "KV", "hidden", "final" or "token"; `values`: the rank's and the reference's. `rows`: which rows lie in
    the wrong place; `origin`: how the block came to differ, where the ranks' ledgers say that.
    """

    kind: CauseKind
    ranks: tuple[int, ...]
    right: tuple[int, ...]
    owner: int | None
    chunk: int
    tensor: str
    rows: Misplaced | None = None
    origin: str = ""


@dataclass(frozen=True)
class ReferenceCase:
    """All reports on one run. `helds`: of every rank; `examined`: of those that ran the reference."""

    plan: Plan
    measure: ToleranceMeasure
    helds: Sequence[HeldDigests]
    examined: Sequence[Examined]

    @property
    def first_examined(self) -> Examined:
        return self.examined[0]

    def by_rank(self, rank: int) -> Examined | None:
        return next((one for one in self.examined if one.rank == rank), None)

    # -- one tensor of one block

    def measured(self, rank: int, key: TensorKey) -> CellDifference | None:
        found = self.by_rank(rank)
        return found.measured.get(key) if found else None

    def _digest(self, rank: int, key: TensorKey) -> int | None:
        """Of what the rank holds now."""
        chunk, layer, tensor = key
        if tensor in HIDDEN:
            return self.helds[rank].hidden.get((chunk, layer))
        held = self.helds[rank].now.get((chunk, layer))
        return held and held["KV".index(tensor)]

    def _reference_digest(self, key: TensorKey) -> int | None:
        chunk, layer, tensor = key
        if tensor in HIDDEN:
            return self.first_examined.hidden.get((chunk, layer))
        wanted = self.first_examined.blocks.get((chunk, layer))
        return wanted and wanted["KV".index(tensor)]

    def _is_right(self, rank: int, key: TensorKey) -> bool | None:
        """Whether the rank holds what the reference has; None: it does not hold the block."""
        found = self.measured(rank, key)
        if found is not None:
            return self.measure.share(key[1], found) <= 1
        digest = self._digest(rank, key)
        if digest is None:
            return None
        if self.measure.exact:  # the rank did not run the reference: it holds the same bytes
            return digest == self._reference_digest(key)
        # or the same bytes as the first one
        first = self.first_examined.measured.get(key)
        return first is None or self.measure.share(key[1], first) <= 1

    def evidence(self, key: TensorKey) -> TensorEvidence:
        chunk, layer, tensor = key
        ranks = range(len(self.helds))
        held = {rank: is_right for rank in ranks if (is_right := self._is_right(rank, key)) is not None}
        differing = tuple(rank for rank, is_right in held.items() if not is_right)
        right = tuple(rank for rank, is_right in held.items() if is_right)
        digests = {digest for rank in held if (digest := self._digest(rank, key)) is not None}
        misplaced = any(self._misplaced(rank, key) for rank in differing)
        alike = len(digests) < 2 and not (tensor in HIDDEN and right and differing)
        owner = self.owner(chunk, layer, tensor)
        return TensorEvidence(
            self.measure.exact, differing, right, alike, owner, self._made_right(key), misplaced
        )

    def owner(self, chunk: int, layer: int, tensor: str = "K") -> int | None:
        """The rank that computed it; for the input of a layer, the one that computed the layer before."""
        shape = self.plan.shape
        if chunk >= len(shape.chunks):
            return None
        return shape.owners[min(max(layer - (tensor in HIDDEN), 0), shape.layers - 1)]

    def _made_right(self, key: TensorKey) -> bool | None:
        chunk, layer, tensor = key
        owner = self.owner(chunk, layer)
        if owner is None or tensor in HIDDEN:
            return None
        made, wanted = self.helds[owner].noted.get((chunk, layer)), self._reference_digest(key)
        return made.came["KV".index(tensor)] == wanted if made and wanted is not None else None

    def _misplaced(self, rank: int, key: TensorKey) -> Misplaced | None:
        """The first finding on rows of that block."""
        chunk, layer, tensor = key
        found, rows = self.by_rank(rank), self._rows(chunk)
        for one in found.misplaced.get(layer, []) if found else []:
            if one.start < rows.stop and one.stop > rows.start and tensor in one.tensors:
                return one
        return None

    def _rows(self, chunk: int) -> range:
        chunks = self.plan.shape.chunks
        new = range(chunks[-1].stop, self.first_examined.rows)
        return chunks[chunk] if chunk < len(chunks) else new

    # -- the first

    def first(self) -> Deviation | None:
        """None: nothing differs by more than the tolerance."""
        return self._by_length() or self._by_value() or self._by_choice()

    def _by_length(self) -> Deviation | None:
        wrong = [one for one in self.helds if one.held != one.due]
        if not wrong:
            return None
        rank = wrong[0].rank
        layer = next(
            n for n, (held, due) in enumerate(zip(wrong[0].held, wrong[0].due, strict=True)) if held != due
        )
        found = self.by_rank(rank) or self.first_examined
        rows = next(
            (one for one in found.misplaced.get(layer, []) if one.kind in ("repeated", "stale")), None
        )
        token = rows.start if rows else wrong[0].due[layer]
        chunk = self.chunk_of(rows.source if rows else token - 1)
        right = tuple(one.rank for one in self.helds if one not in wrong)
        ranks = tuple(one.rank for one in wrong)
        owner = self.owner(chunk, layer)
        return Deviation(
            kind="placement", rank=rank, ranks=ranks, right=right, owner=owner, layer=layer, chunk=chunk, tensor="KV",
            token=token, rows=rows, op=self.op_of(chunk, layer),
        )  # fmt: skip

    def _by_value(self) -> Deviation | None:
        for key in keys_of(self.helds, self.examined):
            evidence = self.evidence(key)
            if counts(evidence):
                return self._deviation(key, evidence)
        return None

    def _by_choice(self) -> Deviation | None:
        """Everything computed is the same, but the run chose another token."""
        if not self.measure.exact or not self.first_examined.choices:
            return None
        one, ranks = self.first_examined.choices[0], tuple(range(len(self.helds)))
        values = float(one.token), float(one.reference)
        chunk = len(self.plan.shape.chunks)
        token = self.plan.shape.tokens + one.position
        return Deviation(
            kind="compute", rank=0, ranks=ranks, right=(), owner=None, layer=self.plan.shape.layers, chunk=chunk,
            tensor="token", token=token, values=values,
        )  # fmt: skip

    def _deviation(self, key: TensorKey, evidence: TensorEvidence) -> Deviation:
        chunk, layer, tensor = key
        rank = self._nearest(evidence, key)
        spot = self._spot(rank, key)
        index = spot.at if spot else ()
        head = index[1] if len(index) == 3 else None
        return Deviation(
            kind=kind_of(evidence), rank=rank, ranks=evidence.differing or (rank,), right=evidence.right,
            owner=evidence.owner, layer=layer, chunk=chunk, tensor=tensor,
            head=head,
            token=index[0] if index else None,
            dim=index[-1] if index else None,
            values=(spot.mine, spot.theirs) if spot else None,
            op=self.op_of(chunk, layer if tensor not in HIDDEN else layer - 1),
            rows=self._misplaced(rank, key),
            origin=self._origin(rank, key),
        )  # fmt: skip

    def _nearest(self, evidence: TensorEvidence, key: TensorKey) -> int:
        """Of the ranks that differ, the owner, or the first one after it."""
        differing = [r for r in evidence.differing if self.measured(r, key)] or list(evidence.differing)
        if not differing:  # all are within tolerance, but not alike
            owned = self._digest(evidence.owner or 0, key)
            differing = [r for r in range(len(self.helds)) if self._digest(r, key) not in (None, owned)]
        start = evidence.owner or 0
        return min(differing, key=lambda rank: (rank - start) % len(self.helds))

    def _spot(self, rank: int, key: TensorKey) -> Spot | None:
        found = self.measured(rank, key) or self.first_examined.measured.get(key)
        if found is None:
            return None
        return found.first if self.measure.exact else found.largest

    def _origin(self, rank: int, key: TensorKey) -> str:
        """How the block came to differ on that rank, if its ledger says that it was right or announced otherwise."""
        chunk, layer, tensor = key
        if tensor in HIDDEN or chunk >= len(self.plan.shape.chunks):
            return ""
        now, noted = self.helds[rank].now.get((chunk, layer)), self.helds[rank].noted.get((chunk, layer))
        index = "KV".index(tensor)
        if not now or not noted or noted.announced[index] == noted.came[index] == now[index]:
            return ""
        every_noted = {one.rank: one.noted[chunk, layer] for one in self.helds if (chunk, layer) in one.noted}
        every_now = {one.rank: one.now[chunk, layer] for one in self.helds if (chunk, layer) in one.now}
        return BlockRoute(self.plan).origin(rank, chunk, layer, every_noted, every_now).text

    def chunk_of(self, token: int) -> int:
        """The chunk of a row; the number of chunks for those of new tokens."""
        chunks = self.plan.shape.chunks
        return next((n for n, rows in enumerate(chunks) if token in rows), len(chunks))

    def op_of(self, chunk: int, layer: int) -> str:
        """The owner's op that computed the block."""
        owner = self.owner(chunk, layer)
        ops = (op for lane in self.plan.lanes[owner] for op in lane.ops) if owner is not None else ()
        return next((str(op) for op in ops if _computes(op, chunk, layer)), "")


def _computes(op: Op, chunk: int, layer: int) -> bool:
    kind = "embed" if layer < 0 else "layer"
    return op.kind == kind and op.chunk == chunk and (layer < 0 or op.layer == layer)
