"""Drain: free lanes of living ranks that are blocked in the transport after another rank has failed.

A blocked wait ends only when its counterpart comes. So the counterpart is posted: a void header for who receives, a
recv into memory that nobody reads for who sends. Afterwards the groups can be closed and made anew.
"""

import threading
from collections.abc import Sequence
from contextlib import suppress

import torch

from dinfer.plan.graph import Channel
from dinfer.transport.gloo import Comm, CommError
from dinfer.transport.header import VOID_HEADER, Header, TransferError


def drain(comm: Comm, sends: Sequence[Channel], recvs: Sequence[Channel]) -> None:
    """Post, each on a thread of its own: void headers on `sends`, recvs on `recvs`. Returns at once."""
    for call, channels in ((_send, sends), (_receive, recvs)):
        for channel in channels:
            threading.Thread(target=call, args=(comm, channel), name=f"drain {channel}", daemon=True).start()


# The peer may be gone after all, and what it sends ends here anyhow.


def _send(comm: Comm, channel: Channel) -> None:
    with suppress(CommError):
        comm.send(channel, VOID_HEADER, None)


def _receive(comm: Comm, channel: Channel) -> None:
    with suppress(CommError, TransferError):
        header = Header.unpack(comm.recv_header(channel))
        if not header.void:
            comm.recv_payload(channel, torch.empty(header.nbytes, dtype=torch.uint8))
