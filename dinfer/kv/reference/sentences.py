"""Sentences: a deviation from the reference, said to people."""

from collections.abc import Iterable, Sequence

from dinfer.kv.reference.judge import Deviation, ReferenceCase
from dinfer.kv.reference.reports import HIDDEN
from dinfer.plan.plan import Plan


class Words:
    """The names of things in one run. `texts`: of each token."""

    def __init__(self, plan: Plan, world_size: int, texts: Sequence[str]) -> None:
        self._plan, self._world_size, self._texts = plan, world_size, list(texts)

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

    def token(self, token: int | None) -> str:
        """ "token 141 ('Lima')"."""
        if token is None:
            return ""
        text = self._texts[token] if token < len(self._texts) else ""
        return f"token {token}" + (f" ({text!r})" if text else "")

    def place(self, one: Deviation) -> str:
        """ "layer 7, chunk 1, K, head 3, token 141 ('Lima'), dim 17: 0.0312 against -1.75"."""
        where = [f"layer {one.layer}", self.chunk(one.chunk), one.tensor]
        if one.tensor in HIDDEN:
            layers = self._plan.shape.layers
            what = f"what enters layer {one.layer}" if one.layer < layers else "what the last layer makes"
            where = [what if one.tensor == "hidden" else "the final hidden state", self.chunk(one.chunk)]
        where += [f"head {one.head}"] * (one.head is not None)
        where += [self.token(one.token)] * (one.token is not None)
        where += [f"dim {one.dim}"] * (one.dim is not None)
        values = f": {_number(one.values[0])} against {_number(one.values[1])}" if one.values else ""
        return ", ".join(where) + values


def sentence(case: ReferenceCase, one: Deviation, words: Words) -> str:
    """The verdict on a comparison whose first deviation this is."""
    return {"placement": _placement, "wire": _wire, "compute": _compute, "drift": _drift}[one.kind](
        case, one, words
    )


def _placement(case: ReferenceCase, one: Deviation, words: Words) -> str:
    held = case.helds[one.rank]
    if held.held[one.layer] == held.due[one.layer]:
        named = one.rows.text if one.rows else "rows lie wrongly"
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


def _wire(case: ReferenceCase, one: Deviation, words: Words) -> str:
    if not one.right and one.owner is not None and one.tensor not in HIDDEN:
        why = one.origin or "it has changed since, and so it was sent"
        told = f"rank {one.owner} computed what the reference has at `{one.op}`; {why}"
    elif one.tensor in HIDDEN:
        told = "the layer before makes the reference's of the run's own KV: changed in its MLP, or on the way"
    elif one.owner is not None and one.rank != one.owner and one.owner in one.right:
        told = f"rank {one.owner}, which computed it, holds the reference's"
        told += f"; {one.origin}" * bool(one.origin)
    else:
        told = f"{words.who(one.right)} {'hold' if len(one.right) > 1 else 'holds'} the reference's"
        told += f"; {one.origin}" * bool(one.origin)
    if not case.measure.exact and case.first() and not _is_far(case, one):
        return (
            f"the wire or memory changed bytes: the ranks hold different bytes of layer {one.layer}, "
            f"{words.chunk(one.chunk)}, {one.tensor}, rank {one.rank} others than rank {one.owner}, though all are "
            f"within tolerance; run.kv(layer={one.layer}, chunk={one.chunk}).diff() names the value"
        )
    return f"the wire or memory changed bytes: {words.who(one.ranks)} at {words.place(one)}; {told}"


def _compute(case: ReferenceCase, one: Deviation, words: Words) -> str:
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
            else f"{words.who(one.right)} computed it rightly"
        )
    else:
        by = f"computed so by rank {one.owner} at `{one.op}`"
    return f"the compute differs: {words.who(one.ranks)}{alike} at {words.place(one)}; {by}"


def _drift(case: ReferenceCase, one: Deviation, words: Words) -> str:
    found = case.measured(one.rank, (one.chunk, one.layer, one.tensor))
    share = case.measure.share(one.layer, found) if found else float("inf")
    return (
        f"beyond tolerance: first at {words.place(one)}, {share:.3g} × what rounding explains; {words.who(one.ranks)} "
        'alike. run.compare("reference"), in the run\'s own chunks and dtype, tells bit for bit'
    )


def _is_far(case: ReferenceCase, one: Deviation) -> bool:
    found = case.measured(one.rank, (one.chunk, one.layer, one.tensor))
    return found is not None and case.measure.share(one.layer, found) > 1


def _number(value: float) -> str:
    return f"{value:.6g}"
