"""The log files of a run: a folder for each run, and in it a file for each rank.

A log file never fails a run: records that a full disk loses are counted, and reported at the end.
"""

import logging
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from dinfer.config import Config
from dinfer.plan.ops import Op
from dinfer.trace.events import Event

LATEST = "latest"
"""a link in log_dir to the folder of the newest run"""


def make_log_folder(folder: Path) -> None:
    """Create it, with its parents. The default log_dir ignores itself in git, as pytest's cache does. Raises
    OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    for log_dir in (folder, folder.parent):
        ignored = log_dir / ".gitignore"
        if log_dir == Path(Config.log_dir) and not ignored.exists():
            with suppress(OSError):  # a full disk must not end a run
                ignored.write_text("*\n", encoding="utf-8")


def new_run_folder(log_dir: Path) -> Path:
    """Create a folder for one run in `log_dir`, named after the time, such as run-20261130-142501, and have the link
    `latest` there point to it. Raises OSError."""
    make_log_folder(log_dir)
    name, number = time.strftime("run-%Y%m%d-%H%M%S"), 1
    while True:
        folder = log_dir / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
            break
        except FileExistsError:  # another run began in the same second
            number += 1
    link = log_dir / f".{LATEST}-{folder.name}"
    try:
        link.symlink_to(folder.name, target_is_directory=True)
        link.replace(log_dir / LATEST)
    except OSError:  # no links on this file system, or a folder of the user has that name
        link.unlink(missing_ok=True)
    return folder


class LogFile(logging.FileHandler):
    """`lost`: how many records could not be written; `trouble`: why."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, mode="w", encoding="utf-8", delay=True)
        self.trouble, self.lost = "", 0
        with suppress(OSError):  # opened again for every record
            self.stream = self._open()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError as error:  # it cannot be opened
            self._count(error)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging calls it so
        """Count it, instead of printing a traceback for every record."""
        error = sys.exception()
        if isinstance(error, OSError):
            self._count(error)
        else:
            super().handleError(record)

    def close(self) -> None:
        with suppress(OSError):  # closing flushes what still cannot be written
            super().close()

    def _count(self, error: OSError) -> None:
        self.trouble, self.lost = os.strerror(error.errno or 0), self.lost + 1


def log_trouble(log: logging.Logger) -> str:
    """How many records a logger's files have lost, and why; "" if none."""
    files = [handler for handler in log.handlers if isinstance(handler, LogFile) and handler.lost]
    return "; ".join(
        f"{file.lost} records could not be written to {file.baseFilename}: {file.trouble}" for file in files
    )


class OpLog:
    """Logs each op at level debug, and each finished chunk. Called with every event, on the lanes' threads."""

    def __init__(self, log: logging.Logger, layers: int) -> None:
        self._log, self._layers = log, layers
        self._lock = threading.Lock()
        self._computed: dict[int, list[int]] = {}
        self._blocks = 0
        self._waited = self._wire = 0

    def __call__(self, event: Event, op: Op) -> None:
        if self._log.isEnabledFor(logging.DEBUG):
            times = (event.start - event.ready) / 1e6, event.waited / 1e6, event.busy / 1e6
            self._log.debug(
                "%s: waited %.2f ms for data, %.2f ms for its peer, took %.2f ms, %d bytes",
                op,
                *times,
                event.bytes,
            )
        with self._lock:
            if op.is_transfer:
                self._waited += event.waited
                self._wire += event.busy
            if op.kind == "recv" and op.what == "kv":
                self._blocks += 1
                if self._blocks % self._layers == 0:
                    self._log.info(
                        "sync: %d blocks of other ranks received, the last c%d l%d",
                        self._blocks,
                        op.chunk,
                        op.layer,
                    )
            elif op.kind == "layer":
                self._computed.setdefault(op.chunk, []).append(op.layer)
            # A chunk has passed this stage once its hidden state is sent, or the model's last layer is done.
            is_sent = op.kind == "send" and op.what == "hidden"
            if (
                is_sent or (op.kind == "layer" and op.layer == self._layers - 1)
            ) and op.chunk in self._computed:
                layers = self._computed.pop(op.chunk)
                self._log.info(
                    "chunk %d: layers %d–%d computed; %d blocks of other ranks received; communication so far: "
                    "%.3f s waiting for peers, %.3f s on the wire",
                    op.chunk, min(layers), max(layers), self._blocks, self._waited / 1e9, self._wire / 1e9,
                )  # fmt: skip
