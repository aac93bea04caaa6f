"""Spying: what py-spy sees of a rank, where it is installed and may look: the C functions that its Python lines have
called, which thread holds the interpreter, and all that of a stopped process too.

It runs beside the watcher, which goes on meanwhile. It stops the rank while it reads it, for a tenth of a second up to
some seconds on busy cores: only a rank that seems not to move is to be looked at. Nothing here judges.
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
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

from dinfer.engine.board import anonymous_file
from dinfer.rank.stacks import DEEPEST, LONGEST, Message

PR_SET_PTRACER = 0x59616D61

PATIENCE_S = 30.0
"""How long py-spy may take: on busy cores it has taken more than 5 s."""

WAYS = ("--native", "--nonblocking")
"""The second sees Python only, and also where C frames cannot be read, or the process is stopped already."""

_BETWEEN = ("libpython", "python", "_ctypes", "libffi", "_cffi_backend", "ld-linux")
"""what lies between a line of Python and the function that it calls: libraries, and functions"""

_BINDINGS = "pybind11::"


class Seen(NamedTuple):
    """One frame. `line` is None of a C function, whose `file` is the library that it is in."""

    file: str
    line: int | None
    function: str
    text: str = ""


def let_look(pid: int) -> None:
    """Let that process and its children look at this one, where the system (Yama) else lets only its parents."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PTRACER, ctypes.c_ulong(pid), *[ctypes.c_ulong(0)] * 3)


def program() -> str | None:
    """Where py-spy is: beside this Python, or on the path."""
    beside = Path(sys.executable).with_name("py-spy")
    return str(beside) if os.access(beside, os.X_OK) else shutil.which("py-spy")


class Look:
    """py-spy at work on one process, one way after the other until one succeeds."""

    def __init__(self, spy: str, pid: int, *, stopped: bool) -> None:
        self._command = [spy, "dump", "--json", "--pid", str(pid)]
        self._ways = list(WAYS[stopped:])
        self._until = monotonic() + PATIENCE_S
        self._begin()

    def threads(self) -> list[Message] | None:
        """What it has seen; None while it looks; empty where it sees nothing, whatever the reason."""
        late = monotonic() > self._until
        if self._process and self._process.poll() is None and not late:
            return None
        found = read(self.end())
        if found or late or not self._ways:
            return found
        self._begin()
        return None

    def end(self) -> str:
        """Look no longer; what was written."""
        if self._process:
            self._process.kill()
            self._process.wait()
        size = os.fstat(self._output).st_size
        written = os.pread(self._output, size, 0).decode(errors="replace")
        os.close(self._output)
        return written

    def _begin(self) -> None:
        self._output = anonymous_file(0)
        command = [*self._command, self._ways.pop(0)]
        nothing = subprocess.DEVNULL
        self._process: subprocess.Popen[bytes] | None = None
        with suppress(OSError):  # it is no program, or there is no memory for one more
            self._process = subprocess.Popen(command, stdin=nothing, stdout=self._output, stderr=nothing)


def read(written: str) -> list[Message]:
    """Threads from what py-spy has written: `name`, `holds_gil` and `frames`, the innermost first."""
    try:
        threads = [_thread(thread) for thread in json.loads(written)]
    except (ValueError, KeyError, TypeError):  # an error's text, or the half of it
        return []
    return [thread for thread in threads if thread["frames"]]


def _thread(thread: dict[str, Any]) -> Message:
    frames = [_seen(frame) for frame in thread["frames"] if not frame["name"].startswith("0x")]
    while frames and frames[-1].line is None:  # how the thread was begun
        frames.pop()
    return {
        "name": thread["thread_name"] or f"thread {thread['os_thread_id']}",
        "holds_gil": thread["owns_gil"],
        "frames": frames[:DEEPEST],
    }


def _seen(frame: dict[str, Any]) -> Seen:
    name = _short(frame["name"])
    if frame["module"]:
        return Seen(frame["module"], None, name)
    file, line = frame["filename"], frame["line"]
    return Seen(file, line, name, _short(linecache.getline(file, line).strip()))


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def in_c(frames: Sequence[Seen]) -> str:
    """The C functions in which a thread is, from the one that its Python line has called to the innermost; "" if
    none is known. What Python and bindings put in between is left out."""
    calls = [
        frame.function
        for frame in takewhile(lambda frame: frame.line is None, frames)
        if not frame.file.rpartition("/")[2].startswith(_BETWEEN) and not frame.function.startswith(_BINDINGS)
    ]
    return " → ".join(dict.fromkeys((calls[-1], calls[0]))) if calls else ""
