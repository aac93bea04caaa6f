"""The ranks of `dinfer run` and `dinfer bench` on this machine, each a process: starts, watches and ends them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO, Self

import msgspec

from dinfer.cluster.link import Link
from dinfer.job import Job
from dinfer.launch.watch import ProcessWatch
from dinfer.messages import MeetAt, RankJob
from dinfer.rank.logs import make_log_folder
from dinfer.run.measurement import run_to_measure
from dinfer.transport.interface import check_own_address
from dinfer.verdict.verdict import Verdict

EXIT_S = 1.0
"""How long a process may take to end once it has closed its connections."""


def start_rank(
    module: str, job: bytes, threads: int, output: BinaryIO | None = None, behind: Sequence[str] = ()
) -> "subprocess.Popen[bytes]":
    """A process that runs `python -m module` with `job` as its standard input; `output`: where what it prints goes;
    `behind`: the command that runs it elsewhere, such as `ip netns exec NAME`, where interfaces have other names."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    if behind:
        environment.pop("GLOO_SOCKET_IFNAME", None)
        environment["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # else torch warns that these hosts have no names
    process = subprocess.Popen(
        # -P: not a types.py or transformers.py of the working folder
        [*behind, sys.executable, "-P", "-m", module],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        env=environment,
        start_new_session=True,  # Ctrl-C reaches this process only, which then ends the ranks in order
    )
    assert process.stdin is not None
    with process.stdin as stdin:
        stdin.write(job)
    return process


def end_ranks(ranks: "Sequence[subprocess.Popen[bytes]]") -> None:
    """Kill what still runs and wait until it is gone."""
    for process in ranks:
        process.kill()
    for process in ranks:
        process.wait()


class Processes:
    """A context: the ranks are started on entry and ended on exit, whatever happens."""

    def __init__(
        self,
        job: Job,
        *,
        on_text: Callable[[str], None] | None = None,
        on_hang: Callable[[Verdict], None] = lambda _: None,
        auto: Sequence[str] = (),
        on_chosen: Callable[[Job], None] = lambda _: None,
    ) -> None:
        """The parameters after `job` are those of ProcessWatch."""
        self._to_measure = run_to_measure(job) if auto else None
        self.link = Link(job.config.world_size)
        self._watch = ProcessWatch(
            job, self.link, self._exits, on_text,
            while_looking=self._introduce, on_hang=on_hang, auto=auto, on_chosen=on_chosen,
        )  # fmt: skip
        self._processes: list[subprocess.Popen[bytes]] = []
        self._introduced: set[int] = set()

    @property
    def job(self) -> Job:
        """The run; once what is `auto` is chosen, with that."""
        return self._watch.job

    def __enter__(self) -> Self:
        check_own_address(self.job.config.master_addr)
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
        end_ranks(self._processes)
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
        link = self.link.job_part(rank, launcher=os.getpid())
        job = RankJob(rank, asdict(config), tuple(self.job.ids), link, self._to_measure)
        folder = Path(config.log_dir)
        make_log_folder(folder)
        with (folder / f"rank{rank}.err").open("wb") as errors:
            return start_rank("dinfer.rank.worker", msgspec.json.encode(job), config.threads, errors)

    def watch(self, seconds: float) -> bool:
        """Watch the ranks for that long; True once all have delivered their result. Raises RankFailed."""
        return self._watch.look(seconds)

    def check(self) -> None:
        """Raises RankFailed if a rank cannot go on."""
        self._watch.check()

    def _introduce(self) -> None:
        """Send each other rank, once it is connected, the port at which rank 0 waits."""
        opened = self.link.ranks[0].store
        for rank, state in enumerate(self.link.ranks):
            if opened and state.heard and rank not in self._introduced:
                self._introduced.add(rank)
                self.link.send(rank, MeetAt(opened.port))

    def _exits(self) -> list[int | None]:
        return [self._exit(rank, process) for rank, process in enumerate(self._processes)]

    def _exit(self, rank: int, process: "subprocess.Popen[bytes]") -> int | None:
        """Exit status of a rank that has ended. If so far only its watcher says so, wait for the process: or what its
        death did to the others would be taken for the cause."""
        state = self.link.ranks[rank]
        if state.gone and not (state.error or state.result):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(EXIT_S)
        return process.poll()


def interrupt_as_error() -> None:
    """Have SIGTERM end a run as Ctrl-C does, with everything cleaned up."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
