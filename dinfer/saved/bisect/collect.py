"""Collects the parts of a run: from its ranks or a saved folder, or from transformers' own forward."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dinfer.kv.ledger import BlockKey
from dinfer.kv.source import HeldSpans, Source, Subject
from dinfer.model.decoder import Decoder
from dinfer.model.reference import Forward
from dinfer.plan.ops import NothingYet, PlanError
from dinfer.plan.plan import Plan
from dinfer.saved.bisect.parts import RunParts
from dinfer.saved.bisect.result import REFERENCE
from dinfer.saved.replay.record import RankRecord, check_rank


@dataclass(frozen=True, eq=False)
class Collected:
    """A run that has ended prefill: its parts as each of some ranks holds them, and these ranks' records; without
    records the run can be compared with, but not run again."""

    ranks: Sequence[tuple[RunParts, RankRecord | None]]


def collect(
    source: Source,
    record_of: Callable[[int], RankRecord] | None,
    rank: int | None = None,
    final: Tensor | None = None,
) -> Collected:
    """The parts of a run as `rank` holds them; None: as each rank does, but for those that hold the same as an earlier
    one. `record_of`: None where only KV is left of the run; `final`: see RunParts, if it is at hand.

    Raises PlanError for an unknown rank, and where rows are missing or too many; NothingYet before the end of prefill.
    """
    subject = source.subject
    plan, ranks = subject.plan, range(subject.plan.world_size)
    shape, layers = plan.shape, range(plan.shape.layers)
    if rank is not None:
        check_rank(rank, plan)
    if any(subject.standing):
        raise NothingYet(
            f"{subject.name} has not ended prefill: it stands {subject.stands}. run.resume() and run.wait() first."
        )
    for one, held in zip(ranks, source.held(ranks), strict=True):
        _check_rows(subject, one, held)
    digests = source.digests(ranks, layers, shape.chunks)
    owners = torch.stack([digests[shape.owners[layer]][layer] for layer in layers])
    distinct = [one for one in ranks if not any(torch.equal(digests[one], digests[n]) for n in range(one))]
    owned = [source.values(shape.owners[layer], layer, range(shape.tokens)) for layer in layers]
    records = [record_of(one) for one in ranks] if record_of else []
    finals = [one.final for one in records if one.final is not None]
    common = RunParts(
        name=subject.name, plan=plan, tokens=tuple(subject.ids[shape.tokens :]), rank=0, owned=owned,
        hidden=_hidden(plan, records), final=finals[0] if final is None and finals else final,
    )  # fmt: skip

    def of(one: int) -> RunParts:
        differs = (digests[one] != owners).any(-1)
        keys = sorted((chunk, layer) for layer, chunk in differs.nonzero().tolist())
        copies = {(chunk, layer): source.values(one, layer, shape.chunks[chunk]) for chunk, layer in keys}
        return replace(common, rank=one, copies=copies)

    chosen = distinct if rank is None else [rank]
    return Collected([(of(one), records[one] if records else None) for one in chosen])


def reference_parts(
    decoder: Decoder, ids: Sequence[int], run: RunParts, watch: Callable[[int], None]
) -> RunParts:
    """What transformers' own forward makes of the same prompt, fed in the chunks of that run. `watch(chunk)` is called
    after each."""
    chunks = run.plan.shape.chunks
    blocks: list[list[Tensor]] = [[] for _ in range(decoder.num_layers)]
    hidden, at = dict[BlockKey, Tensor](), 0

    def see(what: str, layer: int, tensor: Tensor) -> None:
        if what == "kv":
            blocks[layer].append(tensor.clone())
        elif (at, layer) in run.hidden:
            hidden[at, layer] = tensor.clone()

    forward, final = Forward(decoder, see), None
    for at, rows in enumerate(chunks):
        final = forward.feed(ids[rows.start : rows.stop]).hidden[:, -1:].clone()
        watch(at)
    owned = [torch.cat(pieces) for pieces in blocks]
    return RunParts(
        name=REFERENCE, plan=run.plan, tokens=(), rank=run.rank, owned=owned, hidden=hidden, final=final
    )


def _check_rows(subject: Subject, rank: int, held: HeldSpans) -> None:
    """Raises PlanError where a layer has other rows than those of its tokens: then no block lies where it should."""
    due = [subject.due(held, layer) for layer in range(len(held.rows))]
    more = [rows - wanted for rows, wanted in zip(held.rows, due, strict=True)]
    decoded = len(subject.spans) > len(subject.plan.shape.chunks)
    for layer, rows in enumerate(held.rows):
        # What decode appends twice, it appends to every layer, behind the prompt.
        if more[layer] != (min(more) if decoded and min(more) > 0 else 0):
            raise PlanError(
                f"rank {rank} holds {rows} rows in layer {layer} and should hold {due[layer]}: blocks do not lie where "
                "they should, so none can be replaced alone. run.kv().diff() shows which rows are too many or missing."
            )


def _hidden(plan: Plan, records: Sequence[RankRecord]) -> dict[BlockKey, Tensor]:
    """What entered each rank and what was edited there, of the layers that the rank owns."""
    owners = plan.shape.owners
    found = dict[BlockKey, Tensor]()
    for record in records:
        states = [record.hidden, *(edit.hidden for edit in record.edits)]
        found |= {
            key: state
            for one in states
            for key, state in one.items()
            if key[1] < len(owners) and owners[key[1]] == record.rank
        }
    return found
