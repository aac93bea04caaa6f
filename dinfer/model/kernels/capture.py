"""Capture: work as a CUDA graph, to be launched again and again."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

WARM_UPS = 2
"""runs before a capture: the first compiles kernels, the second allocates as the capture will"""


class Capture:
    """Captures work on one device; all graphs share one pool of memory, so they must run one after another.

    On a CPU the work itself stands for its graph.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        self._side: torch.cuda.Stream | None = None
        self.nbytes = 0
        """GPU memory that captures have taken, with what others took of the card meanwhile"""

    def __call__(self, work: Callable[[], None]) -> Callable[[], object]:
        """Run the work a few times, capture it, and return what launches it on the current stream."""
        if self._device.type != "cuda":
            work()
            return torch.no_grad()(work)
        with torch.cuda.device(self._device):
            return self._on_device(work)

    def _on_device(self, work: Callable[[], None]) -> Callable[[], object]:
        if self._side is None:
            # One of our own: torch's own for captures belongs to the first device that was captured on.
            self._side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side, current = self._side, torch.cuda.current_stream(self._device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                work()
        current.wait_stream(side)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        options: dict[str, Any] = {"pool": self._pool, "stream": side, "capture_error_mode": "thread_local"}
        with _no_collection(), torch.cuda.graph(graph, **options):
            work()
        return graph.replay

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Inside, what captures take of the device is added to `nbytes`: buffers, pool and the graphs themselves."""
        before = self._free()
        yield
        self.nbytes += max(0, before - self._free())

    def _free(self) -> int:
        if self._device.type != "cuda":
            return 0
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self._device)[0])


@contextmanager
def _no_collection() -> Iterator[None]:
    """A graph or tensor that is freed while another graph is captured would spoil it."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
