"""Judge: from the ranks' reports, the first thing that differs from the reference, exactly where, and its cause.

Wrong lengths and misplaced rows come before values. Among values the one that a run computes first comes first, since
the others may follow from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import Literal, NamedTuple

from dinfer.kv.difference import KvPlace
from dinfer.kv.measure import CellDifference
from dinfer.kv.origin import BlockRoute
from dinfer.kv.reference.reports import (
    HIDDEN,
    Examined,
    HeldDigests,
    TensorKey,
    ToleranceMeasure,
    digest_at,
    keys_of,
)
from dinfer.kv.rows import Misplaced
from dinfer.plan.plan import Plan

CauseKind = Literal["equal", "wire", "compute", "placement", "drift"]


class TensorEvidence(NamedTuple):
    """What is known of one tensor of one block. `exact`: it should equal the reference bit for bit, so that every
    difference counts; otherwise those beyond the tolerance do. `differing`, `right`: the ranks that hold it and differ
    from the reference, and those that hold it and do not. `alike`: all of them hold the same bytes. `owner`: the rank
    that computed it for all; None: each rank computed it itself. `made_right`: whether the owner's bytes were the
    reference's when it had computed them; None: unknown. `misplaced`: its rows are other rows."""

    exact: bool
    differing: tuple[int, ...]
    right: tuple[int, ...]
    alike: bool
    owner: int | None
    made_right: bool | None = None
    misplaced: bool = False

    @property
    def kind(self) -> CauseKind:
        """The cause; "equal" unless it differs from the reference, or the ranks differ from one another.

        Misplaced rows are "placement", whatever put them there. If a rank holds the right bytes, or they were right
        when they were computed, the wire or memory changed them. If no rank holds the right bytes, they were computed
        wrong; but if all ranks agree and another dtype or other chunks may explain the difference, it is "drift".
        """
        if not self.differing and not self.misplaced and self.alike:
            return "equal"
        if self.misplaced:
            return "placement"
        if not self.exact and self.alike:
            return "drift"
        if self.made_right is not None:
            return "wire" if self.made_right else "compute"
        if self.owner is None or not (self.right or not self.differing):
            return "compute"
        return "wire"


@dataclass(frozen=True, kw_only=True)
class Deviation(KvPlace):
    """The first thing that is not as the reference has it. `rank` holds it, as do all of `ranks`; `right`: the ranks
    that hold what the reference has; `owner`: the rank that computed it by `op`, None where every rank did for itself.
    `chunk`: the number of chunks for new tokens; `tensor`: "K", "V", "KV", "hidden", "final" or "token"; `values`: the
    rank's and the reference's. `rows`: which rows lie in the wrong place; `origin`: how the block came to differ, where
    the ranks' ledgers say that."""

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
    """All reports on one run. `tokens`: its new ones; `helds`: of every rank; `examined`: of those that ran the
    reference."""

    plan: Plan
    tokens: Sequence[int]
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
        return digest_at(self.helds[rank].now, self.helds[rank].hidden, key)

    def _reference_digest(self, key: TensorKey) -> int | None:
        return digest_at(self.first_examined.blocks, self.first_examined.hidden, key)

    def _is_right(self, rank: int, key: TensorKey) -> bool | None:
        """Whether the rank holds what the reference has; None: it does not hold the block."""
        found, digest = self.measured(rank, key), self._digest(rank, key)
        if found is None and digest is None:
            return None
        if found is None and self.measure.exact:  # it did not run the reference: it holds the same bytes
            return digest == self._reference_digest(key)
        found = found or self.first_examined.measured.get(key)  # or the same bytes as the first one
        return found is None or self.measure.share(key[1], found) <= 1

    def evidence(self, key: TensorKey) -> TensorEvidence:
        chunk, layer, tensor = key
        ranks = range(len(self.helds))
        held = {rank: is_right for rank in ranks if (is_right := self._is_right(rank, key)) is not None}
        differing = tuple(rank for rank, is_right in held.items() if not is_right)
        right = tuple(rank for rank, is_right in held.items() if is_right)
        digests = {self._digest(rank, key) for rank in held} - {None}
        owner, made_right = self.owner(chunk, layer, tensor), None
        if owner is not None and tensor not in HIDDEN:
            made, wanted = self.helds[owner].noted.get((chunk, layer)), self._reference_digest(key)
            if made and wanted is not None:
                made_right = made.came["KV".index(tensor)] == wanted
        alike = len(digests) < 2 and not (tensor in HIDDEN and right and differing)
        misplaced = any(self._misplaced(rank, key) for rank in differing)
        return TensorEvidence(self.measure.exact, differing, right, alike, owner, made_right, misplaced)

    def owner(self, chunk: int, layer: int, tensor: str = "K") -> int | None:
        """The rank that computed it; for the input of a layer, the one that computed the layer before."""
        shape = self.plan.shape
        if chunk >= len(shape.chunks):
            return None
        return shape.owners[min(max(layer - (tensor in HIDDEN), 0), shape.layers - 1)]

    def _misplaced(self, rank: int, key: TensorKey) -> Misplaced | None:
        """The first finding on rows of that block."""
        chunk, layer, tensor = key
        found, chunks = self.by_rank(rank), self.plan.shape.chunks
        new = range(chunks[-1].stop, self.first_examined.report.rows)
        rows = chunks[chunk] if chunk < len(chunks) else new
        for one in found.misplaced.get(layer, []) if found else []:
            if one.start < rows.stop and one.stop > rows.start and tensor in one.tensors:
                return one
        return None

    # -- the first

    def first(self) -> Deviation | None:
        """None: nothing differs by more than the tolerance."""
        if wrong := [one for one in self.helds if one.held != one.due]:
            return self._of_length(wrong)
        for key in keys_of(self.helds, self.examined):
            evidence = self.evidence(key)
            if evidence.kind != "equal":
                return self._deviation(key, evidence)
        if not self.measure.exact or not self.first_examined.choices:
            return None
        # everything computed is the same, but the run chose another token
        one, shape = self.first_examined.choices[0], self.plan.shape
        return Deviation(
            kind="compute", rank=0, ranks=tuple(range(len(self.helds))), right=(), owner=None, layer=shape.layers,
            chunk=len(shape.chunks), tensor="token", token=shape.tokens + one.position,
            values=(float(one.token), float(one.reference)),
        )  # fmt: skip

    def others(self, first: Deviation) -> list[Deviation]:
        """The first thing that is wrong in each other block and does not follow from `first`: bytes that changed on the
        wire or in memory, and the first NaN or Inf if `first` is none."""
        found = dict[tuple[int, int], Deviation]()
        has_nan = first.values is not None and not all(map(isfinite, first.values))
        for key in keys_of(self.helds, self.examined):
            block = key[:2]
            if key[2] not in ("K", "V") or block == (first.chunk, first.layer) or block in found:
                continue
            evidence, is_nan = self.evidence(key), not has_nan and self._has_nan(key)
            if (self.measure.exact and evidence.kind == "wire") or is_nan:
                found[block] = self._deviation(key, evidence)
                has_nan |= is_nan
        return list(found.values())

    def _has_nan(self, key: TensorKey) -> bool:
        """Whether a rank holds NaN or Inf there where the reference has numbers."""
        return any(one.measured[key].absolute == inf for one in self.examined if key in one.measured)

    def _of_length(self, wrong: Sequence[HeldDigests]) -> Deviation:
        """Layers of these ranks have too many rows or too few."""
        one, chunks = wrong[0], self.plan.shape.chunks
        layer = next(n for n, (held, due) in enumerate(zip(one.held, one.due, strict=True)) if held != due)
        found = self.by_rank(one.rank) or self.first_examined
        named = [row for row in found.misplaced.get(layer, []) if row.kind in ("repeated", "stale")]
        rows = named[0] if named else None
        token = rows.start if rows else one.due[layer]
        at = rows.source if rows else token - 1
        chunk = next((n for n, span in enumerate(chunks) if at in span), len(chunks))
        return Deviation(
            kind="placement", rank=one.rank, ranks=tuple(held.rank for held in wrong),
            right=tuple(held.rank for held in self.helds if held not in wrong), owner=self.owner(chunk, layer),
            layer=layer, chunk=chunk, tensor="KV", token=token, rows=rows, op=self._op(chunk, layer),
        )  # fmt: skip

    def _deviation(self, key: TensorKey, evidence: TensorEvidence) -> Deviation:
        chunk, layer, tensor = key
        rank = self._nearest(evidence, key)
        found = self.measured(rank, key) or self.first_examined.measured.get(key)
        spot = found and (found.first if self.measure.exact else found.largest)
        index = spot.at if spot else ()
        return Deviation(
            kind=evidence.kind, rank=rank, ranks=evidence.differing or (rank,), right=evidence.right,
            owner=evidence.owner, layer=layer, chunk=chunk, tensor=tensor,
            head=index[1] if len(index) == 3 else None, token=index[0] if index else None,
            dim=index[-1] if index else None, values=(spot.mine, spot.theirs) if spot else None,
            op=self._op(chunk, layer - (tensor in HIDDEN)), rows=self._misplaced(rank, key),
            origin=self._origin(rank, key),
        )  # fmt: skip

    def _nearest(self, evidence: TensorEvidence, key: TensorKey) -> int:
        """Of the ranks that differ, the owner, or the first one after it."""
        start = evidence.owner or 0
        differing = [r for r in evidence.differing if self.measured(r, key)] or list(evidence.differing)
        if not differing:  # all are within tolerance, but not alike
            alike = (None, self._digest(start, key))
            differing = [r for r in range(len(self.helds)) if self._digest(r, key) not in alike]
        return min(differing, key=lambda rank: (rank - start) % len(self.helds))

    def _origin(self, rank: int, key: TensorKey) -> str:
        """How the block came to differ on that rank, if its ledger says that it was right or announced otherwise."""
        chunk, layer, tensor = key
        if tensor in HIDDEN or chunk >= len(self.plan.shape.chunks):
            return ""
        now = {one.rank: one.now[chunk, layer] for one in self.helds if (chunk, layer) in one.now}
        noted = {one.rank: one.noted[chunk, layer] for one in self.helds if (chunk, layer) in one.noted}
        if rank not in now or rank not in noted:
            return ""
        index = "KV".index(tensor)
        if noted[rank].announced[index] == noted[rank].came[index] == now[rank][index]:
            return ""
        return BlockRoute(self.plan).origin(rank, chunk, layer, noted, now).text

    def _op(self, chunk: int, layer: int) -> str:
        """The op that computed the block; "" for the norm, and for new tokens, which every rank computes for itself."""
        if chunk >= len(self.plan.shape.chunks) or layer >= self.plan.shape.layers:
            return ""
        return f"layer c{chunk} l{layer}" if layer >= 0 else f"embed c{chunk}"
