"""A rank's log file that never ends a run: what a full disk swallows is counted, and told once, at the end."""

import contextlib
import logging
import os
import sys
from pathlib import Path


class LogFile(logging.FileHandler):
    """Once records cannot be written, `trouble` says why, and `lost` counts them."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, mode="w", encoding="utf-8", delay=True)
        self.trouble, self.lost = "", 0
        with contextlib.suppress(OSError):  # tried again with every record
            self.stream = self._open()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError as error:  # it cannot be opened
            self._count(error)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging calls it so
        """In place of a traceback on stderr for every record."""
        error = sys.exception()
        if isinstance(error, OSError):
            self._count(error)
        else:
            super().handleError(record)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it flushes, and what could not be written still cannot
            super().close()

    def _count(self, error: OSError) -> None:
        self.trouble, self.lost = os.strerror(error.errno or 0), self.lost + 1


def log_trouble(log: logging.Logger) -> str:
    """What was lost of a logger's files; "" where nothing was."""
    files = [handler for handler in log.handlers if isinstance(handler, LogFile) and handler.lost]
    return "; ".join(
        f"{file.lost} records could not be written to {file.baseFilename}: {file.trouble}" for file in files
    )
