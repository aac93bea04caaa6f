"""What earlier runs have left behind: ranks and watchers whose client has ended, and old temporary folders.

The checks name them and the command that removes them. They end and remove nothing, and skip what belongs to other
users.
"""

import os
import shlex
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from dinfer.doctor.report import Check, gib
from dinfer.temporary import is_held
from dinfer.watching.temporary import is_job_over

OLD_S = 3600.0
"""a folder that nothing has touched for this long belongs to no run that is starting"""


@dataclass(frozen=True)
class Process:
    """A process. `parent`: a process id; `state`: as psutil names it; `mine`: whether it belongs to this user."""

    pid: int
    parent: int
    command: str
    state: str = psutil.STATUS_SLEEPING
    mine: bool = True

    @property
    def kind(self) -> str:
        """rank or watcher; "" for processes that are not dinfer's or belong to another user."""
        marks = {"dinfer.rank.worker": "rank", "dinfer.rank.watcher": "watcher"}
        return next((kind for mark, kind in marks.items() if self.mine and mark in self.command), "")


def read_processes() -> dict[int, Process]:
    """All processes of this machine, by id."""
    user = os.getuid() if hasattr(os, "getuid") else None
    found = {}
    for process in psutil.process_iter(["ppid", "cmdline", "status", "uids"]):
        about = process.info
        mine = about["uids"] is not None and about["uids"].effective == user
        command = " ".join(about["cmdline"] or ())
        found[process.pid] = Process(process.pid, about["ppid"] or 0, command, about["status"], mine)
    return found


def orphans(processes: Mapping[int, Process]) -> list[Process]:
    """Ranks and watchers whose starter, which is always a Python process, has ended.

    A process whose parent ends gets another: process 1, or one that adopts processes, such as systemd --user.
    """

    def is_starter(pid: int) -> bool:
        words = ("dinfer",) if pid == 1 else ("dinfer", "python", "jupyter")
        return pid in processes and any(word in processes[pid].command.lower() for word in words)

    return [p for _, p in sorted(processes.items()) if p.kind and not is_starter(p.parent)]


def process_check(left: Sequence[Process]) -> Check:
    """`left`: what `orphans` found."""
    if not left:
        return Check("old processes", "ok", "no rank or watcher of an earlier run")
    stopped = {p.pid for p in left if p.state == psutil.STATUS_STOPPED}
    named = ", ".join(f"{p.kind} {p.pid}{' (stopped)' * (p.pid in stopped)}" for p in left)
    force = "-9 " * bool(stopped)  # a stopped process handles no other signal
    fix = f"kill {force}{' '.join(str(p.pid) for p in left)}"
    runs = "a run" if len(left) == 1 else "runs"
    found = f"{len(left)} left by {runs} whose client has ended: {named}"
    return Check("old processes", "warn", found, fix)


def _files(folder: Path) -> Iterator[os.stat_result]:
    """What is known of all in a folder."""
    for file in folder.rglob("*"):
        with suppress(OSError):
            yield file.lstat()


def folder_check(temp: Path, now: float) -> Check:
    """Folders `dinfer-*` of this user in `temp` that nothing has touched for OLD_S seconds, and that nobody uses."""
    old, size = [], 0
    for folder in sorted(temp.glob("dinfer-*")):
        with suppress(OSError):
            about = folder.lstat()
            if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid():
                continue
            held = [about, *_files(folder)]
            is_old = now - max(one.st_mtime for one in held) > OLD_S
            if is_old and not is_held(folder) and is_job_over(folder):
                old.append(shlex.quote(str(folder)))
                size += sum(one.st_size for one in held[1:])
    if not old:
        return Check("old folders", "ok", f"none in {temp}")
    found = f"{len(old)} of earlier runs in {temp}, {gib(size)}"
    return Check("old folders", "warn", found, f"rm -r {' '.join(old)}")
