"""Ranks that are threads of this process: the same session on any laptop, for lessons and tests.

They share one checkpoint in memory. A rank cannot be killed here, and what blocks the process blocks the session too.
"""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dinfer.cluster.ranks import Ranks, update
from dinfer.engine.board import BOARD_BYTES, Board, Phase, Stand
from dinfer.errors import NotPossible
from dinfer.messages import Command, JoinGroup, Lanes, OpenStore, RankReport, Status, StoreAddress
from dinfer.rank.commands import OnThread, answer
from dinfer.rank.service import RankService
from dinfer.trace.recorder import Recorder
from dinfer.transport.gate import Gate
from dinfer.transport.gloo import Comm
from dinfer.transport.in_process import Exchange

PUMP_S = 0.05


class LocalRanks(Ranks):
    """A RankService for each rank, called directly."""

    backend = "gloo"
    can_kill = False

    def __init__(self, world_size: int) -> None:
        super().__init__(world_size)
        self.gate = Gate()
        self.exchange = Exchange(world_size, self.gate)
        self._recorders: dict[int, tuple[Recorder, list[int] | None]] = {}
        self._closing = threading.Event()
        self.pools = {
            (rank, thread): ThreadPoolExecutor(1, f"dinfer rank {rank}{suffix}")
            for rank in range(world_size)
            for thread, suffix in ((OnThread.SLOW, ""), (OnThread.LOOKING, " looking"))
        }
        """what carries out the commands of each rank that are not carried out at once"""
        ends = [_End(self, rank) for rank in range(world_size)]
        self.hosts = [
            RankService(rank, end, end, board=_NotifyingBoard(self, rank), gate=self.gate)
            for rank, end in enumerate(ends)
        ]
        self._tables = [host.table() for host in self.hosts]
        self._pump_thread = threading.Thread(target=self._pump, name="dinfer events", daemon=True)
        self._pump_thread.start()

    # -- what a session needs of its ranks

    def describe(self) -> str:
        return f"{self.world_size} ranks as threads of this process, which share one checkpoint in memory"

    def cores(self) -> list[int]:
        return [self.world_size] * self.world_size

    def meeting(self) -> StoreAddress:
        return StoreAddress("", 0)

    def kill(self, rank: int) -> None:
        raise NotPossible(f"rank {rank} is a thread of this process and cannot be killed alone.")

    def revive(self, rank: int) -> None:
        raise NotPossible(f"rank {rank} is a thread of this process: it cannot be lost alone.")

    def listen_for_debugger(self, rank: int, port: int) -> tuple[str, int]:  # noqa: ARG002 - see the message
        own = "use the debugger of your notebook or IDE"
        raise NotPossible(f"rank {rank} is a thread of this process: {own}.")

    def free(self) -> None:
        self.exchange.close()

    def close(self) -> None:
        self._closing.set()
        self.exchange.close()
        for host in self.hosts:
            host.close()
        for pool in self.pools.values():
            pool.shutdown(wait=False)
        self._pump_thread.join(1)

    # -- commands and news

    def _send(self, rank: int, command: Command[Any], number: int) -> None:
        handler = self._tables[rank].get(type(command))
        if handler and handler.thread:
            self.pools[rank, handler.thread].submit(self._reply, rank, command, number)
        else:
            self._reply(rank, command, number)

    def share_weights(self) -> None:
        for host in self.hosts[1:]:
            host.weights.share(self.hosts[0].weights)

    def _reply(self, rank: int, command: Command[Any], number: int) -> None:
        report = answer(self._tables[rank], number, command)
        self._read_events()
        self.take(rank, report)

    def read_anew(self, rank: int) -> None:
        """Read events from the recorder of the rank's new prompt from now on."""
        engine = self.hosts[rank].engine
        assert engine is not None
        assert engine.recorder is not None
        with self.changed:
            self._recorders[rank] = engine.recorder, None

    def _pump(self) -> None:
        while not self._closing.wait(PUMP_S):
            self._read_events()

    def _read_events(self) -> None:
        with self.changed:
            for rank, (recorder, cursor) in self._recorders.items():
                events, new = recorder.read(cursor)
                self._recorders[rank] = recorder, new
                self.ranks[rank].events += events
            self.changed.notify_all()


class _NotifyingBoard(Board):
    """A board whose state the session takes over at once when it changes."""

    def __init__(self, ranks: LocalRanks, rank: int) -> None:
        super().__init__(memoryview(bytearray(BOARD_BYTES)))
        self._ranks, self._rank = ranks, rank

    def set_phase(self, phase: Phase, decoded: int = 0) -> None:
        super().set_phase(phase, decoded)
        self._tell()

    def set_lane(self, lane: int, position: int, limit: int, *, started: bool) -> None:
        super().set_lane(lane, position, limit, started=started)
        self._tell()

    def _tell(self) -> None:
        state, changed = self._ranks.ranks[self._rank], self._ranks.changed
        with changed:  # read while held, so that an older state cannot replace a newer one
            stand = self.stand(max(0, len(state.lanes) - 1))
            state.heard = time.monotonic()
            update(state, Status(self.phase, self.decoded, stand))
            changed.notify_all()


class _End:
    """A rank's connection to the session, and its way to meet the others: calls. All ranks share one exchange; whenever
    they meet again there is a new one."""

    def __init__(self, ranks: LocalRanks, rank: int) -> None:
        self._ranks, self._rank = ranks, rank

    def report(self, report: RankReport) -> None:
        if isinstance(report, Lanes):
            self._ranks.read_anew(self._rank)
        self._ranks.take(self._rank, report)

    def ask_stands(self, timeout: float) -> list[Stand | None]:  # noqa: ARG002 - the answer is at hand
        return [state.stand for state in self._ranks.ranks]

    def open(self, command: OpenStore) -> StoreAddress:
        ranks = self._ranks
        ranks.exchange.close()
        ranks.exchange = Exchange(ranks.world_size, ranks.gate)
        return StoreAddress(command.address, command.port)

    def join(self, command: JoinGroup) -> Comm:  # noqa: ARG002 - it is at hand
        return self._ranks.exchange.comm(self._rank)
