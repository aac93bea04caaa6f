"""What a rank sends by gloo, in which order; and what it says where NCCL fails."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dinfer.plan.graph import Channel
from dinfer.transport import gloo
from dinfer.transport.gloo import CommError, GlooComm
from dinfer.transport.header import HEADER_BYTES
from dinfer.transport.nccl import NcclComm
from dinfer.transport.precedence import Precedence


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
