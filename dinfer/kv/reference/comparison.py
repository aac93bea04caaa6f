"""Comparison: what `run.compare` returns. Its first line is the verdict, in one sentence."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from dinfer.display import Displayable, Table
from dinfer.kv.measure import CellDifference
from dinfer.kv.reference.judge import CauseKind, Deviation, ReferenceCase
from dinfer.kv.reference.reports import FINAL
from dinfer.kv.reference.sentences import Words, sentence
from dinfer.model.tolerance import CONFIDENCE, ROUNDINGS, UNIT_ROUNDOFF

TENSORS = ("hidden", "K", "V")


class Comparison(Displayable):
    """A run beside transformers' own forward of the same checkpoint. `chunked`: in the run's chunks; `edited`: what
    was changed by hand in the run; `texts`: of each token, prompt and new ones, empty where there is no tokenizer."""

    def __init__(
        self, case: ReferenceCase, *, chunked: bool, edited: Sequence[str] = (), texts: Sequence[str] = ()
    ) -> None:
        self.case, self.chunked, self.edited = case, chunked, tuple(edited)
        self.first: Deviation | None = case.first()
        self._words = Words(case.plan, len(case.helds), texts)

    @property
    def kind(self) -> CauseKind:
        """ "equal", "wire" (bytes changed on the wire or in memory), "compute" (they were computed so), "placement"
        (rows lie where others should), or "drift" (another dtype or other chunks, within tolerance or not)."""
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
        """Whether no value on any rank lies further from the reference's than rounding explains (bit for bit: at all),
        and no row lies wrongly."""
        share = self.case.measure.share
        large = any(share(key[1], found) > 1 for key, found in self._measured())
        return not large and not (self.first and (self.case.measure.exact or self.first.kind == "placement"))

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """A row for each layer and chunk, of the rank that is furthest from the reference: `K`, `V`, `hidden` are the
        largest absolute differences, with `_relative` the largest ones as a share of the larger of the two values, with
        `_share` those of the largest value of the block; `tolerance` is what is allowed of that share. None: nothing
        there to compare."""
        found: dict[tuple[int, int], dict[str, Any]] = {}
        for (chunk, layer, tensor), one in self._measured():
            if tensor == FINAL:
                continue
            row = found.setdefault((chunk, layer), self._empty_row(chunk, layer))
            for name, value in _numbers(tensor, one).items():
                row[name] = value if row[name] is None else max(row[name], value)
        return [found[key] for key in sorted(found, key=lambda key: (key[1], key[0]))]

    def table(self) -> str:
        """A line a layer: the largest differences of all chunks, and what is tolerated."""
        columns = [
            "layer",
            *(word for name in TENSORS for word in (f"{name} abs", "rel")),
            "of largest",
            "tolerated",
        ]
        lines = []
        for layer, rows in self._by_layer():
            numbers = [max(_known(rows, name + kind)) for name in TENSORS for kind in ("", "_relative")]
            numbers += [max(max(_known(rows, f"{name}_share")) for name in TENSORS), rows[0]["tolerance"]]
            lines.append([layer, *(f"{number:.2g}" for number in numbers)])
        return str(Table(columns, lines))

    def __str__(self) -> str:
        edited = f"edited by hand: {', '.join(self.edited)}" if self.edited else ""
        table = "" if self.equal else self.table()
        told = [self.verdict, self._what(), self._extent(), self._growth(), self._choices(), edited, table]
        return "\n".join(line for line in told if line)

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.first:
            return sentence(self.case, self.first, self._words)
        who = self._words.who(range(len(self.case.helds)))
        if self.equal:
            verb = self._words.verb("hold", self.case)
            return f"equal: {who} {verb} what transformers' own forward makes, bit for bit"
        share, key = self._furthest()
        return (
            f"within tolerance: what {who} {self._words.verb('hold', self.case)} differs from the reference by at most "
            f"{share:.2g} of what rounding explains ({key[2]} of layer {key[1]}, {self._words.chunk(key[0])})"
        )

    # -- within

    def _what(self) -> str:
        one, measure = self.case.first_examined, self.case.measure
        size = self.case.plan.shape.chunk_size
        chunks = f"in the run's chunks of {size} tokens" if self.chunked else "all of the prompt at once"
        threads = f"{one.threads} thread{'s' * (one.threads != 1)}"
        ranks = ", ".join(str(found.rank) for found in self.case.examined)
        return (
            f"reference: {measure.reference}, {chunks}, on rank {ranks} ({one.device}, {threads}, "
            f"{one.seconds:.2g} s); {self._tolerance()}"
        )

    def _tolerance(self) -> str:
        measure, layers = self.case.measure, self.case.plan.shape.layers
        if measure.exact:
            return "every bit counts"
        u = max(UNIT_ROUNDOFF[measure.dtype], UNIT_ROUNDOFF[measure.reference])
        return (
            f"tolerated: {CONFIDENCE:g} · √(layer + 1) · (√{ROUNDINGS} · {u:.2g} + √{measure.width} · "
            f"{UNIT_ROUNDOFF['float32']:.2g}) of the largest value of a block, {measure.of(0):.2g} at layer 0 to "
            f"{measure.of(layers - 1):.2g} at layer {layers - 1}"
        )

    def _extent(self) -> str:
        """What was compared, and what is not there yet."""
        shape = self.case.plan.shape
        blocks = {block for one in self.case.helds for block in one.now if block[0] < len(shape.chunks)}
        tokens = len(self.case.helds[self.case.first_examined.rank].tokens)
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
        parts = []
        for name in TENSORS:
            shares = [max(_known(rows, f"{name}_share")) for _, rows in self._by_layer()]
            parts.append(f"{name} from {shares[0]:.2g} to {shares[-1]:.2g}")
        layers = [layer for layer, _ in self._by_layer()]
        return f"from layer {layers[0]} to {layers[-1]}, as a share of the largest value: {', '.join(parts)}"

    def _choices(self) -> str:
        if not self.case.first_examined.choices:
            return ""
        one, *others = self.case.first_examined.choices
        more = f", and {len(others)} more" if others else ""
        return (
            f"tokens: new token {one.position} is {one.token}; the reference would have chosen {one.reference} "
            f"(its logit is larger by {one.gap:.3g}){more}"
        )

    def _measured(self) -> Iterator[tuple[tuple[int, int, str], CellDifference]]:
        for one in self.case.examined:
            yield from one.measured.items()

    def _furthest(self) -> tuple[float, tuple[int, int, str]]:
        share = self.case.measure.share
        return max((share(key[1], found), key) for key, found in self._measured())

    def _by_layer(self) -> list[tuple[int, list[dict[str, Any]]]]:
        layers = sorted({row["layer"] for row in self.rows} & set(range(self.case.plan.shape.layers)))
        return [(layer, [row for row in self.rows if row["layer"] == layer]) for layer in layers]

    def _empty_row(self, chunk: int, layer: int) -> dict[str, Any]:
        names = [f"{name}{kind}" for name in TENSORS for kind in ("", "_relative", "_share")]
        return {
            "layer": layer,
            "chunk": chunk,
            **dict.fromkeys(names),
            "tolerance": self.case.measure.of(layer),
        }


def _numbers(tensor: str, one: CellDifference) -> dict[str, float]:
    share = one.absolute / one.scale if one.scale else one.absolute
    return {tensor: one.absolute, f"{tensor}_relative": one.relative, f"{tensor}_share": share}


def _known(rows: list[dict[str, Any]], name: str) -> list[float]:
    return [row[name] for row in rows if row[name] is not None] or [0.0]
