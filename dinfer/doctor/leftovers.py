"""What earlier runs have left behind: ranks and watchers whose client is gone, and old temporary folders.

It names them and the command that removes them; it ends and removes nothing, and leaves out what is others'.
"""

import os
import shlex
import stat
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dinfer.doctor.check import Check, gib

MARKS = {"dinfer.rank.worker": "rank", "dinfer.rank.watcher": "watcher"}

OLD_S = 3600.0
"""a folder untouched for that long belongs to no run that still starts"""


@dataclass(frozen=True)
class Process:
    """One process as /proc shows it; `parent` is a process id, `state` its letter there."""

    pid: int
    parent: int
    command: str
    state: str = "S"
    mine: bool = True

    @property
    def kind(self) -> str:
        """rank or watcher; "" for what is not dinfer's, or not this user's."""
        return next((kind for mark, kind in MARKS.items() if self.mine and mark in self.command), "")


def process_check(proc: Path = Path("/proc")) -> Check:
    if not (proc / "self").exists():
        found = "this system has no /proc to read processes from"
        return Check("old processes", "unchecked", found, "look yourself: ps -ax | grep dinfer.engine")
    return judge_processes(orphans(read_processes(proc)))


def read_processes(proc: Path) -> dict[int, Process]:
    """All processes by id; those that end meanwhile are left out."""
    processes = {}
    for folder in proc.iterdir():
        if folder.name.isdigit():
            with suppress(OSError, ValueError, IndexError):
                processes[int(folder.name)] = _read_process(folder)
    return processes


def _read_process(folder: Path) -> Process:
    words = (folder / "stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    mine = folder.stat().st_uid == os.getuid()
    return Process(int(folder.name), int(words[1]), command, words[0], mine)


def orphans(processes: Mapping[int, Process]) -> list[Process]:
    """Ranks and watchers without the process that started them, which is always a Python.

    A process whose parent ends gets another: the first one, or one that adopts, such as systemd --user.
    """
    return [p for _, p in sorted(processes.items()) if p.kind and _is_adopted(processes.get(p.parent))]


def _is_adopted(parent: Process | None) -> bool:
    if parent is None:
        return True
    own_words = ("dinfer",) if parent.pid == 1 else ("dinfer", "python", "jupyter")
    return not any(word in parent.command.lower() for word in own_words)


def judge_processes(left: Sequence[Process]) -> Check:
    if not left:
        return Check("old processes", "ok", "no rank or watcher of an earlier run")
    named = ", ".join(f"{p.kind} {p.pid}{' (stopped)' if p.state == 'T' else ''}" for p in left)
    force = "-9 " if any(p.state == "T" for p in left) else ""  # one that is stopped takes no other signal
    fix = f"kill {force}{' '.join(str(p.pid) for p in left)}"
    return Check(
        "old processes",
        "warn",
        f"{len(left)} left by {'a run' if len(left) == 1 else 'runs'} whose client is gone: {named}",
        fix,
    )


def folder_check() -> Check:
    return judge_folders(old_folders(Path(tempfile.gettempdir()), time.time()))


def old_folders(temp: Path, now: float) -> list[tuple[Path, int]]:
    """Folders `dinfer-*` of this user that nothing has touched for OLD_S, and their sizes in bytes."""
    return [(folder, _size(folder)) for folder in sorted(temp.glob("dinfer-*")) if _is_old(folder, now)]


def _is_old(folder: Path, now: float) -> bool:
    try:
        about = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid() and now - about.st_mtime > OLD_S


def _size(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with suppress(OSError):
            total += file.lstat().st_size
    return total


def judge_folders(left: Sequence[tuple[Path, int]]) -> Check:
    if not left:
        return Check("old folders", "ok", f"none in {tempfile.gettempdir()}")
    size = gib(sum(size for _, size in left))
    found = f"{len(left)} of earlier runs in {left[0][0].parent}, {size}"
    fix = "rm -r " + " ".join(shlex.quote(str(folder)) for folder, _ in left)
    return Check("old folders", "warn", found, fix)
