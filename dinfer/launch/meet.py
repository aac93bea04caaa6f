"""How ranks that another launcher has started find one another, and tell rank 0 that they are there.

A rank that cannot take part (no checkpoint on its host, …) says so here, and rank 0 prints it.
"""

import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

from dinfer.config import Config, ConfigError
from dinfer.launch.environment import MPIRUN, Launched, meeting_of
from dinfer.messages import RankLink
from dinfer.transport.gloo import Store, join_store, open_store
from dinfer.transport.interface import check_own_address, check_route, own_address_towards
from dinfer.verdict.where import rank_spans_text

POLL_S = 0.1

PATIENCE_S = 5.0
"""How long rank 0 waits for the others before it says who is missing."""


def meet(config: Config, launched: Launched) -> tuple[Store, str]:
    """The store at which all ranks meet, and the address of rank 0's host. Raises ConfigError or CommError."""
    if launched.launcher == MPIRUN and "MASTER_ADDR" not in os.environ:
        return _meet_by_mpi(config, launched)
    address, port, theirs = meeting_of(os.environ, config.master_addr, config.master_port)
    if launched.rank == 0 and not theirs:
        check_own_address(address)
        return open_store(address, port, exact=True)[0], address
    check_route(address)
    return join_store(address, port, config.start_timeout), address


class Roll:
    """What the ranks tell one another, through the store, before they have a link."""

    def __init__(self, store: Store, world_size: int) -> None:
        self._store, self._world_size = store, world_size
        # A launcher that starts ranks again keeps its store, and what is in it.
        self._prefix = f"dinfer/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"

    def answer(self, rank: int, refusal: str = "") -> None:
        """This rank is there; `refusal`: why it cannot take part."""
        self._store.set(self._key(rank), refusal)

    def give_links(self, links: list[RankLink]) -> None:
        self._store.set(f"{self._prefix}/link", msgspec.json.encode(links).decode())

    def link_of(self, rank: int) -> RankLink:
        """Wait for the link that rank 0 gives to this rank. Raises RuntimeError if rank 0 does not come."""
        return msgspec.json.decode(self._store.get(f"{self._prefix}/link"), type=list[RankLink])[rank]

    def call(self, timeout: float, say: Callable[[str], None], told_to_end: Callable[[], bool]) -> None:
        """Wait until all others are there. Raises ConfigError if one refuses, RuntimeError if one is late."""
        started, said = time.monotonic(), False
        missing = list(range(1, self._world_size))
        while True:
            missing = [rank for rank in missing if not self._has_come(rank)]
            if not missing:
                return
            waited = time.monotonic() - started
            if waited > timeout:
                raise RuntimeError(
                    f"{rank_spans_text(missing)} did not come within {timeout:g} s (start_timeout)."
                )
            if waited > PATIENCE_S and not said:
                said = True
                say(f"waiting for {rank_spans_text(missing)}")
            if told_to_end():
                raise RuntimeError(f"the launcher ended the run before {rank_spans_text(missing)} had come.")
            time.sleep(POLL_S)

    def _has_come(self, rank: int) -> bool:
        if not self._store.check([self._key(rank)]):
            return False
        if refusal := self._store.get(self._key(rank)).decode():
            raise ConfigError(f"rank {rank}: {refusal}")
        return True

    def _key(self, rank: int) -> str:
        return f"{self._prefix}/rank {rank}"


def _meet_by_mpi(config: Config, launched: Launched) -> tuple[Store, str]:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # mpi4py without an MPI library is the latter
        raise ConfigError(
            f"under mpirun the ranks find one another by mpi4py, which cannot be imported ({error}): "
            "pip install 'dinfer[mpi]', or set MASTER_ADDR and MASTER_PORT for all ranks (mpirun -x, or -genv)."
        ) from None
    if MPI.COMM_WORLD.Get_size() != launched.world_size:
        raise ConfigError(
            f"mpirun has started {launched.world_size} processes, but mpi4py sees {MPI.COMM_WORLD.Get_size()}: "
            "it was built for another MPI than this mpirun's. Reinstall it, or set MASTER_ADDR and MASTER_PORT."
        )
    here = _ranks_on_this_host(MPI)
    if launched.rank == 0:
        address = "127.0.0.1" if launched.world_size == here else _own_address()
        try:
            store, port = open_store(address, config.master_port, exact=bool(config.master_port))
        except RuntimeError as error:
            MPI.COMM_WORLD.bcast(("", 0))
            raise error
        MPI.COMM_WORLD.bcast((address, port))
        return store, address
    address, port = MPI.COMM_WORLD.bcast(None)
    if not port:
        threading.Event().wait()  # until mpirun, which sees rank 0 end, ends this one
    return join_store(address, port, config.start_timeout), address


def _ranks_on_this_host(mpi: Any) -> int:
    names: list[str] = mpi.COMM_WORLD.allgather(socket.gethostname())
    return names.count(socket.gethostname())


def _own_address() -> str:
    """The address at which other hosts reach this one."""
    return own_address_towards("192.0.2.1")  # reserved for documentation: by the default route, never sent to
