"""Starts `ipcluster` as users do, in a folder of its own, and leaves nothing behind. Not a test."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.support.runs import MARK, is_alive, wait_for

LAUNCHER = "dinfer.cluster.ipyparallel.launcher.DinferEngineSetLauncher"
"""`--engines=dinfer` without the entry point, which an editable install has only once it is made anew"""


def marked(mark: str) -> list[psutil.Process]:
    """The processes that live and bear this mark in their environment, but for this one."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.pid != os.getpid() and is_alive(process):
                found.append(process)
    return found


class IPython:
    """An IPYTHONDIR of its own, for this process and for all that it starts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = uuid.uuid4().hex
        self.profile_dir = folder / "profile_default"
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, *command: object, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
        """Start Python with these arguments; output goes to a file in the folder."""
        with (self.folder / f"output{len(self._started)}.txt").open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *map(str, command)],
                stdin=stdin,
                stdout=output,
                stderr=output,
                cwd=self.folder,
            )
        self._started.append(process)
        return process

    def output(self, process: subprocess.Popen[bytes]) -> str:
        """What a process has said so far."""
        path = self.folder / f"output{self._started.index(process)}.txt"
        return path.read_text(encoding="utf-8", errors="replace")

    def ipcluster(self, n: int, *flags: str) -> subprocess.Popen[bytes]:
        """`ipcluster start -n N`, in the foreground."""
        return self.start("-m", "ipyparallel.cluster", "start", f"-n={n}", *flags)

    def members(self, part_of_command: str = "") -> list[psutil.Process]:
        """The living processes of all that was started, whose command has this in it."""
        return [process for process in marked(self.mark) if part_of_command in _command(process)]

    def files(self) -> list[str]:
        """The names of connection files, cluster files and logs."""
        folders = [self.profile_dir / "security", self.profile_dir / "log"]
        return sorted(path.name for folder in folders for path in folder.glob("*"))

    def end(self) -> None:
        """Kill what is left, process by process."""
        for process in marked(self.mark):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for started in self._started:
            started.wait()


@contextmanager
def within(place: IPython) -> Iterator[None]:
    """While it lasts, this process and what it starts use that place's folder as IPYTHONDIR."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPYTHONDIR", str(place.folder))
        patch.setenv(MARK, place.mark)
        patch.setenv("IPP_NONINTERACTIVE", "1")
        yield


@contextmanager
def ipython(folder: Path) -> Iterator[IPython]:
    """A place; this process is within it, and at its end nothing of it lives."""
    with ended_place(folder) as place, within(place):
        yield place


@contextmanager
def ended_place(folder: Path) -> Iterator[IPython]:
    """A place of which nothing lives at its end."""
    place = IPython(folder)
    try:
        yield place
    finally:
        place.end()
        wait_for(lambda: not marked(place.mark), "no process is left")


@contextmanager
def stock_cluster(folder: Path, n: int = 3, *flags: str) -> Iterator[IPython]:
    """A place where `ipcluster start -n N` runs; its controller has started. Use it `within` the place."""
    with ended_place(folder) as place:
        with within(place):
            process = place.ipcluster(n, *flags)
        begun = place.profile_dir / "security" / "cluster-.json"
        wait_for(lambda: begun.exists() or process.poll(), "ipcluster has begun")
        yield place


def ended(pids: Sequence[int]) -> bool:
    """Whether none of these processes lives."""
    return not any(psutil.pid_exists(pid) and is_alive(psutil.Process(pid)) for pid in pids)


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
