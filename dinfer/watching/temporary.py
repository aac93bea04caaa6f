"""Folders of watches for which nobody has named one: removed once whoever watches is done and the job is over.

A later watch removes the folders of those that have ended without a word. Where processes of the job still run, the
folder stays for a later one.
"""

import re
import weakref
from collections.abc import Iterator
from pathlib import Path

import psutil

from dinfer.temporary import new_folder, release
from dinfer.watch.probe.writing import host_in_names

PREFIX = "dinfer-watch-"


class TemporaryFolder:
    """A new folder, which is removed when this is garbage or this process ends, unless its job goes on."""

    def __init__(self) -> None:
        self.path, held = new_folder(PREFIX, is_job_over)
        if held:
            weakref.finalize(self, release, self.path, held, is_job_over)


def is_job_over(folder: Path) -> bool:
    """Whether none of the processes that have written into it, or below it, runs on this host."""
    return not any(psutil.pid_exists(pid) for pid in _processes(folder))


def _processes(folder: Path) -> Iterator[int]:
    """The numbers of those of this host."""
    name = re.compile(rf"{re.escape(host_in_names())}-(\d+)(?:-\d+)?\.jsonl")
    for path in folder.rglob("*.jsonl"):
        if found := name.fullmatch(path.name):
            yield int(found[1])
