"""Temporary folders that are removed also where whoever used one has ended without a word, as a notebook's kernel does
that is killed.

Who uses a folder holds a lock in it, which the system ends with the process. Whoever makes the next one removes those
that nobody holds.
"""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # not on this system: then no folder of another process is removed
    fcntl = None  # type: ignore[assignment]

LOCK = "lock"

IsOver = Callable[[Path], bool]


def _always(_: Path) -> bool:
    return True


def new_folder(prefix: str, is_over: IsOver = _always) -> tuple[Path, BinaryIO | None]:
    """A new folder, held until the file is closed; None where that is not possible. Before, those of this prefix are
    removed that nobody holds and that are over: `is_over(folder)`."""
    # What has no lock is not whole yet, or not of this kind.
    for lock in list(Path(tempfile.gettempdir()).glob(f"{prefix}*/{LOCK}")):
        remove_if_over(lock.parent, is_over)
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    new = folder / f"{LOCK}-new"
    held = _hold(new)
    if held:
        new.rename(folder / LOCK)  # once it is held, so that nobody else can be first
    return folder, held


def remove_if_over(folder: Path, is_over: IsOver = _always) -> bool:
    """Remove such a folder if nobody holds it and it is over; whether that was so."""
    held = _hold(folder / LOCK)
    return held is not None and release(folder, held, is_over)


def is_held(folder: Path) -> bool:
    """Whether somebody uses such a folder; False for a folder of another kind."""
    lock = folder / LOCK
    if not lock.exists():
        return False
    held = _hold(lock)
    if held:
        held.close()
    return held is None


def release(folder: Path, held: BinaryIO, is_over: IsOver = _always) -> bool:
    """Hold it no more, and remove it if it is over; whether that was so."""
    with held:
        found = is_over(folder)
        if found:
            shutil.rmtree(folder, ignore_errors=True)
        return found


def _hold(lock: Path) -> BinaryIO | None:
    """Hold that file until what this returns is closed; None if another does, or that cannot be had."""
    if fcntl is None:
        return None
    try:
        file = lock.open("ab")
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file
