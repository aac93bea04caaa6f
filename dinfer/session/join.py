"""Join: this process is one rank of a run that another launcher (torchrun, mpirun) has started.

Rank 0 also keeps the session: it opens the link, watches all ranks, shows progress and text, and writes the
results. The others find it through the store at which all meet.
"""

import json
import logging
import os
import signal
import socket
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinfer.config import Config, ConfigError
from dinfer.engine.comm import Comm, GlooComm, Store, join_store, open_store
from dinfer.engine.control import Control
from dinfer.engine.interface import own_address_towards
from dinfer.engine.rank import run_rank
from dinfer.engine.worker import describe, log_to
from dinfer.session.environment import Launched
from dinfer.session.job import Job, prepare
from dinfer.session.link import Link
from dinfer.session.runner import Show, conclude
from dinfer.session.watch import Watch

LINK_KEY = "dinfer/link"
FAREWELL_S = 5.0
"""How long a rank that failed waits for rank 0 to say why before it ends: a launcher that sees it end ends all."""
log = logging.getLogger("dinfer")


def join(config: Config, launched: Launched, trace_path: str | Path | None) -> dict[str, Any] | None:
    """Run this process's rank; the result on rank 0, None on the others. Raises RankFailed."""
    job = prepare(config, ranks_here=[launched.rank] if config.device_mode == "multi_node" else None)
    store, address = _meeting_place(config, launched, os.environ)
    link = None
    if launched.rank == 0:
        link = Link(launched.world_size, _listening_address(address))
        store.set(
            LINK_KEY, json.dumps([link.job_part(rank, joined=True) for rank in range(launched.world_size)])
        )
    part = json.loads(store.get(LINK_KEY))[launched.rank]
    log_to(Path(config.log_dir), launched.rank, config.log_level)
    rank = _Rank(job, launched, store, Control({**part, "launcher": os.getppid()}))
    rank.start()
    if link is None:
        rank.outlast()
        return None
    try:
        return _keep_session(job, link, trace_path)
    finally:
        link.close()


class _Rank:
    """The rank's own work, on a thread of its own: the main thread stays free for signals and for the session."""

    def __init__(self, job: Job, launched: Launched, store: Store, control: Control) -> None:
        self._job, self._launched, self._store, self._control = job, launched, store, control
        self._ended = threading.Event()
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="rank", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def outlast(self) -> None:
        """Wait for the end of this rank's work; ends the process if that failed."""
        signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
        self._ended.wait()
        if self._failed:
            os._exit(1)  # lanes may be blocked in the transport, which nothing else undoes

    def _run(self) -> None:
        config, rank = self._job.config, self._launched.rank

        def meet() -> Comm:
            return GlooComm(rank, config.world_size, self._store, config.start_timeout)

        try:
            result = run_rank(rank, config, self._job.ids, self._control, meet)
            self._control.report("result", **result)
        except BaseException as error:
            self._failed = True
            log.error("this rank failed\n%s", traceback.format_exc())
            self._control.report("error", **describe(error))
            if rank:
                threading.Event().wait(FAREWELL_S)
        finally:
            self._control.close()
            self._ended.set()


def _keep_session(job: Job, link: Link, trace_path: str | Path | None) -> dict[str, Any]:
    show = Show(job)
    show.introduce()
    watch = Watch(job, link, on_text=show.on_text)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        while not watch.look(0.5):
            show.progress(link.ranks)
    except KeyboardInterrupt:
        watch.check()  # a launcher that sees one rank end stops all: then that end is the news
        raise
    finally:
        _end_others(link)
    return conclude(job, link.ranks, show, trace_path)


def _end_others(link: Link) -> None:
    """Ranks that have not delivered by now never will."""
    late = [rank for rank, state in enumerate(link.ranks) if rank and "result" not in state.reports]
    for rank in late:
        link.send(rank, "kill")
    with link.changed:
        link.changed.wait_for(lambda: all(link.ranks[rank].gone for rank in late), FAREWELL_S)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _meeting_place(config: Config, launched: Launched, environment: Mapping[str, str]) -> tuple[Store, str]:
    """The store at which all ranks meet, and the address of rank 0's host."""
    if launched.launcher == "mpirun" and "MASTER_ADDR" not in environment:
        return _meet_by_mpi(config, launched)
    address = environment.get("MASTER_ADDR", config.master_addr)
    port = int(environment.get("MASTER_PORT", config.master_port))
    if not port:
        raise ConfigError(
            "no port to meet at: set MASTER_PORT in the environment, or master_port, to a free one."
        )
    if launched.rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return open_store(address, port, exact=True)[0], address
    return join_store(address, port, config.start_timeout), address


def _meet_by_mpi(config: Config, launched: Launched) -> tuple[Store, str]:
    try:
        from mpi4py import MPI
    except ImportError:
        raise ConfigError(
            "under mpirun the ranks find one another by MPI: pip install 'dinfer[mpi]', "
            "or set MASTER_ADDR and MASTER_PORT."
        ) from None
    if launched.rank == 0:
        address = "127.0.0.1" if launched.world_size == _ranks_on_this_host(MPI) else _own_address()
        store, port = open_store(address, config.master_port)
        MPI.COMM_WORLD.bcast((address, port))
        return store, address
    _ranks_on_this_host(MPI)
    address, port = MPI.COMM_WORLD.bcast(None)
    return join_store(address, port, config.start_timeout), address


def _ranks_on_this_host(mpi: Any) -> int:
    names: list[str] = mpi.COMM_WORLD.allgather(socket.gethostname())
    return names.count(socket.gethostname())


def _own_address() -> str:
    """The address at which other hosts reach this one."""
    return own_address_towards("192.0.2.1")  # reserved for documentation: by the default route, never sent to


def _listening_address(address: str) -> str:
    """Where rank 0 listens to the watchers: on loopback where all ranks are on one host."""
    return own_address_towards(address)
