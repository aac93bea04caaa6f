"""Comparison: what `run.compare` returns. The first line of its text is the verdict, in one sentence."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch

from dinfer.display import Displayable, Table
from dinfer.kv.measure import CellDifference
from dinfer.kv.reference.judge import CauseKind, Deviation, ReferenceCase
from dinfer.kv.reference.reports import FINAL, HIDDEN
from dinfer.model.tolerance import CONFIDENCE, ROUNDINGS, UNIT_ROUNDOFF

TENSORS = ("hidden", "K", "V")


class Comparison(Displayable):
    """A run compared with transformers' own forward of the same checkpoint. `chunked`: the forward was fed the run's
    chunks; `edited`: what the user has changed in the run; `texts`: the text of each token, empty without a
    tokenizer."""

    def __init__(
        self, case: ReferenceCase, *, chunked: bool, edited: Sequence[str] = (), texts: Sequence[str] = ()
    ) -> None:
        self.case, self.chunked, self.edited = case, chunked, tuple(edited)
        self.first: Deviation | None = case.first()
        self._words = _Words(case, texts)

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
        found: dict[tuple[int, int], dict[str, Any]] = {}
        for (chunk, layer, tensor), one in self._measured():
            if tensor == FINAL:
                continue
            row = found.setdefault((chunk, layer), self._empty_row(chunk, layer))
            for name, value in _numbers(tensor, one).items():
                row[name] = value if row[name] is None else max(row[name], value)
        return [found[key] for key in sorted(found, key=lambda key: (key[1], key[0]))]

    def table(self) -> str:
        """A line for each layer: the largest differences in all chunks, and the tolerance."""
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
        parts = [self.verdict, self._what(), self._extent(), self._growth(), self._choices(), edited, table]
        return "\n".join(line for line in parts if line)

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.first:
            return _sentence(self.case, self.first, self._words)
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
        """How much was compared, and whether some is not computed yet."""
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


class _Words:
    """How messages name the ranks, chunks and tokens of one run. `texts`: the text of each token."""

    def __init__(self, case: ReferenceCase, texts: Sequence[str]) -> None:
        self._plan, self._world_size, self._texts = case.plan, len(case.helds), list(texts)
        one_dtype = case.measure.dtype == case.measure.reference
        self._dtype: torch.dtype = getattr(torch, case.measure.dtype) if one_dtype else torch.float32

    def who(self, ranks: Iterable[int]) -> str:
        """ "rank 2", "ranks 0, 1", "both ranks", "all 3 ranks"."""
        ranks = list(ranks)
        if len(ranks) == self._world_size > 1:
            return f"all {len(ranks)} ranks" if len(ranks) > 2 else "both ranks"
        return f"rank{'s' * (len(ranks) != 1)} {', '.join(map(str, ranks))}"

    def verb(self, stem: str, case: ReferenceCase) -> str:
        return stem if len(case.helds) > 1 else f"{stem}s"

    def chunk(self, chunk: int) -> str:
        return f"chunk {chunk}" if chunk < len(self._plan.shape.chunks) else "the new tokens"

    def place(self, one: Deviation) -> str:
        """ "layer 7, chunk 1, K, head 3, token 141 ('Lima'), dim 17: 0.0312 against −1.75"."""
        where = [f"layer {one.layer}", self.chunk(one.chunk), one.tensor]
        if one.tensor in HIDDEN:
            layers = self._plan.shape.layers
            what = f"what enters layer {one.layer}" if one.layer < layers else "what the last layer makes"
            where = [what if one.tensor == "hidden" else "the final hidden state", self.chunk(one.chunk)]
        label = self._texts[one.token] if one.token is not None and one.token < len(self._texts) else ""
        return ", ".join(filter(None, [*where, one.value_text(label, self._dtype)]))


def _sentence(case: ReferenceCase, one: Deviation, words: _Words) -> str:
    """The verdict where this is the first deviation."""
    texts = {"placement": _placement, "wire": _wire, "compute": _compute, "drift": _drift}
    return texts[one.kind](case, one, words)


def _placement(case: ReferenceCase, one: Deviation, words: _Words) -> str:
    held = case.helds[one.rank]
    if held.held[one.layer] == held.due[one.layer]:
        named = one.rows.text if one.rows else "its rows lie in the wrong places"
        place = f"on {words.who(one.ranks)}, layer {one.layer}, {words.chunk(one.chunk)}"
        return f"placement is wrong: {place}: {named}" + f"; {one.origin}" * bool(one.origin)
    wrong = [n for n, (have, due) in enumerate(zip(held.held, held.due, strict=True)) if have != due]
    layers = "every layer" if len(wrong) == len(held.held) else f"layer {', '.join(map(str, wrong))}"
    verb = "hold" if len(one.ranks) > 1 else "holds"
    others = f", {words.who(one.right)} and the reference" if one.right else ", the reference"
    named = f"; {one.rows.text}" if one.rows else ""
    return (
        f"placement is wrong: {words.who(one.ranks)} {verb} {held.held[one.layer]} rows of {layers}{others} "
        f"{held.due[one.layer]}{named}"
    )


def _wire(case: ReferenceCase, one: Deviation, words: _Words) -> str:
    if not one.right and one.owner is not None and one.tensor not in HIDDEN:
        why = one.origin or "it changed before it was sent"
        cause = f"rank {one.owner} computed what the reference has at `{one.op}`; {why}"
    elif one.tensor in HIDDEN:
        cause = "the layer before, repeated on the run's KV, gives the reference's: changed in its MLP, or on the way"
    elif one.owner is not None and one.rank != one.owner and one.owner in one.right:
        cause = f"rank {one.owner}, which computed it, holds the reference's" + f"; {one.origin}" * bool(
            one.origin
        )
    else:
        cause = f"{words.who(one.right)} {'hold' if len(one.right) > 1 else 'holds'} the reference's"
        cause += f"; {one.origin}" * bool(one.origin)
    if not case.measure.exact and case.first() and not _is_far(case, one):
        return (
            f"the wire or memory changed bytes: the ranks hold different bytes of layer {one.layer}, "
            f"{words.chunk(one.chunk)}, {one.tensor}: rank {one.rank} differs from rank {one.owner}, though both are "
            f"within tolerance; run.kv(layer={one.layer}, chunk={one.chunk}).diff() names the value"
        )
    return f"the wire or memory changed bytes: {words.who(one.ranks)} at {words.place(one)}; {cause}"


def _compute(case: ReferenceCase, one: Deviation, words: _Words) -> str:
    if one.tensor == "token":
        assert one.values
        run, reference = map(int, one.values)
        return (
            f"the compute differs: all KV is the reference's bit for bit, but new token {one.token} is {run} and the "
            f"reference chooses {reference}: the head or the sampling differs"
        )
    everyone = len(one.ranks) == len(case.helds)
    alike = " alike" if everyone and len(case.helds) > 1 else ""
    if one.owner is None:
        by = (
            "every rank computes new tokens for itself"
            if everyone
            else f"{words.who(one.right)} computed it right"
        )
    else:
        by = f"computed so by rank {one.owner} at `{one.op}`"
    return f"the compute differs: {words.who(one.ranks)}{alike} at {words.place(one)}; {by}"


def _drift(case: ReferenceCase, one: Deviation, words: _Words) -> str:
    found = case.measured(one.rank, (one.chunk, one.layer, one.tensor))
    share = case.measure.share(one.layer, found) if found else float("inf")
    return (
        f"beyond tolerance: first at {words.place(one)}, {share:.3g} × what rounding explains; {words.who(one.ranks)} "
        'alike. run.compare("reference"), in the run\'s own chunks and dtype, compares bit for bit'
    )


def _is_far(case: ReferenceCase, one: Deviation) -> bool:
    found = case.measured(one.rank, (one.chunk, one.layer, one.tensor))
    return found is not None and case.measure.share(one.layer, found) > 1
