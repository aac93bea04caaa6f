"""The checkpoint that a rank has loaded, which ranks of one process share, and the GPU memory that it takes."""

import gc
import threading
from collections.abc import Callable
from contextlib import suppress

import torch

# Not with the first model: this brings torch.distributed.nn, which keeps the default group that there is at its import.
import transformers.masking_utils  # noqa: F401

from dinfer.engine.board import Board, DeviceMemory
from dinfer.errors import ModelError
from dinfer.messages import LoadModel, UnloadModel
from dinfer.model.decoder import Decoder

PERIOD_S = 0.5


class Gauge:
    """Puts on the rank's board, twice a second, how much of its GPU it uses; the watcher reads it there.

    It has a thread until it is closed. Only what torch has counted on the host is read: the device is neither asked nor
    waited for.
    """

    def __init__(self, board: Board, device: torch.device) -> None:
        self._board, self._device = board, device
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="dinfer gauge", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Nothing is on the board after this."""
        self._over.set()
        self._thread.join()
        self._board.set_device_memory(None)

    def _loop(self) -> None:
        cuda, device = torch.cuda, self._device
        with suppress(RuntimeError):  # of a device that has failed, which its ops report
            while not self._over.is_set():
                total = cuda.get_device_properties(device).total_memory
                used = cuda.memory_allocated(device), cuda.memory_reserved(device)
                self._board.set_device_memory(DeviceMemory(*used, total))
                self._over.wait(PERIOD_S)


class Weights:
    """`alone`: no other rank is in this process, so that its GPU memory is this rank's."""

    def __init__(self, board: Board, *, alone: bool) -> None:
        self.decoder: Decoder | None = None
        self.alone = alone
        self.dropped = False
        """whether others were here, which may still be in memory"""
        self._board = board
        self._identity: tuple[str, str, str, str] | None = None
        self._gauge: Gauge | None = None

    def are(self, command: LoadModel | UnloadModel) -> bool:
        """Whether the checkpoint that a command names is the one that is here, and as it was loaded."""
        return self.decoder is not None and self._identity == _identity(command) and self.decoder.is_intact()

    def load(self, command: LoadModel, on_progress: Callable[[int, int], None]) -> None:
        """Load the checkpoint. Raises ModelError, also where this rank finds other files than the session, or
        OutOfMemory; then there is none."""
        if self.dropped:
            gc.collect()  # again: a collection is skipped while another rank's thread runs one
        self._board.set_phase("loading")
        # A session in this process must outlive a file that is shortened.
        path, dtype, device, wanted = _identity(command)
        decoder = Decoder.load(path, dtype, device, on_progress=on_progress, mapped=self.alone)
        if (found := decoder.spec.fingerprint) != wanted:
            raise ModelError(
                f"{path} holds another checkpoint here (fingerprint {found[:16]}) than the session has read "
                f"({wanted[:16]}). Give all hosts the same files; if they have changed since they were loaded, "
                f"session.load({path!r}) loads them on all ranks"
            )
        self.decoder, self._identity, self.dropped = decoder, _identity(command), False

    def share(self, other: "Weights") -> None:
        """Use what another rank of this process has loaded."""
        self.decoder, self._identity, self.dropped = other.decoder, other._identity, False

    def drop(self) -> None:
        self.decoder = self._identity = None
        self.dropped = True

    def measure(self, device: torch.device | None) -> None:
        """Publish what this process uses of that device on the board, where it is a GPU of its own."""
        if self._gauge:
            self._gauge.close()
        is_own = self.alone and device is not None and device.type == "cuda"
        self._gauge = Gauge(self._board, device) if device and is_own else None


def _identity(command: LoadModel | UnloadModel) -> tuple[str, str, str, str]:
    return command.path, command.dtype, command.device, command.fingerprint
