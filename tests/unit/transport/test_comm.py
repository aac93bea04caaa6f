"""What a rank sends by gloo, in which order; and what it says where NCCL fails."""

from __future__ import annotations

from collections import deque

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dinfer.plan.graph import Channel
from dinfer.plan.ops import Value
from dinfer.transport import gloo
from dinfer.transport.gloo import CommError, GlooComm
from dinfer.transport.header import HEADER_BYTES, VOID_HEADER, Header, TransferError
from dinfer.transport.nccl import NcclComm
from dinfer.transport.precedence import Precedence, with_pieces


class Sent:
    def wait(self) -> None:
        pass


def test_a_header_does_not_wait_for_the_copy_of_its_payload(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the copy would count as the receiver's wait for its peer, not as time on the wire."""
    done = list[str]()

    def isend(part: Tensor, **_: object) -> Sent:
        done.append(f"send {part.numel()} bytes")
        return Sent()

    def on_host(tensor: Tensor) -> Tensor:
        done.append("copy")
        return tensor

    monkeypatch.setattr(dist, "isend", isend)
    monkeypatch.setattr(gloo, "_on_host", on_host)
    comm = object.__new__(GlooComm)
    monkeypatch.setattr(comm, "_group", lambda _: None)
    comm._precedence = Precedence()
    comm.send(Channel("kv", 0, 1), bytes(HEADER_BYTES), torch.zeros(2))
    assert done == ["send 64 bytes", "copy", "send 8 bytes"]


def test_a_device_that_fails_while_nccl_connects_is_an_error_of_communication(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: object, **__: object) -> Tensor:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "zeros", fails)
    comm = object.__new__(NcclComm)
    comm.rank, comm.world_size, comm._nccl = 1, 2, {}
    with pytest.raises(CommError, match="rank 1 could not connect by NCCL: CUDA error: out of memory"):
        comm.open_streams(torch.device("cuda:0"), 0)


class Wire:
    """The receiving end of gloo on one channel: what has been posted, in order, and what is filled in as it comes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.posted: deque[tuple[Tensor, Received]] = deque()
        self.came: deque[bytes] = deque()
        monkeypatch.setattr(dist, "irecv", self.irecv)
        self.comm = comm = object.__new__(GlooComm)
        monkeypatch.setattr(comm, "_group", lambda _: None)
        comm._precedence, comm._pieces, comm._ahead = Precedence(), {}, {}

    def irecv(self, part: Tensor, **_: object) -> Received:
        work = Received(self)
        self.posted.append((part, work))
        return work

    def send(self, *messages: bytes) -> None:
        self.came.extend(messages)
        self.deliver()

    def deliver(self) -> None:
        """What has come lands in what has been posted, as far as both go."""
        while self.posted and self.came:
            part, work = self.posted.popleft()
            part.copy_(torch.frombuffer(bytearray(self.came.popleft()), dtype=torch.uint8))
            work.is_here = True


class Received:
    """gloo waits for a second message where a work is waited for twice."""

    def __init__(self, wire: Wire) -> None:
        self._wire, self.is_here, self.waits = wire, False, 0

    def wait(self) -> None:
        self.waits += 1
        self._wire.deliver()
        assert self.is_here, "it would wait for ever"
        assert self.waits == 1, "it would wait for a second message"


KV = Channel("kv", 1, 0)


def message(number: int, nbytes: int) -> tuple[bytes, bytes]:
    """Header and payload of a block."""
    header = Header(1, Value("kv", number, 0), 4, "float32", nbytes, changed=3).pack()
    return header, bytes([number]) * nbytes


def received(comm: GlooComm) -> bytes:
    """The next message's payload, by way of its header."""
    out = torch.empty(Header.unpack(comm.recv_header(KV)).nbytes, dtype=torch.uint8)
    comm.recv_payload(KV, out)
    return out.numpy().tobytes()


def test_the_next_message_comes_while_the_last_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire(monkeypatch)
    comm, messages = wire.comm, [message(number, 100 + number) for number in range(4)]
    wire.send(*messages[0])
    assert received(comm) == messages[0][1]
    for _, payload in messages[1:]:
        comm.ahead(KV, 1000)
        comm.ahead(KV, 1000)  # nothing has come yet
        assert len(wire.posted) == 1
        wire.send(messages[payload[0]][0])
        comm.ahead(KV, 1000)
        wire.send(payload)
        assert not wire.came, "it has been taken in before anybody asks for it"
        comm.ahead(KV, 1000)
        assert received(comm) == payload
    assert not wire.posted


def test_a_message_that_is_only_expected_is_received_as_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire(monkeypatch)
    wire.comm.ahead(KV, 1000)
    wire.send(*message(7, 5))
    assert received(wire.comm) == bytes([7]) * 5


@pytest.mark.parametrize("pieces", [2, 5])
def test_a_block_in_pieces_comes_ahead_with_its_first_ones(
    monkeypatch: pytest.MonkeyPatch, pieces: int
) -> None:
    wire, (header, payload) = Wire(monkeypatch), message(7, 100)
    wire.comm.ahead(KV, 1000)
    wire.send(with_pieces(header, pieces))
    wire.comm.ahead(KV, 1000)
    assert len(wire.posted) == 2
    size = 100 // pieces
    wire.send(*(payload[n : n + size] for n in range(0, 100, size)))
    assert received(wire.comm) == payload


def test_a_void_header_releases_a_recv_that_was_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire(monkeypatch)
    wire.comm.ahead(KV, 1000)
    wire.send(VOID_HEADER)
    wire.comm.ahead(KV, 1000)
    wire.comm.ahead(KV, 1000)
    assert not wire.posted
    assert Header.unpack(wire.comm.recv_header(KV)).void
    wire.send(*message(7, 5))
    assert received(wire.comm) == bytes([7]) * 5


def test_what_is_longer_than_any_block_takes_no_memory_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    wire, (header, payload) = Wire(monkeypatch), message(7, 2000)
    wire.comm.ahead(KV, 1000)
    wire.send(header)
    wire.comm.ahead(KV, 1000)
    assert not wire.posted
    wire.send(payload)
    assert received(wire.comm) == payload


def test_a_damaged_header_is_told_by_who_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the op before, and not as a peer that is gone."""
    wire = Wire(monkeypatch)
    wire.comm.ahead(KV, 1000)
    wire.send(b"\x07" * HEADER_BYTES)
    wire.comm.ahead(KV, 1000)
    assert not wire.posted
    with pytest.raises(TransferError):
        Header.unpack(wire.comm.recv_header(KV))
