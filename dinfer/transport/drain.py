"""Drain: unblock lanes of living ranks that wait in the transport after another rank has failed.

A blocked wait ends only with its counterpart. So drain posts it: a void header for a recv, and for a send a recv into
scratch memory. After that the groups can be closed and rebuilt.
"""

import threading
from collections.abc import Sequence
from contextlib import suppress

import torch

from dinfer.plan.graph import Channel
from dinfer.transport.gloo import Comm, CommError
from dinfer.transport.header import VOID_HEADER, Header, TransferError


def drain(comm: Comm, sends: Sequence[Channel], recvs: Sequence[Channel]) -> None:
    """Post void headers on `sends` and recvs on `recvs`, each on its own thread. Returns at once."""
    for call, channels in ((_send, sends), (_receive, recvs)):
        for channel in channels:
            threading.Thread(target=call, args=(comm, channel), name=f"drain {channel}", daemon=True).start()


# Errors are ignored: the peer may be gone, and what it sends is dropped.


def _send(comm: Comm, channel: Channel) -> None:
    with suppress(CommError):
        comm.send(channel, VOID_HEADER, None)


def _receive(comm: Comm, channel: Channel) -> None:
    with suppress(CommError, TransferError):
        header = Header.unpack(comm.recv_header(channel))
        if not header.void:
            comm.recv_payload(channel, torch.empty(header.nbytes, dtype=torch.uint8))
