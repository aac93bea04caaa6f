"""What a run's ranks hold just now, or when they failed, as a record of one of them."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from dinfer.cluster.kv import Live, RankClient
from dinfer.engine.prompt import Edit
from dinfer.kv.ledger import BlockKey
from dinfer.messages import EditedBlocks, ReadBlocks, ReadEdit, ReadFinalHidden, ReadNotes
from dinfer.run.report import Reporting
from dinfer.saved.replay.record import Own, RankRecord, arrived, check_rank, entered


def recorded_of(run: Reporting, rank: int) -> RankRecord:
    """Of a run that stands, has failed or hangs; first waits until it does. Raises PlanError for no such rank,
    and RankFailed where it is gone."""
    check_rank(rank, run.plan)
    source = run.last_source()
    stand = run.standing().stands[rank]
    came = entered(run.plan, rank, stand.positions)
    hidden = {
        (op.chunk, op.layer): source.hidden(rank, op.chunk, op.layer)[None]
        for op in came
        if op.what == "hidden"
    }
    blocks = _blocks(source, rank, [(op.chunk, op.layer) for op in arrived(run.plan, rank, stand.positions)])
    own = own_of(run, source, rank)
    return RankRecord(
        name=source.subject.name,
        config=run.config,
        checkpoint=source.subject.checkpoint,
        dtype=str(source.subject.dtype).removeprefix("torch."),
        device=own.device,
        plan=run.plan,
        ids=run.job.ids,
        tokens=own.tokens,
        rank=rank,
        positions=tuple(stand.positions),
        begun=own.begun,
        hidden=hidden,
        final=own.final,
        block=lambda chunk, layer: blocks[chunk, layer],
        noted=source.noted([rank], range(run.plan.shape.layers))[0],
        edits=own.edits,
        faults=own.faults,
        failure=run.failure,
    )


def own_of(run: Reporting, source: Live, rank: int) -> Own:
    """What a rank that can be asked knows of its own doings."""
    standing, line = run.standing(), source.line
    stand = standing.stands[rank]
    has_final = any(op.what == "final" for op in entered(run.plan, rank, stand.positions))
    notes = line.ask([rank], ReadNotes())[0]
    return Own(
        device=standing.devices[rank],
        tokens=notes.tokens,
        begun=tuple(stand.started),
        final=line.tensors([rank], ReadFinalHidden())[0] if has_final else None,
        edits=_edits(line, rank, notes.edits),
        faults=tuple(one.fault for one in run.struck() if any(strike[0] == rank for strike in one.strikes)),
    )


def _blocks(source: Live, rank: int, keys: list[BlockKey]) -> dict[BlockKey, Tensor]:
    """A request for each layer."""
    chunks, found = source.subject.plan.shape.chunks, dict[BlockKey, Tensor]()
    for layer in sorted({layer for _, layer in keys}):
        here = tuple(chunk for chunk, of in sorted(keys) if of == layer)
        rows = source.line.tensors([rank], ReadBlocks(layer, here))[0]
        pieces = torch.split(rows, [len(chunks[chunk]) for chunk in here])
        found |= {(chunk, layer): piece for chunk, piece in zip(here, pieces, strict=True)}
    return found


def _edits(line: RankClient, rank: int, edits: Sequence[EditedBlocks]) -> tuple[Edit, ...]:
    def tensors(
        number: int, what: Literal["kv", "hidden"], keys: Sequence[BlockKey]
    ) -> dict[BlockKey, Tensor]:
        return {key: line.tensors([rank], ReadEdit(number, what, *key))[0] for key in keys}

    return tuple(
        Edit(one.positions, tensors(n, "kv", one.kv), tensors(n, "hidden", one.hidden))
        for n, one in enumerate(edits)
    )
