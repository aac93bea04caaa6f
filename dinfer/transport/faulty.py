"""Faulty transports for the fault lab: each wraps a rank's Comm for one op and breaks one thing."""

import time
from dataclasses import replace

import torch
from torch import Tensor

from dinfer.plan.graph import Channel
from dinfer.transport.gloo import Comm
from dinfer.transport.header import Header


class FaultyComm:
    """The base class: passes everything on to `comm`."""

    def __init__(self, comm: Comm) -> None:
        self.comm, self.rank, self.world_size = comm, comm.rank, comm.world_size

    def send(self, channel: Channel, header: bytes, payload: Tensor | None) -> int:
        return self.comm.send(channel, header, payload)

    def recv_header(self, channel: Channel) -> bytes:
        return self.comm.recv_header(channel)

    def recv_payload(self, channel: Channel, out: Tensor) -> None:
        self.comm.recv_payload(channel, out)

    def all_gather(self, data: bytes) -> list[bytes]:
        return self.comm.all_gather(data)

    def close(self) -> None:
        self.comm.close()


class SendsTwice(FaultyComm):
    """Sends every message twice."""

    def send(self, channel: Channel, header: bytes, payload: Tensor | None) -> int:
        met = self.comm.send(channel, header, payload)
        self.comm.send(channel, header, payload)
        return met


class SendsLonger(FaultyComm):
    """Sends one token more than the payload has."""

    def send(self, channel: Channel, header: bytes, payload: Tensor | None) -> int:
        assert payload is not None
        true = Header.unpack(header)
        longer = true.nbytes // true.tokens * (true.tokens + 1)
        changed = replace(true, tokens=true.tokens + 1, nbytes=longer)
        return self.comm.send(channel, changed.pack(), torch.zeros(longer, dtype=torch.uint8))


class SendsElsewhere(FaultyComm):
    """Sends to rank `target` instead of the channel's."""

    def __init__(self, comm: Comm, target: int) -> None:
        super().__init__(comm)
        self._target = target

    def send(self, channel: Channel, header: bytes, payload: Tensor | None) -> int:
        return self.comm.send(channel._replace(target=self._target), header, payload)


class SlowReceiver(FaultyComm):
    """Delays each payload by `seconds`."""

    def __init__(self, comm: Comm, seconds: float) -> None:
        super().__init__(comm)
        self._seconds = seconds

    def recv_payload(self, channel: Channel, out: Tensor) -> None:
        time.sleep(self._seconds)
        self.comm.recv_payload(channel, out)


class CutLink(FaultyComm):
    """Receives nothing, without an error: it waits for a gather that no other rank joins."""

    def recv_header(self, channel: Channel) -> bytes:
        self.comm.all_gather(b"cut")
        return self.comm.recv_header(channel)
