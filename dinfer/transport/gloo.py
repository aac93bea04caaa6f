"""Comm: how ranks exchange messages. The only user of torch.distributed.

A message is a header and, mostly, a payload; messages of one channel arrive in the order in which they are
sent. Nothing here knows ops or plans.
"""

import contextlib
import gc
import os
from datetime import timedelta
from time import monotonic_ns
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store, TCPStore

from dinfer.plan.graph import Channel
from dinfer.transport.header import HEADER_BYTES
from dinfer.transport.interface import interface_towards

INTERFACE = "GLOO_SOCKET_IFNAME"

_chosen = ""
"""the interface that was chosen here, for where the ranks met last"""

__all__ = ["Comm", "CommError", "GlooComm", "Store", "bytes_of", "join_store", "open_store"]


class CommError(RuntimeError):
    """A message could not be sent or received; mostly the peer is gone, so this is seldom the cause."""


class Comm(Protocol):
    """What the engine needs of a transport. Each channel end is used by one thread at a time."""

    rank: int
    world_size: int

    def send(self, channel: Channel, header: bytes, payload: Tensor | None) -> int:
        """Send; returns when the peer was there to receive (monotonic ns)."""

    def recv_header(self, channel: Channel) -> bytes:
        """The next header; returns once its sender was there."""

    def recv_payload(self, channel: Channel, out: Tensor) -> None:
        """The payload announced by the last header, into a contiguous tensor of exactly its size."""

    def all_gather(self, data: bytes) -> list[bytes]:
        """Every rank's `data`, by rank. All ranks call it, from one thread each, with equally many bytes."""

    def close(self) -> None:
        """Give up all connections. Blocked calls of other threads need not return."""


class GlooComm:
    """Ranks as processes, on gloo. Hidden states, KV and control have groups of their own: a small message never
    waits behind a large one of another kind."""

    def __init__(self, rank: int, world_size: int, store: Store, start_timeout: float) -> None:
        """Raises CommError where the ranks do not find one another within `start_timeout` seconds."""
        self.rank, self.world_size = rank, world_size
        try:
            dist.init_process_group(
                "gloo",
                store=store,
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=start_timeout),
            )
            # A blocked wait must outlast any pause of a debugger; the watch for progress is kept elsewhere.
            groups = [dist.new_group(timeout=timedelta(days=7)) for _ in range(3)]
        except (RuntimeError, ValueError) as error:
            raise CommError(f"rank {rank} could not meet the other ranks: {error}") from error
        self._groups: dict[str, dist.ProcessGroup] = {"hidden": groups[0], "kv": groups[1]}
        self._control: dist.ProcessGroup | None = groups[2]

    def send(self, channel: Channel, header: bytes, payload: Tensor | None) -> int:
        group = self._group(channel)
        try:
            works = [dist.isend(_tensor(header), group=group, group_dst=channel.target)]
            if payload is not None:
                works.append(dist.isend(bytes_of(_on_host(payload)), group=group, group_dst=channel.target))
            _wait(works[0])
            met = monotonic_ns()
            for work in works[1:]:
                _wait(work)
        except RuntimeError as error:
            raise CommError(f"sending to rank {channel.target} failed: {error}") from error
        return met

    def recv_header(self, channel: Channel) -> bytes:
        header = torch.empty(HEADER_BYTES, dtype=torch.uint8)
        self._recv(channel, header)
        return header.numpy().tobytes()

    def recv_payload(self, channel: Channel, out: Tensor) -> None:
        if out.device.type == "cpu":
            self._recv(channel, bytes_of(out))
        else:
            host = torch.empty(out.shape, dtype=out.dtype, pin_memory=True)
            self._recv(channel, bytes_of(host))
            out.copy_(host, non_blocking=True)  # on the default stream, so before all that reads it

    def all_gather(self, data: bytes) -> list[bytes]:
        if self._control is None:
            raise CommError(f"rank {self.rank} has left the group that it communicates in")
        gathered = [torch.empty(len(data), dtype=torch.uint8) for _ in range(self.world_size)]
        try:
            dist.all_gather(gathered, _tensor(data), group=self._control)
        except RuntimeError as error:
            raise CommError(f"gathering from all ranks failed: {error}") from error
        return [part.numpy().tobytes() for part in gathered]

    def close(self) -> None:
        """Also ends, with an error, what other ranks still wait for from this one: their connections close with the
        last reference to the groups."""
        self._groups.clear()
        self._control = None
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()

    def _recv(self, channel: Channel, out: Tensor) -> None:
        try:
            _wait(dist.irecv(out, group=self._group(channel), group_src=channel.source))
        except RuntimeError as error:
            raise CommError(f"receiving from rank {channel.source} failed: {error}") from error

    def _group(self, channel: Channel) -> dist.ProcessGroup:
        """Raises CommError once this rank has left: the default group, in its place, may be a newer one."""
        if not self._groups:
            raise CommError(f"rank {self.rank} has left the group that it communicates in")
        group: dist.ProcessGroup = self._groups[channel.communicator]
        return group


def _on_host(tensor: Tensor) -> Tensor:
    """The tensor where gloo can send it: a CUDA tensor would end the process, so it goes through pinned memory, of
    which torch keeps a pool. Copied on the current stream: the caller says by it what to wait for."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return host


def open_store(address: str, port: int, *, exact: bool = False) -> tuple[Store, int]:
    """A store at which ranks meet, held by this process, and its port: a free one for 0 or a port in use.

    With `exact`, it is that port or CommError.
    """
    _choose_interface(address)
    for attempt in (port,) if exact else (port, 0):
        with contextlib.suppress(dist.DistNetworkError):
            store = TCPStore(address, attempt, is_master=True, wait_for_workers=False)
            return store, store.port
    if exact:
        raise CommError(
            f"port {port} cannot be opened at {address!r}: another process may have it. Choose a free one."
        )
    raise CommError(f"no port can be opened at {address!r}: master_addr must be an address of this machine.")


def join_store(address: str, port: int, timeout: float) -> Store:
    """The store that rank 0 holds. Raises CommError."""
    _choose_interface(address)
    try:
        return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout))
    except dist.DistError as error:
        raise CommError(f"rank 0 cannot be reached at {address}:{port}: {error}") from error


def _choose_interface(address: str) -> None:
    """Let gloo talk over the interface that leads to where the ranks meet. Left to itself it goes by what the host's
    name resolves to, and falls back to loopback without a word, where no other host can reach it."""
    global _chosen
    if os.environ.get(INTERFACE, _chosen) != _chosen:
        return  # it was chosen by the user
    with contextlib.suppress(OSError):
        if name := interface_towards(address):
            os.environ[INTERFACE] = _chosen = name


def _wait(work: dist.Work | None) -> None:
    if work is None:
        raise CommError("this rank is not part of the group that it communicates in")
    work.wait()


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def bytes_of(tensor: Tensor) -> Tensor:
    """The tensor's memory as bytes, without a copy: one code path for every dtype."""
    return tensor.view(-1).view(torch.uint8)
