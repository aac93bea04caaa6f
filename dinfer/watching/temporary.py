"""Folders of watches for which nobody has named one: removed once whoever watches is done and the job is over.

Who watches holds a lock in the folder. A later watch removes the folders of those that have ended without a word, as a
notebook's kernel does that is killed. Where processes of the job still run, the folder stays for a later one.
"""

import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import psutil

from dinfer.watch.probe.writing import host_in_names

try:
    import fcntl
except ImportError:  # not on this system: then no folder is removed
    fcntl = None  # type: ignore[assignment]

PREFIX, LOCK = "dinfer-watch-", "lock"


class TemporaryFolder:
    """A new folder, which is removed when this is garbage or this process ends, unless its job goes on."""

    def __init__(self) -> None:
        for left in list(_folders()):
            remove_if_over(left)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        weakref.finalize(self, _release, self.path, _lock(self.path))


def remove_if_over(folder: Path) -> bool:
    """Remove such a folder if nobody watches it and none of its processes runs; whether that was so."""
    held = _lock(folder)
    if held is None:
        return False
    return _release(folder, held)


def is_job_over(folder: Path) -> bool:
    """Whether none of the processes that have written into it, or below it, runs on this host."""
    return not any(psutil.pid_exists(pid) for pid in _processes(folder))


def _processes(folder: Path) -> Iterator[int]:
    """The numbers of those of this host."""
    name = re.compile(rf"{re.escape(host_in_names())}-(\d+)(?:-\d+)?\.jsonl")
    for path in folder.rglob("*.jsonl"):
        if found := name.fullmatch(path.name):
            yield int(found[1])


def _folders() -> Iterator[Path]:
    """Those of this and earlier watches that have a lock, so that they are whole."""
    return (path.parent for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{LOCK}"))


def _lock(folder: Path) -> BinaryIO | None:
    """Hold a folder until what this returns is closed; None if another does, or that cannot be had."""
    if fcntl is None:
        return None
    try:
        file = (folder / LOCK).open("ab")
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def _release(folder: Path, held: BinaryIO | None) -> bool:
    """Hold it no more; whether it was removed."""
    if held is None:
        return False
    with held:
        is_over = is_job_over(folder)
        if is_over:
            shutil.rmtree(folder, ignore_errors=True)
        return is_over
