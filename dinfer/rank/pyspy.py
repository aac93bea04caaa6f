"""What py-spy sees of a rank, if it is installed and may read it: the C functions that Python lines have called, which
thread holds the GIL, and the stacks of a stopped process.

It runs beside the watcher, which goes on meanwhile. It stops the rank while it reads it, for a tenth of a second, or
some seconds on busy cores: so only a rank that seems not to move is to be read. Nothing here judges.
"""

import ctypes
import json
import linecache
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from itertools import takewhile
from time import monotonic
from typing import Any

from dinfer.engine.board import anonymous_file
from dinfer.messages import SpiedFrame, SpiedThread
from dinfer.rank.stacks import DEEPEST, shortened

PATIENCE_S = 30.0
"""How long py-spy may take: on busy cores it has taken more than 5 s."""

MODES = ("--native", "--nonblocking")
"""The second sees Python only, but also if C frames cannot be read, or the process is stopped already."""

_BETWEEN = ("libpython", "python", "_ctypes", "libffi", "_cffi_backend", "ld-linux")
"""Libraries that lie between a line of Python and the C function that it calls."""


def let_look(pid: int) -> None:
    """Let that process and its children read this one; Linux (Yama) by default allows only its parents to."""
    if sys.platform == "linux":
        set_ptracer = 0x59616D61
        ctypes.CDLL(None).prctl(set_ptracer, ctypes.c_ulong(pid), *[ctypes.c_ulong(0)] * 3)


def program() -> str | None:
    """Path of py-spy, beside this Python or on PATH; None if it is missing."""
    places = (os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath))
    return shutil.which("py-spy", path=os.pathsep.join(places))


class Look:
    """py-spy at work on one process: tries MODES in order until one succeeds."""

    def __init__(self, spy: str, pid: int, *, stopped: bool) -> None:
        self._command = [spy, "dump", "--json", "--pid", str(pid)]
        self._modes = list(MODES[stopped:])
        self._until = monotonic() + PATIENCE_S
        self._begin()

    def threads(self) -> list[SpiedThread] | None:
        """What it has seen; None while it is at work; empty if it sees nothing, for whatever reason."""
        late = monotonic() > self._until
        if self._process and self._process.poll() is None and not late:
            return None
        found = read(self.end())
        if found or late or not self._modes:
            return found
        self._begin()
        return None

    def end(self) -> str:
        """End it. Returns what it has written."""
        if self._process:
            self._process.kill()
            self._process.wait()
        with self._output as file:
            file.seek(0)
            return file.read().decode(errors="replace")

    def _begin(self) -> None:
        self._output = os.fdopen(anonymous_file(0), "r+b")
        command, nothing = [*self._command, self._modes.pop(0)], subprocess.DEVNULL
        self._process: subprocess.Popen[bytes] | None = None
        with suppress(OSError):  # it cannot be executed, or there is no memory for one more process
            self._process = subprocess.Popen(command, stdin=nothing, stdout=self._output, stderr=nothing)


def read(written: str) -> list[SpiedThread]:
    """Threads from what py-spy has written; empty for anything but a whole answer."""
    found = []
    try:
        for thread in json.loads(written):
            frames = [_frame(frame) for frame in thread["frames"] if not frame["name"].startswith("0x")]
            while frames and frames[-1].line is None:  # how the thread was begun
                frames.pop()
            name = thread["thread_name"] or f"thread {thread['os_thread_id']}"
            if frames:
                found.append(SpiedThread(name, thread["owns_gil"], tuple(frames[:DEEPEST])))
    except (ValueError, KeyError, TypeError):  # an error's text, or the half of it
        return []
    return found


def _frame(frame: dict[str, Any]) -> SpiedFrame:
    name = shortened(frame["name"])
    if frame["module"]:
        return SpiedFrame(frame["module"], None, name)
    file, line = frame["filename"], frame["line"]
    return SpiedFrame(file, line, name, shortened(linecache.getline(file, line).strip()))


def in_c(frames: Sequence[SpiedFrame]) -> str:
    """The C function that the thread's Python line has called, and the innermost one; "" if none is known. Frames of
    Python itself and of bindings are left out."""
    calls = [
        frame.function
        for frame in takewhile(lambda frame: frame.line is None, frames)
        if not frame.file.rpartition("/")[2].startswith(_BETWEEN)
        and not frame.function.startswith("pybind11::")
    ]
    return " → ".join(dict.fromkeys((calls[-1], calls[0]))) if calls else ""
