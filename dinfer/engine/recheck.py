"""The check before decode: are the rows of all blocks still what they were when they were computed here, or came?

Digests that travel tell what changes on the way; what changes afterwards in memory, only this does.
"""

import json
from time import monotonic_ns

import torch
from torch import Tensor

from dinfer.engine.corruption import Corrupted, Corruption
from dinfer.engine.prefill import Prefill
from dinfer.kv.ledger import BlockKey
from dinfer.trace.events import Event
from dinfer.trace.recorder import Recorder
from dinfer.transport.gloo import Comm

_BYTES = 512

_WHATS = {
    "fail": "The run ends since on_corruption is fail.",
    "pause": "Decode again to go on with these bytes.",
}


def recheck(state: Prefill, recorder: Recorder, comm: Comm) -> float:
    """Look at all rows and tell of those that have changed; the seconds it took. All ranks must call it.

    Raises Corrupted, on every rank alike, where on_corruption is "fail"; and where it is "pause", once for each block.
    """
    if not state.ledger.on:
        return 0.0
    start = monotonic_ns()
    found = changed_blocks(state)
    event = _event(recorder, "check", start, monotonic_ns(), bytes=sum(_sizes(state)))
    new = [one for one in found if (one.chunk, one.layer) not in state.ledger.told]
    for one in new:
        where = {"what": "kv", "chunk": one.chunk, "layer": one.layer, "bytes": one.bytes}
        _event(recorder, "corrupt", event.end, event.end, tokens=len(state.rows(one.chunk)), **where)
        state.ledger.told.add((one.chunk, one.layer))
        state.alarm.tell(one)
    policy = state.alarm.policy
    if policy != "record":
        _stop_all(comm, found if policy == "fail" else new, _WHATS[policy])
    return event.busy / 1e9


def changed_blocks(state: Prefill) -> list[Corruption]:
    """The blocks of which rows have changed, in order. Waits for the device once, and once more for each of them."""
    blocks = sorted(state.ledger.entries)
    changed = [state.ledger.changed(key, state.block(*key)) for key in blocks]
    if not changed:
        return []
    flags = torch.stack([rows.any() for rows in changed]).tolist()
    return [_found(state, key, rows) for key, rows, flag in zip(blocks, changed, flags, strict=True) if flag]


def _found(state: Prefill, key: BlockKey, rows: Tensor) -> Corruption:
    places = rows.nonzero().tolist()  # token of the block, K or V, head; in this order
    names = [name for n, name in enumerate("KV") if any(place[1] == n for place in places)]
    token, _, head = places[0]
    return Corruption(
        state.rank, *key, " and ".join(names), state.block(*key).nbytes,
        rows=len(places), token=state.rows(key[0]).start + token, head=head,
    )  # fmt: skip


def _stop_all(comm: Comm, found: list[Corruption], what: str) -> None:
    """Decode takes all ranks, so none begins where one must not. Raises Corrupted."""
    mine = json.dumps(found[0].as_dict() if found else None).encode()
    gathered = comm.all_gather(mine.ljust(_BYTES)) if comm.world_size > 1 else [mine]
    if said := [str(Corruption.of(one)) for one in map(json.loads, gathered) if one]:
        raise Corrupted(f"before decode: {'; '.join(said)}. {what}")


def _event(recorder: Recorder, kind: str, start: int, end: int, **fields: object) -> Event:
    lane = len(recorder.lanes) - 1
    event = Event(recorder.rank, recorder.lanes[lane], kind, start, start, start, end, **fields)  # type: ignore[arg-type]
    recorder.record(lane, event)
    return event


def _sizes(state: Prefill) -> list[int]:
    return [state.block(*key).nbytes for key in state.ledger.entries]
