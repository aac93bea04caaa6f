"""Gauge: how much of its GPU a rank uses, put on its board twice a second, from where the watcher takes it.

Only what torch has counted on the host is read: the device is neither asked nor waited for.
"""

import threading
from collections.abc import Callable
from contextlib import suppress

import torch

from dinfer.engine.board import Board, DeviceMemory

PERIOD_S = 0.5

Read = Callable[[torch.device], DeviceMemory]


def device_memory(device: torch.device) -> DeviceMemory:
    """Of this process on a CUDA device that it uses already."""
    return DeviceMemory(
        torch.cuda.memory_allocated(device),
        torch.cuda.memory_reserved(device),
        torch.cuda.get_device_properties(device).total_memory,
    )


class Gauge:
    """Of one device; has a thread until it is closed."""

    def __init__(self, board: Board, device: torch.device, read: Read = device_memory) -> None:
        self._board, self._device, self._read = board, device, read
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="dinfer gauge", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Nothing is on the board after this."""
        self._over.set()
        self._thread.join()
        self._board.set_device_memory(None)

    def _loop(self) -> None:
        with suppress(RuntimeError):  # of a device that has failed, which its ops tell
            while not self._over.is_set():
                self._board.set_device_memory(self._read(self._device))
                self._over.wait(PERIOD_S)
