"""Processes: the ranks of `dinfer run` on this machine, each a process of its own: up, watched, and down again."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Self

from dinfer.cluster.link import Link
from dinfer.job import Job
from dinfer.launch.watch import ProcessWatch
from dinfer.rank.logs import make_log_folder

EXIT_S = 1.0
"""how long a process may take to end once it has closed its connections"""


class Processes:
    """Started on entry; ended, whatever happened, on exit."""

    def __init__(
        self,
        job: Job,
        *,
        paused: bool = False,
        on_text: Callable[[str], None] | None = None,
        on_hang: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.job = job
        self.link = Link(job.config.world_size)
        self._paused = paused
        self._watch = ProcessWatch(
            job, self.link, self._exits, on_text, while_looking=self._introduce, on_hang=on_hang
        )
        self._processes: list[subprocess.Popen[bytes]] = []
        self._introduced: set[int] = set()

    def __enter__(self) -> Self:
        try:
            for rank in range(self.job.config.world_size):
                self._processes.append(self._start(rank))
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Kill what still runs and wait until it is gone; the watchers end with their ranks."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
        for process in self._processes:
            process.wait()
        self._await_watchers()
        self.link.close()

    def _await_watchers(self) -> None:
        deadline = time.monotonic() + 5
        with self.link.changed:
            started = [state for state in self.link.ranks if state.heard]
            self.link.changed.wait_for(
                lambda: all(s.gone for s in started), max(0.0, deadline - time.monotonic())
            )

    def _start(self, rank: int) -> "subprocess.Popen[bytes]":
        config = self.job.config
        job = {
            "rank": rank,
            "config": asdict(config),
            "ids": self.job.ids,
            "paused": self._paused,
            "link": self.link.job_part(rank, launcher=os.getpid()),
        }
        environment = {**os.environ, "OMP_NUM_THREADS": str(config.threads), "PYTHONUNBUFFERED": "1"}
        folder = Path(config.log_dir)
        make_log_folder(folder)
        with (folder / f"rank{rank}.err").open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "dinfer.rank.worker"],
                stdin=subprocess.PIPE,
                stdout=errors,
                stderr=errors,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches this process only, which then ends the ranks in order
            )
        assert process.stdin is not None
        with process.stdin as stdin:
            stdin.write(json.dumps(job).encode())
        return process

    def watch(self, seconds: float) -> bool:
        """Look after the ranks for that long; True once all have delivered their result. Raises RankFailed."""
        return self._watch.look(seconds)

    def check(self) -> None:
        """Raises RankFailed if a rank cannot go on."""
        self._watch.check()

    def _introduce(self) -> None:
        """Tell each other rank, once it can hear, where rank 0 has opened the place to meet."""
        opened = self.link.ranks[0].reports.get("store")
        for rank, state in enumerate(self.link.ranks):
            if opened and state.heard and rank not in self._introduced:
                self._introduced.add(rank)
                self.link.send(rank, "meet", port=opened["port"])

    def _exits(self) -> list[int | None]:
        return [self._exit(rank, process) for rank, process in enumerate(self._processes)]

    def _exit(self, rank: int, process: "subprocess.Popen[bytes]") -> int | None:
        """Exit status of a rank that has ended. One whose watcher alone says so is about to: that is waited for, or
        what its death did to the others would be taken for the cause."""
        state = self.link.ranks[rank]
        if state.gone and not state.reports.keys() & {"error", "result"}:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(EXIT_S)
        return process.poll()


def interrupt_as_error() -> None:
    """Let SIGTERM end a run as Ctrl-C does: with everything cleaned up."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
