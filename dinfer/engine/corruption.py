"""Corruption: blocks whose bytes changed, how they are reported, and the check of all blocks before decode.

A block's digests travel in its header, so `Prefill.check_digests` finds changes on the way. Changes in memory
afterwards are found by `recheck` alone.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from time import monotonic_ns
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from dinfer.config import OnCorruption
from dinfer.errors import DinferError
from dinfer.kv.ledger import BlockKey, Ledger
from dinfer.trace.events import Event
from dinfer.trace.recorder import Recorder
from dinfer.transport.gloo import Comm

log = logging.getLogger("dinfer")

# A session shows the note itself: without a log file, do not print the warning as well.
log.addHandler(logging.NullHandler())

_ANSWER_BYTES = 512
"""what each rank sends of its first changed block; long enough for a Corruption as JSON"""

_ADVICE = {
    "fail": "The run ends because on_corruption is fail.",
    "pause": "Decode again to go on with these bytes.",
}


@dataclass(frozen=True)
class Corruption:
    """Block (`chunk`, `layer`) of `bytes` bytes, found changed on `rank` in `tensors` ("K", "V" or "K and V").

    `peer` sent it, and its bytes changed on the way or in the memory of `peer`; None: they changed in this rank's
    memory after it was computed or received. `first`: an earlier rank that received it changed and passed it on. For a
    change in memory, `rows` rows changed, the first of them at `token` (its position in the prompt) and `head`.
    """

    rank: int
    chunk: int
    layer: int
    tensors: str
    bytes: int
    peer: int | None = None
    first: int | None = None
    rows: int = 0
    token: int | None = None
    head: int | None = None

    @property
    def what(self) -> str:
        """What happened to the block, without its name."""
        if self.peer is None:
            return f"{self.tensors} changed in memory"
        came = f"{self.tensors} came changed from rank {self.peer}"
        if self.first is None:
            return f"{came}, on the way or before it was sent"
        return f"{came}: rank {self.first} was the first to receive it changed"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """The inverse of `as_dict`; ignores other keys."""
        return cls(**{item.name: values[item.name] for item in fields(cls)})

    def __str__(self) -> str:
        """For example `rank 2: K of block c1 l7 changed in memory (head 3, token 141)`."""
        rest = self.what.removeprefix(self.tensors)
        where = f"head {self.head}, token {self.token}"
        rows = f" ({self.rows} rows, the first: {where})" if self.rows > 1 else f" ({where})"
        named = f"rank {self.rank}: {self.tensors} of block c{self.chunk} l{self.layer}"
        return f"{named}{rest}{rows if self.rows else ''}"


class Corrupted(DinferError, RuntimeError):
    """A block's bytes changed, and `on_corruption` is fail or pause."""


CorruptionCallback = Callable[[Corruption], None]


class Alarm:
    """Reports corruption to the rank's log and to `callback`. `policy` decides whether the run goes on."""

    def __init__(self, policy: OnCorruption = "record", callback: CorruptionCallback | None = None) -> None:
        self.policy = policy
        self._callback = callback

    def report(self, found: Corruption) -> None:
        log.warning("%s", found)
        if self._callback:
            self._callback(found)

    def __call__(self, found: Corruption) -> None:
        """Report; raises Corrupted if the policy is fail."""
        self.report(found)
        if self.policy == "fail":
            raise Corrupted(
                f"{found}. {_ADVICE['fail']} With record it would go on with these bytes. Bytes that change in memory "
                "or on the wire point to a fault of the machine, its drivers or other code in the process."
            )


class CheckedState(Protocol):
    """What `recheck` reads of a prompt's state on one rank (`Prefill`)."""

    rank: int
    ledger: Ledger
    alarm: Alarm

    def rows(self, chunk: int) -> range:
        """The token positions of a chunk."""

    def block(self, chunk: int, layer: int) -> Tensor:
        """The block in the cache, [tokens, 2, kv_heads, head_dim]."""


def recheck(state: CheckedState, recorder: Recorder, comm: Comm) -> float:
    """Compare all rows with their digests and report changed blocks. All ranks must call it. Returns the seconds taken.

    Raises Corrupted on every rank if any rank found a change and the policy is fail, or pause and the block is new.
    """
    ledger, policy = state.ledger, state.alarm.policy
    if not ledger.on:
        return 0.0
    start = monotonic_ns()
    found = changed_blocks(state)
    size = sum(state.block(*key).nbytes for key in ledger.entries)
    event = _record(recorder, "check", start, monotonic_ns(), bytes=size)
    new = [one for one in found if (one.chunk, one.layer) not in ledger.told]
    for one in new:
        where = {"what": "kv", "chunk": one.chunk, "layer": one.layer, "bytes": one.bytes}
        _record(recorder, "corrupt", event.end, event.end, tokens=len(state.rows(one.chunk)), **where)
        ledger.told.add((one.chunk, one.layer))
        state.alarm.report(one)
    if policy != "record":
        _stop_all(comm, found if policy == "fail" else new, _ADVICE[policy])
    return event.busy / 1e9


def changed_blocks(state: CheckedState) -> list[Corruption]:
    """The blocks with changed rows, by chunk and layer. Waits for the device once, and once for each changed block."""
    keys = sorted(state.ledger.entries)
    changed = [state.ledger.changed(key, state.block(*key)) for key in keys]
    if not changed:
        return []
    flags = torch.stack([rows.any() for rows in changed]).tolist()
    return [_found(state, key, rows) for key, rows, flag in zip(keys, changed, flags, strict=True) if flag]


def _found(state: CheckedState, key: BlockKey, rows: Tensor) -> Corruption:
    places = rows.nonzero().tolist()  # in the order of token in the block, K or V, head
    names = [name for n, name in enumerate("KV") if any(place[1] == n for place in places)]
    token, _, head = places[0]
    return Corruption(
        state.rank, *key, " and ".join(names), state.block(*key).nbytes,
        rows=len(places), token=state.rows(key[0]).start + token, head=head,
    )  # fmt: skip


def _stop_all(comm: Comm, found: list[Corruption], advice: str) -> None:
    """Exchange each rank's first changed block: decode needs all ranks, so all stop if one does. Raises Corrupted."""
    mine = json.dumps(found[0].as_dict() if found else None).encode()
    gathered = comm.all_gather(mine.ljust(_ANSWER_BYTES)) if comm.world_size > 1 else [mine]
    if changed := [str(Corruption.of(one)) for one in map(json.loads, gathered) if one]:
        raise Corrupted(f"before decode: {'; '.join(changed)}. {advice}")


def _record(recorder: Recorder, kind: str, start: int, end: int, **fields: object) -> Event:
    """Record an event on the recorder's lane for decode."""
    lane = len(recorder.lanes) - 1
    event = Event(recorder.rank, recorder.lanes[lane], kind, start, start, start, end, **fields)  # type: ignore[arg-type]
    recorder.record(lane, event)
    return event
