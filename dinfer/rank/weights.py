"""The checkpoint that a rank has loaded; the ranks of one process share theirs."""

import gc
from collections.abc import Callable

import torch

from dinfer.engine.board import Board
from dinfer.messages import LoadModel, UnloadModel
from dinfer.model.decoder import Decoder
from dinfer.rank.gpu_memory import Gauge

Identity = tuple[str, str, str]


class Weights:
    """`own_process`: no other rank is in this process, so that its GPU memory is this rank's."""

    def __init__(self, board: Board, *, own_process: bool) -> None:
        self.decoder: Decoder | None = None
        self.own_process = own_process
        self.dropped = False
        """whether others were here, which may still be in memory"""
        self._board = board
        self._identity: Identity | None = None
        self._gauge: Gauge | None = None

    def are(self, command: LoadModel | UnloadModel) -> bool:
        """Whether the checkpoint that a command names is the one that is here."""
        return self.decoder is not None and self._identity == _identity(command)

    def load(self, command: LoadModel, on_progress: Callable[[int, int], None]) -> None:
        """Load the checkpoint. Raises ModelError or OutOfMemory; then there is none."""
        if self.dropped:
            gc.collect()  # again: a collection is skipped while another rank's thread runs one
        self._board.set_phase("loading")
        self.decoder = Decoder.load(*_identity(command), on_progress=on_progress)
        self._identity, self.dropped = _identity(command), False

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
        is_own = self.own_process and device is not None and device.type == "cuda"
        self._gauge = Gauge(self._board, device) if device and is_own else None


def _identity(command: LoadModel | UnloadModel) -> Identity:
    return command.path, command.dtype, command.device
