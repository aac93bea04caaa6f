"""Comparison: what `run.compare` returns. The first line of its text is the verdict, in one sentence."""

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch

from dinfer.display import Composed, Displayable, Table, Tidy, numbers_text
from dinfer.kv.measure import CellDifference
from dinfer.kv.reference.judge import CauseKind, Deviation, ReferenceCase
from dinfer.kv.reference.reports import FINAL, HIDDEN, TensorKey
from dinfer.model.tolerance import CONFIDENCE, ROUNDINGS, UNIT_ROUNDOFF
from dinfer.severity import Severity
from dinfer.tabular import TableRow, Tabular

TENSORS = ("hidden", "K", "V")

ABOUT_COLUMNS = {
    "hidden abs": "largest absolute difference of the hidden state that enters the layer",
    "K abs": "largest absolute difference in K",
    "V abs": "largest absolute difference in V",
    "rel": "largest difference relative to the larger of the two values",
    "of largest": "largest difference as a share of the largest value of its block",
    "tolerated": "up to this share is what rounding explains; 0: every bit counts",
}
"""what the columns of the table mean"""


FIGURES = [f"{name}{kind}" for name in TENSORS for kind in ("", "_relative", "_share")]
"""of a row of a comparison, beside its layer, chunk and tolerance"""


class Comparison(Tidy, Tabular, Composed):
    """What `run.compare("reference")` returns: a run compared with transformers' own forward of the same checkpoint.
    `chunked`: the forward was fed the run's chunks; `edited`: what the user has changed in the run; `first`: the first
    place where they differ beyond what is tolerated, None if there is none; `texts`: the text of each token, empty
    without a tokenizer.

    `loss`: what the run's codec changes, where that is lossy: the reference's K and V go through it too, so that all
    else that differs is a fault.

    `at_once`: beside it, the comparison with the prompt fed at once, where the checkpoint's rotary angles may depend on
    how much is fed: the reference in chunks would then be wrong in the same way as the run.
    """

    INTERNAL = frozenset({"case"})

    def __init__(
        self,
        case: ReferenceCase,
        *,
        chunked: bool,
        edited: Sequence[str],
        texts: Sequence[str],
        codec: str = "none",
    ) -> None:
        self.case, self.chunked, self.edited, self._texts = case, chunked, tuple(edited), texts
        self.first: Deviation | None = case.first()
        self.at_once: Comparison | None = None
        self.loss = case.first_examined.loss(codec, len(case.tokens))

    @property
    def kind(self) -> CauseKind:
        """ "equal"; "wire": bytes changed on the wire or in memory; "compute": they were computed wrong; "placement":
        rows lie where others should; "drift": due to another dtype or other chunks, within tolerance or not."""
        if self.first:
            return self.first.kind
        return "equal" if self.equal else "drift"

    @cached_property
    def equal(self) -> bool:
        """Whether all ranks hold what the reference has, bit for bit."""
        changed = any(found.changed for _, found in self._measured())
        return not self.first and not changed and self.case.measure.dtype == self.case.measure.reference

    @cached_property
    def within_tolerance(self) -> bool:
        """Whether every value lies within the tolerance (which is 0 bit for bit), and no row is misplaced."""
        share = self.case.measure.share
        large = any(share(key[1], found) > 1 for key, found in self._measured())
        return not large and not (self.first and (self.case.measure.exact or self.first.kind == "placement"))

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """For each layer and chunk, the largest differences on any rank.

        `K`, `V`, `hidden`: absolute; with `_relative`: relative to the larger of the two values; with `_share`:
        relative to the block's largest value, of which `tolerance` is allowed. None: nothing to compare.
        """
        names = FIGURES
        found: dict[tuple[int, int], dict[str, Any]] = {}
        for (chunk, layer, tensor), one in self._measured():
            if tensor == FINAL:
                continue
            tolerance = self.case.measure.of(layer)
            empty = {"layer": layer, "chunk": chunk, **dict.fromkeys(names), "tolerance": tolerance}
            row = found.setdefault((layer, chunk), empty)
            share = one.absolute / one.scale if one.scale else one.absolute
            for kind, value in (("", one.absolute), ("_relative", one.relative), ("_share", share)):
                row[tensor + kind] = max(value, row[tensor + kind] or 0.0)
        return [found[key] for key in sorted(found)]

    @property
    def severity(self) -> Severity:
        if not self.within_tolerance:
            return Severity.ERROR
        return Severity.NOTE if self.loss else Severity.OK

    def table(self) -> Table:
        """A line for each layer: the largest differences in all chunks, and the tolerance."""
        columns = ["layer", *(word for name in TENSORS for word in (f"{name} abs", "rel"))]
        lines = []
        for layer, rows in self._by_layer():
            numbers = [_largest(rows, name + kind) for name in TENSORS for kind in ("", "_relative")]
            numbers += [max(_largest(rows, f"{name}_share") for name in TENSORS), rows[0]["tolerance"]]
            lines.append([layer, *(f"{number:.2g}" for number in numbers)])
        return Table([*columns, "of largest", "tolerated"], lines, about=ABOUT_COLUMNS)

    def _tabulated(self) -> tuple[Sequence[str], Iterable[TableRow]]:
        """`rows`."""
        columns = ["layer", "chunk", *FIGURES, "tolerance"]
        return columns, ([row[name] for name in columns] for row in self.rows)

    def _parts(self) -> Iterable[str | Displayable]:
        edited = f"edited by hand: {', '.join(self.edited)}" if self.edited else ""
        beside = f"with the prompt fed at once, {self.at_once.verdict}" if self.at_once else ""
        loss = str(self.loss) if self.loss else ""
        lines = [
            self.verdict,
            loss,
            beside,
            self._what(),
            self._extent(),
            self._growth(),
            self._choices(),
            edited,
        ]
        yield "\n".join(filter(None, lines))
        if not self.equal:
            yield self.table()

    @cached_property
    def verdict(self) -> str:
        """One sentence, which also names what else is wrong and does not follow from the first."""
        others = self.case.others(self.first) if self.first else []
        if not others:
            return self._of_first()
        second, more = others[0], len(others) - 1
        also = f"also {self._who(second.ranks)} at {self._place_text(second)}"
        rest = f", and {more} more block{'s' * (more > 1)}" * bool(more)
        return f"{self._of_first()}; {also}{rest}"

    def _of_first(self) -> str:
        one = self.first
        if one and one.kind == "placement":
            return f"placement is wrong: {self._placement_text(one)}"
        if one and one.kind == "wire":
            return f"the wire or memory changed bytes: {self._wire_text(one)}"
        if one and one.kind == "compute":
            return f"the compute differs: {self._compute_text(one)}"
        if one:
            share = self._share(one)
            times = math.inf if share is None else share
            return (
                f"beyond tolerance: first at {self._place_text(one)}, {times:.3g} × what rounding explains; "
                f'{self._who(one.ranks)} alike. run.compare("reference"), in the run\'s own chunks and dtype, compares '
                "bit for bit"
            )
        world_size = len(self.case.helds)
        who, hold = self._who(range(world_size)), "hold" if world_size > 1 else "holds"
        if self.equal and self.loss:
            made = f"what codec {self.loss.codec} makes of transformers' own forward"
            return f"equal but for the chosen loss: {who} {hold} {made}, bit for bit"
        if self.equal:
            return f"equal: {who} {hold} what transformers' own forward makes, bit for bit"
        furthest, key = max((self.case.measure.share(key[1], found), key) for key, found in self._measured())
        return (
            f"within tolerance: what {who} {hold} differs from the reference by at most {furthest:.2g} of what "
            f"rounding explains ({key[2]} of layer {key[1]}, {self._chunk(key[0])})"
        )

    # -- the verdict where there is a first deviation

    def _placement_text(self, one: Deviation) -> str:
        held = self.case.helds[one.rank]
        if held.held[one.layer] == held.due[one.layer]:
            named = one.rows.text if one.rows else "its rows lie in the wrong places"
            place = f"on {self._who(one.ranks)}, layer {one.layer}, {self._chunk(one.chunk)}"
            return f"{place}: {named}" + f"; {one.origin}" * bool(one.origin)
        wrong = [n for n, (have, due) in enumerate(zip(held.held, held.due, strict=True)) if have != due]
        layers = "every layer" if len(wrong) == len(held.held) else f"layer {', '.join(map(str, wrong))}"
        verb = "hold" if len(one.ranks) > 1 else "holds"
        others = f", {self._who(one.right)} and the reference" if one.right else ", the reference"
        named = f"; {one.rows.text}" if one.rows else ""
        return (
            f"{self._who(one.ranks)} {verb} {held.held[one.layer]} rows of {layers}{others} "
            f"{held.due[one.layer]}{named}"
        )

    def _wire_text(self, one: Deviation) -> str:
        share = self._share(one)
        if not self.case.measure.exact and (share is None or share <= 1):
            return (
                f"the ranks hold different bytes of layer {one.layer}, {self._chunk(one.chunk)}, {one.tensor}: rank "
                f"{one.rank} differs from rank {one.owner}, though both are within tolerance; "
                f"run.kv(layer={one.layer}, chunk={one.chunk}).diff() names the value"
            )
        origin = f"; {one.origin}" * bool(one.origin)
        if one.tensor in HIDDEN:
            cause = "the layer before, repeated on the run's KV, gives the reference's: "
            cause += "changed in its MLP, or on the way"
        elif not one.right and one.owner is not None:
            why = one.origin or "it changed before it was sent"
            cause = f"rank {one.owner} computed what the reference has at `{one.op}`; {why}"
        elif one.rank != one.owner and one.owner in one.right:
            cause = f"rank {one.owner}, which computed it, holds the reference's{origin}"
        else:
            verb = "hold" if len(one.right) > 1 else "holds"
            cause = f"{self._who(one.right)} {verb} the reference's{origin}"
        return f"{self._who(one.ranks)} at {self._place_text(one)}; {cause}"

    def _compute_text(self, one: Deviation) -> str:
        if one.tensor == "token":
            assert one.values
            run, reference = map(int, one.values)
            return (
                f"all KV is the reference's bit for bit, but new token {one.token} is {run} and the reference chooses "
                f"{reference}: the head or the sampling differs"
            )
        everyone = len(one.ranks) == len(self.case.helds)
        alike = " alike" if everyone and len(self.case.helds) > 1 else ""
        if one.owner is not None:
            by = f"computed so by rank {one.owner} at `{one.op}`"
        elif everyone:
            by = "every rank computes new tokens for itself"
        else:
            by = f"{self._who(one.right)} computed it right"
        return f"{self._who(one.ranks)}{alike} at {self._place_text(one)}; {by}"

    def _share(self, one: Deviation) -> float | None:
        """Its largest difference as a share of the tolerance, if the rank has measured it."""
        found = self.case.measured(one.rank, (one.chunk, one.layer, one.tensor))
        return self.case.measure.share(one.layer, found) if found else None

    # -- more lines

    def _what(self) -> str:
        report, measure = self.case.first_examined.report, self.case.measure
        shape, layers = self.case.plan.shape, self.case.plan.shape.layers
        size = numbers_text(shape.lengths) if shape.lengths else shape.chunk_size
        chunks = f"in the run's chunks of {size} tokens" if self.chunked else "all of the prompt at once"
        threads = f"{report.threads} thread{'s' * (report.threads != 1)}"
        ranks = ", ".join(str(found.rank) for found in self.case.examined)
        tolerated = "every bit counts"
        if not measure.exact:
            u = max(UNIT_ROUNDOFF[measure.dtype], UNIT_ROUNDOFF[measure.reference])
            tolerated = (
                f"tolerated: {CONFIDENCE:g} · √(layer + 1) · (√{ROUNDINGS} · {u:.2g} + √{measure.width} · "
                f"{UNIT_ROUNDOFF['float32']:.2g}) of the largest value of a block, {measure.of(0):.2g} at layer 0 to "
                f"{measure.of(layers - 1):.2g} at layer {layers - 1}"
            )
            if report.kernels != "exact":
                tolerated += f" (kernels={report.kernels} round otherwise than transformers' own)"
        return (
            f"reference: {measure.reference}, {chunks}, on rank {ranks} ({report.device}, {threads}, "
            f"{report.seconds:.2g} s); {tolerated}"
        )

    def _extent(self) -> str:
        """How much was compared, and whether some is not computed yet."""
        shape = self.case.plan.shape
        blocks = {block for one in self.case.helds for block in one.now if block[0] < len(shape.chunks)}
        tokens = len(self.case.tokens)
        new = f" and {tokens} new token{'s' * (tokens != 1)}, fed one by one" if tokens else ""
        if len(blocks) == shape.blocks:
            plural = "s" * (len(shape.chunks) != 1)
            return f"compared: {shape.layers} layers × {len(shape.chunks)} chunk{plural}{new}"
        return (
            f"compared so far: {len(blocks)} of {shape.layers} × {len(shape.chunks)} blocks; the run stands half-way, "
            "and the others are not computed yet"
        )

    def _growth(self) -> str:
        if self.case.measure.exact:
            return ""
        by_layer = self._by_layer()
        parts = []
        for name in TENSORS:
            first, last = (_largest(by_layer[n][1], f"{name}_share") for n in (0, -1))
            parts.append(f"{name} from {first:.2g} to {last:.2g}")
        layers = f"from layer {by_layer[0][0]} to {by_layer[-1][0]}"
        return f"{layers}, as a share of the largest value: {', '.join(parts)}"

    def _choices(self) -> str:
        if not self.case.first_examined.choices:
            return ""
        one, *others = self.case.first_examined.choices
        more = f", and {len(others)} more" if others else ""
        return (
            f"tokens: new token {one.position} is {one.token}; the reference would have chosen {one.reference} "
            f"(its logit is larger by {one.gap:.3g}){more}"
        )

    # -- within

    def _measured(self) -> Iterator[tuple[TensorKey, CellDifference]]:
        for one in self.case.examined:
            yield from one.measured.items()

    def _by_layer(self) -> list[tuple[int, list[dict[str, Any]]]]:
        layers = sorted({row["layer"] for row in self.rows} & set(range(self.case.plan.shape.layers)))
        return [(layer, [row for row in self.rows if row["layer"] == layer]) for layer in layers]

    def _who(self, ranks: Iterable[int]) -> str:
        """ "rank 2", "ranks 0, 1", "both ranks", "all 3 ranks"."""
        ranks = list(ranks)
        if len(ranks) == len(self.case.helds) > 1:
            return f"all {len(ranks)} ranks" if len(ranks) > 2 else "both ranks"
        return f"rank{'s' * (len(ranks) != 1)} {', '.join(map(str, ranks))}"

    def _chunk(self, chunk: int) -> str:
        return f"chunk {chunk}" if chunk < len(self.case.plan.shape.chunks) else "the new tokens"

    def _place_text(self, one: Deviation) -> str:
        """ "layer 7, chunk 1, K, head 3, token 141 ('Lima'), dim 17: 0.0312 against −1.75"."""
        where = [f"layer {one.layer}", self._chunk(one.chunk), one.tensor]
        if one.tensor in HIDDEN:
            what = "the final hidden state"
            if one.tensor == "hidden":
                is_inside = one.layer < self.case.plan.shape.layers
                what = f"what enters layer {one.layer}" if is_inside else "what the last layer makes"
            where = [what, self._chunk(one.chunk)]
        label = self._texts[one.token] if one.token is not None and one.token < len(self._texts) else ""
        measure = self.case.measure
        dtype = getattr(torch, measure.dtype if measure.dtype == measure.reference else "float32")
        return ", ".join(filter(None, [*where, one.value_text(label, dtype)]))


def _largest(rows: list[dict[str, Any]], name: str) -> float:
    return max((row[name] for row in rows if row[name] is not None), default=0.0)
