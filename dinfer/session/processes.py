"""Processes: the ranks of `dinfer run` on this machine, each a process of its own: up, watched, and down again."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

from dinfer.session.blame import failure_of
from dinfer.session.fleet import RankFailed
from dinfer.session.job import Job
from dinfer.session.link import Link

GRACE_S = 1.0
"""How long to listen for the cause once one rank has failed: the others' complaints may come first."""


class Processes:
    """Started on entry; ended, whatever happened, on exit."""

    def __init__(
        self, job: Job, *, paused: bool = False, on_text: Callable[[str], None] | None = None
    ) -> None:
        self.job = job
        self.link = Link(job.config.world_size)
        self._paused, self._on_text = paused, on_text
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
            "link": self.link.job_part(rank, os.getpid()),
        }
        environment = {**os.environ, "OMP_NUM_THREADS": str(config.threads), "PYTHONUNBUFFERED": "1"}
        folder = Path(config.log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"rank{rank}.err").open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "dinfer.engine.worker"],
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

    # -- watching

    def watch(self, seconds: float) -> bool:
        """Look after the ranks for that long; True once all have delivered their result.

        Raises RankFailed, with the cause first, when one has failed, died, or made no progress in time.
        """
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            with self.link.changed:
                self.link.changed.wait(min(left, 0.05))
            self._introduce()
            finished = all("result" in state.reports for state in self.link.ranks)
            self._show_text()
            if finished:
                return True
            self.check()
        return False

    def _show_text(self) -> None:
        """On the caller's thread, so that an output that is gone ends the run like any other error."""
        for text in self.link.new_texts():
            if self._on_text:
                self._on_text(text)

    def _introduce(self) -> None:
        """Tell each other rank, once it can hear, where rank 0 has opened the place to meet."""
        opened = self.link.ranks[0].reports.get("store")
        for rank, state in enumerate(self.link.ranks):
            if opened and state.heard and rank not in self._introduced:
                self._introduced.add(rank)
                self.link.send(rank, "meet", port=opened["port"])

    def check(self) -> None:
        """Raises RankFailed if a rank has failed, died, or stands still for too long."""
        if self._broken():
            deadline = time.monotonic() + GRACE_S
            with self.link.changed:
                self.link.changed.wait_for(self._all_told, max(0.0, deadline - time.monotonic()))
        failure = failure_of(self.job.plan, self.link.ranks, self._exits(), self.job.config, time.monotonic())
        if failure:
            raise RankFailed(failure)

    def _broken(self) -> bool:
        """Whether a rank seems to have failed. One that has just ended well may look so: its result is on its way."""
        ended = any(code is not None for code in self._exits())
        return ended or any("error" in state.reports for state in self.link.ranks)

    def _all_told(self) -> bool:
        """Whether every rank has said how it ended, or its watcher, last of all, that it is gone."""
        return all(state.gone or state.reports.keys() & {"error", "result"} for state in self.link.ranks)

    def _exits(self) -> list[int | None]:
        """Exit status of each rank that ended without a result; None for the others."""
        return [
            None if "result" in state.reports else process.poll()
            for state, process in zip(self.link.ranks, self._processes, strict=True)
        ]


def interrupt_as_error() -> None:
    """Let SIGTERM end a run as Ctrl-C does: with everything cleaned up."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
