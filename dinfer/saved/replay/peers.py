"""What stands in for a replayed rank's peers: their messages come from the record."""

from collections.abc import Callable
from time import monotonic_ns

import torch
from torch import Tensor

from dinfer.plan.graph import Channel, channel_of
from dinfer.saved.replay.record import RankRecord, RecordError
from dinfer.transport.gloo import bytes_of
from dinfer.transport.header import Header


class RecordedPeers:
    """The transport of a replayed rank, a Comm for it alone: it receives what its peers sent in the run, from the
    record, and what it sends is dropped. `positions`: returns where its lanes stand, which tells what they receive
    next, also after they have gone back."""

    def __init__(self, recorded: RankRecord) -> None:
        self.rank, self.world_size = recorded.rank, recorded.plan.world_size
        self.positions: Callable[[], tuple[int, ...]] = lambda: recorded.positions
        self._recorded = recorded
        self._payloads: dict[Channel, Tensor] = {}

    def send(self, channel: Channel, header: bytes, payload: Tensor | None) -> int:  # noqa: ARG002 - nobody receives
        return monotonic_ns()

    def recv_header(self, channel: Channel) -> bytes:
        lanes = zip(self._recorded.plan.lanes[self.rank], self.positions(), strict=True)
        ahead = (lane.ops[at] for lane, at in lanes if at < len(lane.ops) and lane.ops[at].kind == "recv")
        op = next((op for op in ahead if channel_of(self.rank, op) == channel), None)
        if op is None:
            raise RecordError(f"no lane receives from rank {channel.source} now.")
        payload = self._payloads[channel] = self._recorded.payload(op).contiguous()
        noted = self._recorded.noted.get((op.chunk, op.layer)) if op.what == "kv" else None
        tokens = payload.shape[0] if op.what == "kv" else payload.shape[1]
        return Header(
            self._recorded.plan.id, op.value, tokens, str(payload.dtype).removeprefix("torch."), payload.nbytes,
            digests=noted.announced if noted else (0, 0),
        ).pack()  # fmt: skip

    def recv_payload(self, channel: Channel, out: Tensor) -> None:
        payload = self._payloads.pop(channel)
        out.view(-1).view(torch.uint8).copy_(bytes_of(payload))

    def ahead(self, channel: Channel, most: int) -> None:
        """All messages are here."""

    def all_gather(self, data: bytes) -> list[bytes]:
        """The peers answer what this rank says; the replay compares that with the record."""
        return [data] * self.world_size

    def close(self) -> None:
        """Nothing to close."""
