"""Where the threads of this process stand in Python: as Python says, or, where C code holds the GIL, as C code writes
it on a signal."""

import ctypes
import faulthandler
import linecache
import os
import signal
import sys
import threading
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from .callers import DEEPEST, USER, whose
from .waits import waits_for_itself, waits_for_lock


def thread_stacks() -> list[dict[str, Any]]:
    """All threads but the calling one, the main thread first, as lines of the files have them."""
    known = {thread.ident: thread for thread in threading.enumerate()}
    main, own = threading.main_thread().ident, threading.get_ident()
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != main)
    return [_look(ident, known.get(ident), frame) for ident, frame in frames if ident != own]


DUMP_SIGNALS = tuple(int(getattr(signal, name)) for name in ("SIGUSR2", "SIGRTMAX") if hasattr(signal, name))
"""that stacks may be dumped on: the first that nobody else uses. (A rank of dinfer's uses SIGUSR2 in the same way.)"""


class _Dump(NamedTuple):
    """What this process has registered."""

    number: int
    descriptor: int
    """of the file"""
    handler: int
    """that writes into it: its address"""


_dumps: list[_Dump] = []
"""one at most"""


def dump_on_signal(path: Path) -> int | None:
    """From now on this process writes all threads' stacks into the file when it gets the signal that this returns.
    None where others use all of DUMP_SIGNALS: then none must be sent."""
    number = next(filter(_is_free, DUMP_SIGNALS), None)
    if number is None:
        return None
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    faulthandler.register(number, descriptor, all_threads=True)
    _close_dump()  # of the process that this one was forked from
    _dumps.append(_Dump(number, descriptor, _handler(number)))
    return number


def _is_free(number: int) -> bool:
    """Whether a signal does nothing but end the process, or dumps stacks for us."""
    is_ours = bool(_dumps) and _dumps[-1].number == number
    return signal.getsignal(number) == signal.SIG_DFL and (
        _handler(number) in (0, _dumps[-1].handler if is_ours else 0)
    )


def dump_no_more() -> None:
    """The signal does again what it did. Where another handler has come since, that stays, and with it the file: it may
    call the one before."""
    if dumps_still():
        faulthandler.unregister(_dumps[-1].number)
        _close_dump()


def _close_dump() -> None:
    while _dumps:
        os.close(_dumps.pop().descriptor)


def dumps_still() -> bool:
    """Whether the signal still does that: the program may have taken it since, in C, too."""
    return any(
        signal.getsignal(one.number) == signal.SIG_DFL and _handler(one.number) == one.handler
        for one in _dumps
    )


@cache
def _libc() -> ctypes.CDLL:
    """Once: each has a class of its own, which only a collection of garbage would free."""
    return ctypes.CDLL(None)


def _handler(number: int) -> int:
    """The address of the signal's handler, as the system has it: Python knows only of its own. 0: the default one, or
    it cannot be known."""
    try:
        found = (
            ctypes.c_size_t * 64
        )()  # larger than any system's struct sigaction, of which it is the first member
        failed = _libc().sigaction(number, None, found)
        return 0 if failed else int(found[0])
    except (AttributeError, OSError, TypeError):
        return 0


def _look(ident: int, thread: threading.Thread | None, frame: FrameType | None) -> dict[str, Any]:
    mine: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    while frame is not None and len(mine) + len(others) < DEEPEST:
        file, line = frame.f_code.co_filename, frame.f_lineno or 0
        text = linecache.getline(file, line, frame.f_globals).strip()[:200]
        found = {"file": file, "line": line, "function": frame.f_code.co_name, "text": text}
        (mine if whose(file) == USER else others).append(found)
        frame = frame.f_back
    number = thread.native_id if thread else None
    for_lock = None if number is None else waits_for_lock(number)
    return {
        "name": thread.name if thread else f"thread {ident}",
        "ident": ident,
        "frames": mine + others,
        "user_frames": len(mine),
        "for_itself": int(number is not None and waits_for_itself(number)),
        **({} if for_lock is None else {"for_lock": int(for_lock)}),
    }
