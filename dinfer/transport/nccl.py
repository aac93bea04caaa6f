"""NcclComm: processes with a GPU each. A lowered plan's messages go from GPU to GPU by NCCL, all else by gloo."""

import os
from datetime import timedelta
from itertools import combinations

import torch
import torch.distributed as dist
from torch import Tensor

from dinfer.plan.graph import Channel
from dinfer.transport.cuda_streams import CudaStreams, HeaderToSend
from dinfer.transport.gloo import CommError, GlooComm, Store, wait_for
from dinfer.transport.streams import Streams


def has_nccl() -> bool:
    """Whether this torch has NCCL and finds a GPU."""
    return torch.cuda.is_available() and dist.is_available() and dist.is_nccl_available()


class NcclComm(GlooComm):
    """GlooComm, and streams on NCCL. The NCCL groups are made with the first streams, when ranks have agreed on a
    plan."""

    def __init__(self, rank: int, world_size: int, store: Store, start_timeout: float) -> None:
        # On an error abort the communicator, not the process: the rank must still report where it stands.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")
        super().__init__(rank, world_size, store, start_timeout)
        self._nccl: dict[str, dist.ProcessGroup] = {}

    def open_streams(self, device: torch.device, largest: int) -> Streams:  # noqa: ARG002
        if not self._nccl:
            self._connect(device)
        return NcclStreams(self.rank, device, self._nccl)

    def _connect(self, device: torch.device) -> None:
        """Make the groups, and each pair's connection by a first message, which waits for it.

        Without `device_id=`: with it, the messages of all pairs would share one queue.
        """
        try:
            word = torch.zeros(1, dtype=torch.uint8, device=device)
            for name in ("hidden", "kv"):
                group = dist.new_group(backend="nccl", timeout=timedelta(days=7))
                assert isinstance(group, dist.ProcessGroup)
                self._nccl[name] = group
                for low, high in combinations(range(self.world_size), 2):
                    for sender, receiver in ((low, high), (high, low)):
                        if self.rank == sender:
                            wait_for(dist.isend(word, group=group, group_dst=receiver))
                        elif self.rank == receiver:
                            wait_for(dist.irecv(word, group=group, group_src=sender))
                torch.cuda.synchronize(device)
        except RuntimeError as error:
            raise CommError(f"rank {self.rank} could not connect by NCCL: {error}") from error


class NcclStreams(CudaStreams):
    """CUDA streams with NCCL, whose own are one for each peer and communicator too."""

    def __init__(self, rank: int, device: torch.device, groups: dict[str, dist.ProcessGroup]) -> None:
        super().__init__(rank, device)
        self._groups = groups

    def _put(self, channel: Channel, header: HeaderToSend, payload: Tensor, met: torch.cuda.Event) -> None:
        group, peer = self._groups[channel.communicator], channel.target
        wait_for(dist.isend(header.write(header.scratch), group=group, group_dst=peer))
        met.record()
        wait_for(dist.isend(payload, group=group, group_dst=peer))

    def _take(self, channel: Channel, header: Tensor, payload: Tensor, met: torch.cuda.Event) -> None:
        group, peer = self._groups[channel.communicator], channel.source
        wait_for(dist.irecv(header, group=group, group_src=peer))
        met.record()
        wait_for(dist.irecv(payload, group=group, group_src=peer))
