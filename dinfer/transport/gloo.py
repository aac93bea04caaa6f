"""Comm: how ranks exchange messages; and GlooComm, which does so by gloo.

A message is a header and usually a payload. Messages of one channel arrive in the order of their sends.
"""

import gc
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from time import monotonic_ns
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store as Store
from torch._C._distributed_c10d import TCPStore

from dinfer.plan.graph import Channel
from dinfer.transport.header import HEADER_BYTES, VOID_HEADER, Header, TransferError
from dinfer.transport.interface import interface_towards
from dinfer.transport.precedence import UNDER_WAY, Precedence, Way, cut, pieces_in, with_pieces

INTERFACE = "GLOO_SOCKET_IFNAME"

_chosen = ""
"""the interface that `_choose_interface` set last"""


class CommError(RuntimeError):
    """A message could not be sent or received, usually because the peer is gone: look for the cause there."""


class Comm(Protocol):
    """What the engine uses of a transport. One thread at a time uses each end of a channel."""

    rank: int
    world_size: int

    def send(self, channel: Channel, header: bytes, payload: Tensor | None) -> int:
        """Send a message. Returns when the peer was ready to receive (monotonic ns).

        A message need not be queued whole: its payload, or pieces of it, may be posted only once the peer has received
        what came before, so a second message on this channel before the return could come in between."""

    def recv_header(self, channel: Channel) -> bytes:
        """Receive the next header; blocks until it is sent."""

    def recv_payload(self, channel: Channel, out: Tensor) -> None:
        """Receive the payload of the last header into `out`, a contiguous tensor of exactly its size."""

    def ahead(self, channel: Channel, most: int) -> None:
        """Take in what has come of the channel's next message, without waiting for it: the caller is busy with the last
        one, and calls this now and then. A payload of up to `most` bytes comes too. The message is then received as any
        other; where none ever comes, nothing is lost."""

    def all_gather(self, data: bytes) -> list[bytes]:
        """Every rank's `data`, by rank. All ranks call it, from one thread each, with the same number of bytes."""

    def close(self) -> None:
        """Close all connections. Blocked calls of other threads may never return."""


def drain(comm: Comm, sends: Sequence[Channel], recvs: Sequence[Channel]) -> None:
    """Unblock lanes of living ranks that wait for a failed one, so that the groups can be closed and rebuilt.

    A blocked wait ends only with its counterpart. So post it: void headers on `sends`, and on `recvs` a recv into
    scratch memory, each on a thread of its own. Returns at once. Errors are ignored: the peer may be gone.
    """

    def send(channel: Channel) -> None:
        with suppress(CommError):
            comm.send(channel, VOID_HEADER, None)

    def receive(channel: Channel) -> None:
        with suppress(CommError, TransferError):
            header = Header.unpack(comm.recv_header(channel))
            if not header.void:
                comm.recv_payload(channel, torch.empty(header.nbytes, dtype=torch.uint8))

    for call, channels in ((send, sends), (receive, recvs)):
        for channel in channels:
            threading.Thread(target=call, args=(channel,), name=f"drain {channel}", daemon=True).start()


_UNTOUCHED = 255
"""the last byte of a header that has yet to come; every header has 0 there. (gloo tells only who waits for a message
that it is here.)"""


@dataclass
class _Ahead:
    """A message that is expected before anybody asks for it. `work`: the header's, None once that is here; `payload`:
    None until then, and for a message that is not taken in ahead (void, damaged or too large); `posted`: its first
    pieces."""

    header: Tensor
    work: dist.Work | None
    payload: Tensor | None = None
    posted: list[dist.Work | None] = field(default_factory=list)


class GlooComm:
    """Messages between processes by gloo. Hidden states, KV and control have a group each, so that a small message
    never waits for a large one of another kind."""

    def __init__(self, rank: int, world_size: int, store: Store, start_timeout: float) -> None:
        """Connect to the other ranks. Raises CommError if they do not meet within `start_timeout` seconds."""
        self.rank, self.world_size = rank, world_size
        self._precedence = Precedence()
        self._pieces: dict[Channel, int] = {}
        """by channel, in how many pieces the payload of the last header comes"""
        self._ahead: dict[Channel, _Ahead] = {}
        timeout = timedelta(seconds=start_timeout)
        try:
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
            # A blocked wait must outlast any pause of a debugger; `monitor` watches for progress.
            self._groups: dict[str, dist.ProcessGroup] = {
                name: dist.new_group(timeout=timedelta(days=7)) for name in ("hidden", "kv", "control")
            }
        except (RuntimeError, ValueError) as error:
            raise CommError(f"rank {rank} could not meet the other ranks: {error}") from error

    def send(self, channel: Channel, header: bytes, payload: Tensor | None) -> int:
        count = self._precedence.pieces(channel, payload.nbytes) if payload is not None else 1
        try:
            works = [self._isend(channel, _tensor(with_pieces(header, count)))]
            if payload is None:
                wait_for(works[0])
                return monotonic_ns()
            # The header is on its way while the payload is copied from its device.
            pieces = cut(bytes_of(_on_host(payload)), count)
            if count == 1:
                works.append(self._isend(channel, pieces[0]))
            wait_for(works[0])
            met = monotonic_ns()
            if channel.communicator != "kv":
                with self._precedence.hidden("out"):
                    wait_for(works[1])
            else:
                self._move(partial(self._isend, channel), pieces, "out", works[1:])
                self._precedence.sent(channel, payload.nbytes, count, (monotonic_ns() - met) / 1e9)
        except RuntimeError as error:
            raise CommError(f"sending to rank {channel.target} failed: {error}") from error
        return met

    def recv_header(self, channel: Channel) -> bytes:
        ahead = self._ahead.get(channel)
        if ahead is None:
            header = torch.empty(HEADER_BYTES, dtype=torch.uint8)
            self._recv(channel, (header,))
        else:
            header = ahead.header
            if ahead.work is not None:
                self._recv(channel, (header,), [ahead.work])
            if ahead.payload is None:
                del self._ahead[channel]
        data = header.numpy().tobytes()
        self._pieces[channel] = pieces_in(data)
        return data

    def recv_payload(self, channel: Channel, out: Tensor) -> None:
        count, ahead = self._pieces.get(channel, 1), self._ahead.pop(channel, None)
        if ahead is not None and ahead.payload is not None:
            self._recv(channel, cut(ahead.payload, count), ahead.posted)
            bytes_of(out).copy_(ahead.payload)
            return
        on_host = (
            out if out.device.type == "cpu" else torch.empty(out.shape, dtype=out.dtype, pin_memory=True)
        )
        self._recv(channel, cut(bytes_of(on_host), count))
        if on_host is not out:
            out.copy_(on_host, non_blocking=True)  # on the default stream, so before all that reads it

    def ahead(self, channel: Channel, most: int) -> None:
        ahead = self._ahead.get(channel)
        try:
            if ahead is None:
                header = torch.full((HEADER_BYTES,), _UNTOUCHED, dtype=torch.uint8)
                self._ahead[channel] = _Ahead(header, self._irecv(channel, header))
            elif ahead.work is not None and ahead.header[-1] != _UNTOUCHED:
                wait_for(ahead.work)
                ahead.work = None  # gloo would wait for a second message
                self._post_payload(channel, ahead, most)
        except RuntimeError as error:
            raise CommError(f"receiving from rank {channel.source} failed: {error}") from error

    def _post_payload(self, channel: Channel, ahead: _Ahead, most: int) -> None:
        data = ahead.header.numpy().tobytes()
        try:
            came = Header.unpack(data)
        except TransferError:  # the op that takes this message says so
            return
        if not came.void and came.nbytes <= most:
            ahead.payload = torch.empty(came.nbytes, dtype=torch.uint8)
            pieces = cut(ahead.payload, pieces_in(data))[:UNDER_WAY]
            ahead.posted = [self._irecv(channel, piece) for piece in pieces]

    def all_gather(self, data: bytes) -> list[bytes]:
        group = self._group("control")
        gathered = [torch.empty(len(data), dtype=torch.uint8) for _ in range(self.world_size)]
        try:
            dist.all_gather(gathered, _tensor(data), group=group)
        except RuntimeError as error:
            raise CommError(f"gathering from all ranks failed: {error}") from error
        return [part.numpy().tobytes() for part in gathered]

    def close(self) -> None:
        """Also ends other ranks' waits for this one, with an error: connections close with the last reference to the
        groups."""
        self._groups.clear()
        self._ahead.clear()
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()

    def _isend(self, channel: Channel, part: Tensor) -> dist.Work | None:
        return dist.isend(part, group=self._group(channel.communicator), group_dst=channel.target)

    def _irecv(self, channel: Channel, part: Tensor) -> dist.Work | None:
        return dist.irecv(part, group=self._group(channel.communicator), group_src=channel.source)

    def _recv(
        self, channel: Channel, parts: Sequence[Tensor], posted: Sequence[dist.Work | None] = ()
    ) -> None:
        """Receive a header or a payload, of which the first parts may be posted."""
        is_hidden = channel.communicator != "kv" and parts[0].numel() > HEADER_BYTES
        try:
            with self._precedence.hidden("in") if is_hidden else nullcontext():
                self._move(partial(self._irecv, channel), parts, "in", list(posted))
        except RuntimeError as error:
            raise CommError(f"receiving from rank {channel.source} failed: {error}") from error

    def _move(
        self,
        post: Callable[[Tensor], dist.Work | None],
        parts: Sequence[Tensor],
        way: Way,
        posted: list[dist.Work | None],
    ) -> None:
        """Post each part that is not yet, the next one while one travels, and wait for all. Before a piece of several
        hidden states go first."""
        for part in parts[len(posted) :]:
            if len(parts) > 1:
                self._precedence.give_way(way)
            posted.append(post(part))
            if len(posted) > 1:
                wait_for(posted[-2])
        wait_for(posted[-1])

    def _group(self, name: str) -> dist.ProcessGroup:
        """Raises CommError after `close`. (A group of None would mean the default group, which may be a newer one.)"""
        if name not in self._groups:
            raise CommError(f"rank {self.rank} has left the group that it communicates in")
        return self._groups[name]


def _on_host(tensor: Tensor) -> Tensor:
    """The tensor on the CPU. (gloo aborts the process for a CUDA tensor.) A CUDA tensor is copied to pinned memory, of
    which torch keeps a pool, on the current stream, by which callers choose what the copy waits for."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return host


def open_store(address: str, port: int, *, exact: bool = False) -> tuple[Store, int]:
    """Open a store at which ranks meet. Returns it and its port: a free one if `port` is 0 or in use.

    Raises CommError if no port can be opened or, with `exact`, if `port` itself cannot.
    """
    _choose_interface(address)
    for attempt in (port,) if exact else (port, 0):
        with suppress(dist.DistNetworkError):
            store = TCPStore(address, attempt, is_master=True, wait_for_workers=False)
            return store, store.port
    if exact:
        raise CommError(
            f"port {port} cannot be opened at {address!r}: another process may use it. Choose a free one."
        )
    raise CommError(f"no port can be opened at {address!r}: master_addr must be an address of this machine.")


def join_store(address: str, port: int, timeout: float) -> Store:
    """Connect to the store of rank 0. Raises CommError if that fails within `timeout` seconds."""
    _choose_interface(address)
    try:
        return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout))
    except dist.DistError as error:
        raise CommError(f"rank 0 cannot be reached at {address}:{port}: {error}") from error


def _choose_interface(address: str) -> None:
    """Let gloo use the interface that leads to `address`, unless the user has set one. By default gloo uses the one
    that the host's name resolves to and falls back to loopback silently, where no other host can reach it."""
    global _chosen
    if os.environ.get(INTERFACE, _chosen) == _chosen:  # else set by the user
        with suppress(OSError):
            if name := interface_towards(address):
                os.environ[INTERFACE] = _chosen = name


def wait_for(work: dist.Work | None) -> None:
    """Wait for a transfer: on gloo the calling thread waits, on NCCL the current CUDA stream. Raises CommError."""
    if work is None:
        raise CommError("this rank is not part of the group that it communicates in")
    work.wait()


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def bytes_of(tensor: Tensor) -> Tensor:
    """A view of a contiguous tensor as bytes, uint8 [nbytes]; one code path for every dtype."""
    return tensor.view(-1).view(torch.uint8)
