"""Which transport a backend is."""

from dinfer.config import Backend
from dinfer.transport.gloo import Comm, GlooComm, Store
from dinfer.transport.ipc import IpcComm
from dinfer.transport.nccl import NcclComm


def open_comm(backend: Backend, rank: int, world_size: int, store: Store, start_timeout: float) -> Comm:
    """Connect by gloo, nccl or ipc. Raises CommError if the ranks do not meet within `start_timeout` seconds."""
    kind = {"nccl": NcclComm, "ipc": IpcComm}.get(backend, GlooComm)
    return kind(rank, world_size, store, start_timeout)
