"""This process as one rank of a run that another launcher (torchrun, mpirun, a debugger) has started.

Rank 0 also holds the session: it opens the link, watches all ranks, shows progress and text, and writes the results.
Only rank 0 prints. A rank that fails waits until rank 0 has said why, since most launchers end all ranks as soon as one
has ended.
"""

import atexit
import contextlib
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from dinfer.cluster.link import Link
from dinfer.config import Config, ConfigError
from dinfer.display import takes_colour
from dinfer.errors import ModelError
from dinfer.job import Job, prepare
from dinfer.launch.environment import DEBUGGER, Launched
from dinfer.launch.meet import Roll, meet
from dinfer.launch.runner import ProgressLines, conclude
from dinfer.launch.watch import ProcessWatch
from dinfer.messages import KillRank, RankLink, RunChosen, ToldToEnd
from dinfer.plan.ops import PlanError
from dinfer.rank.batch import run_rank
from dinfer.rank.control import Control
from dinfer.rank.debugger import listen_for_debugger
from dinfer.rank.failure import describe
from dinfer.rank.logs import new_run_folder
from dinfer.rank.worker import log_to
from dinfer.run.failure import RankFailed
from dinfer.run.measurement import run_to_measure
from dinfer.severity import Severity
from dinfer.transport.connect import open_comm
from dinfer.transport.gloo import Comm, Store
from dinfer.transport.interface import own_address_towards

FAREWELL_S = 5.0
"""How long a rank that failed waits for rank 0 to end it, and rank 0 for the others to be gone."""

LOOK_S = 0.25

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130

log = logging.getLogger("dinfer")


def join(
    config: Config, launched: Launched, trace_path: str | Path | None, auto: Sequence[str] = ()
) -> dict[str, Any] | None:
    """Run this process's rank. Returns the result on rank 0, else None. If a rank fails, rank 0 says why and exits.
    `auto`: the parameters that the planner is to choose."""
    if launched.rank == 0:
        return _lead(config, launched, trace_path, auto)
    _follow(config, launched, auto)
    return None


def _lead(
    config: Config, launched: Launched, trace_path: str | Path | None, auto: Sequence[str]
) -> dict[str, Any]:
    job = _prepare(config, launched)
    try:
        store, address = meet(config, launched)
        roll, show = Roll(store, launched.world_size), ProgressLines(job)
        told = _told_to_end()
        roll.call(config.start_timeout, show.say, told.is_set)
        return _run_all(job, launched, store, address, show, told, trace_path, auto)
    except BaseException as error:
        # Lanes may be blocked in the transport, and MPI waits for everyone: an ordinary exit might never end.
        interrupted, mistaken = isinstance(error, KeyboardInterrupt), isinstance(error, ConfigError)
        atexit.register(os._exit, INTERRUPTED if interrupted else BAD_INPUT if mistaken else FAILED)
        raise


def _run_all(
    job: Job,
    launched: Launched,
    store: Store,
    address: str,
    show: ProgressLines,
    told: threading.Event,
    trace_path: str | Path | None,
    auto: Sequence[str],
) -> dict[str, Any]:
    link = Link(launched.world_size, own_address_towards(address))  # loopback where all ranks are on one host
    try:
        folder = new_run_folder(Path(job.config.log_dir))
        job = replace(job, config=job.config.with_(log_dir=str(folder)))
        parts = [
            msgspec.structs.replace(link.job_part(rank, joined=True), run_folder=folder.name)
            for rank in range(launched.world_size)
        ]
        Roll(store, launched.world_size).give_links(parts)
        rank = _RankThread(job, launched, store, _control(parts[0], job.config), auto)
        rank.start()
        result = _keep_session(job, link, show, told, trace_path, auto)
        rank.join()
        return result
    finally:
        link.close()


def _follow(config: Config, launched: Launched, auto: Sequence[str]) -> None:
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # as long as there is nothing to clean up: end at once and silently
    try:
        job, refusal = _prepare(config, launched), ""
    except (ConfigError, ModelError, PlanError) as error:
        if launched.launcher == DEBUGGER:
            raise  # each rank has a console of its own
        job, refusal = None, str(error)
    try:
        store, _ = meet(config, launched)
        roll = Roll(store, launched.world_size)
        roll.answer(launched.rank, refusal)
        part = roll.link_of(launched.rank)
    except (ConfigError, RuntimeError):
        atexit.register(os._exit, FAILED)
        raise
    assert job  # or rank 0 would not have gone on
    config = config.with_(log_dir=str(Path(config.log_dir) / part.run_folder))
    _RankThread(job, launched, store, _control(part, config), auto).outlast()


def _prepare(config: Config, launched: Launched) -> Job:
    return prepare(config, ranks_here=[launched.rank] if config.device_mode == "multi_node" else None)


def _control(link: RankLink, config: Config) -> Control:
    log_to(Path(config.log_dir), link.rank, config.log_level)
    return Control(msgspec.structs.replace(link, launcher=os.getppid()), awaited=(RunChosen,))


class _RankThread:
    """The rank's own work, on a thread of its own: the main thread stays free for signals and for the session."""

    def __init__(
        self, job: Job, launched: Launched, store: Store, control: Control, auto: Sequence[str]
    ) -> None:
        self._job, self._launched, self._store, self._control = job, launched, store, control
        self._to_measure = run_to_measure(job) if auto else None
        self._ended = threading.Event()
        self._error = ""
        self._thread = threading.Thread(target=self._run, name="rank", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self) -> None:
        """Wait for the thread: if Python had to cut it off at exit, inside torch, the process would abort."""
        self._thread.join()

    def outlast(self) -> None:
        """Start, and return when this rank is done; if it fails the process ends here."""
        _on_signal(_interrupt)
        status = FAILED
        try:
            self.start()
            self._ended.wait()
            if not self._error:
                self.join()
                return
        except KeyboardInterrupt:
            status = INTERRUPTED
            with contextlib.suppress(OSError):
                self._control.report(ToldToEnd())
        self._await_the_end(status)

    def _await_the_end(self, status: int) -> NoReturn:
        """Rank 0 has this process killed once it knows why the run has failed."""
        _on_signal(_ignore)
        time.sleep(FAREWELL_S)
        if self._launched.rank == 1:  # one rank must say it
            last = self._error or "it was told to end."
            why = f"rank 0, which leads the run, is gone. Rank 1: {last}"
            print(f"dinfer: {Severity.ERROR.marked(why, colour=takes_colour(sys.stderr))}", file=sys.stderr)
        os._exit(status)  # lanes may be blocked in the transport, which nothing else undoes

    def _run(self) -> None:
        config, rank = self._job.config, self._launched.rank

        def found() -> Comm:
            return open_comm(config.backend, rank, config.world_size, self._store, config.start_timeout)

        try:
            listen_for_debugger(rank)
            result = run_rank(rank, config, self._job.ids, self._control, found, self._to_measure)
            self._control.report(result)
            self._control.close()
        except BaseException as error:  # whatever it is, the other ranks must hear why this one ends
            log.error("this rank failed\n%s", traceback.format_exc())
            self._error = str(error) or type(error).__name__
            with contextlib.suppress(OSError):
                self._control.report(describe(error))
        finally:
            self._ended.set()


def _keep_session(
    job: Job,
    link: Link,
    show: ProgressLines,
    told: threading.Event,
    trace_path: str | Path | None,
    auto: Sequence[str],
) -> dict[str, Any]:
    show.introduce(auto)
    watch = ProcessWatch(job, link, on_text=show.on_text, on_hang=show.warn, auto=auto, on_chosen=show.chosen)
    try:
        while not watch.look(LOOK_S):
            show.progress(link.ranks)
            if told.is_set():
                watch.explain()  # a launcher that sees one rank end stops all: then that end is the news
                raise KeyboardInterrupt
    except RankFailed as failure:
        # Print before the others are ended: MPICH's mpirun kills this process too, as soon as one is killed.
        why = Severity.ERROR.marked(str(failure), colour=takes_colour(sys.stderr))
        print(f"dinfer: {why}", file=sys.stderr, flush=True)
        raise SystemExit(FAILED) from None
    finally:
        _end_others(link)
    return conclude(watch.job, link.ranks, show, trace_path)


def _end_others(link: Link) -> None:
    """Kill ranks that have not delivered by now. One that cannot be reached ends by itself."""
    late = [rank for rank, state in enumerate(link.ranks) if rank and state.result is None and state.heard]
    for rank in late:
        link.send(rank, KillRank())
    reached = [rank for rank in late if time.monotonic() - link.ranks[rank].heard < FAREWELL_S / 2]
    with link.changed:
        link.changed.wait_for(lambda: all(link.ranks[rank].gone for rank in reached), FAREWELL_S)


def _on_signal(do: Callable[..., object]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, do)


def _told_to_end() -> threading.Event:
    """Set by the signals that ask to end, so that rank 0 can find the cause first."""
    told = threading.Event()
    _on_signal(lambda *_: told.set())
    return told


def _interrupt(*_: object) -> None:
    _on_signal(_ignore)  # a second signal must not disturb the clean-up
    raise KeyboardInterrupt


def _ignore(*_: object) -> None:
    pass
