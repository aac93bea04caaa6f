"""Fleet: all ranks of a run, as those who step it see them; here, ranks that are threads."""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from dinfer.cluster.ranks import RankStates
from dinfer.engine.board import Stand
from dinfer.engine.engine import Engine
from dinfer.engine.lanes import OpFailed
from dinfer.errors import DinferError
from dinfer.messages import Message
from dinfer.plan.cut import Cut
from dinfer.plan.graph import channel_of
from dinfer.plan.plan import OpPlace, Plan
from dinfer.rank.commands import stand_of
from dinfer.transport.gloo import CommError
from dinfer.transport.in_process import Exchange

StandList = list[Stand]
"""where each rank stands, by rank"""


class RankFailed(DinferError, RuntimeError):
    """A rank raised or died. The message names rank, op, layer, chunk and the original error."""


class Fleet(Protocol):
    """What stepping needs of the ranks. Every call speaks to all of them."""

    plan: Plan

    def stands(self) -> StandList:
        """Where the ranks stand."""

    def freeze(self) -> StandList:
        """Let no rank start another op; where each stood at its moment."""

    def set_limits(self, limits: Cut, *, order: int = 0, stopping: bool = False) -> None:
        """Let lanes go that far. `order` names this call in what ranks say of it; `stopping`: to come to a stand, so no
        breakpoint's condition may stop them short."""

    def release(self, recvs: Sequence[OpPlace]) -> None:
        """Have the peers of these posted recvs release them with a void header."""

    def rewind(self, cut: Cut) -> None:
        """Go back to a cut that all lanes have passed."""

    def wait(self, until: Callable[[StandList], bool], timeout: float | None) -> bool:
        """Wait until `until(stands)`; False once `timeout` seconds have passed. Raises RankFailed."""


class LocalFleet:
    """Ranks that are threads of this process, around one Exchange."""

    def __init__(self, exchange: Exchange, engines: Sequence[Engine]) -> None:
        self._exchange, self._engines = exchange, engines
        self.plan = engines[0].executor.plan

    def stands(self) -> StandList:
        return [engine.executor.stand() for engine in self._engines]

    def freeze(self) -> StandList:
        return [engine.executor.freeze() for engine in self._engines]

    def set_limits(self, limits: Cut, *, order: int = 0, stopping: bool = False) -> None:  # noqa: ARG002
        with (
            self._exchange.gate.change()
        ):  # at once, so that a seeded order does not depend on who is told first
            for engine, lanes in zip(self._engines, limits, strict=True):
                engine.executor.set_limits(lanes)

    def release(self, recvs: Sequence[OpPlace]) -> None:
        for place in recvs:
            op = self.plan.op(place)
            self._engines[op.peer].executor.release([channel_of(place.rank, op)])

    def rewind(self, cut: Cut) -> None:
        for engine, lanes in zip(self._engines, cut, strict=True):
            engine.executor.rewind(lanes)

    def wait(self, until: Callable[[StandList], bool], timeout: float | None) -> bool:
        def ended() -> bool | None:
            return True if self._failure() or until(self.stands()) else None

        held = self._exchange.gate.wait(ended, timeout)
        if failure := self._failure():
            self._exchange.close()
            raise RankFailed(str(failure)) from failure
        return bool(held)

    def _failure(self) -> OpFailed | None:
        """What a rank failed of; that it lost its peer only where there is no better reason."""
        failures = [failure for engine in self._engines if (failure := engine.executor.failure)]
        return min(failures, key=lambda failure: isinstance(failure.error, CommError), default=None)


POLL_S = 0.05


class RemoteFleet:
    """`check()` is called while waiting; it raises RankFailed when the run cannot go on. `patience` is the number of
    seconds in which a rank must answer a command."""

    def __init__(
        self, plan: Plan, line: RankStates, check: Callable[[], None], patience: float = 30.0
    ) -> None:
        self.plan, self._line = plan, line
        self._check, self._patience = check, patience

    def stands(self) -> StandList:
        with self._line.changed:
            found = [state.stand for state in self._line.ranks]
        stands = [stand for stand in found if stand is not None]
        if len(stands) < len(found):
            raise RankFailed("not all ranks have said where they stand yet: wait until they are ready.")
        return stands

    def freeze(self) -> StandList:
        answers = self._ask({rank: {"do": "freeze"} for rank in range(self.plan.world_size)})
        return [stand_of(answers[rank]) for rank in sorted(answers)]

    def set_limits(self, limits: Cut, *, order: int = 0, stopping: bool = False) -> None:
        message: Message = {"do": "limits", "cut": limits, "order": order, "stopping": stopping}
        self._ask(dict.fromkeys(range(len(limits)), message))

    def release(self, recvs: Sequence[OpPlace]) -> None:
        for place in recvs:
            op = self.plan.op(place)
            self._ask({op.peer: {"do": "release", "channels": [channel_of(place.rank, op)]}})

    def rewind(self, cut: Cut) -> None:
        self._ask({rank: {"do": "rewind", "cut": cut} for rank in range(len(cut))})

    def wait(self, until: Callable[[StandList], bool], timeout: float | None) -> bool:
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            with self._line.changed:  # held while looking, so that no news between look and wait is missed
                if self._line.changed.wait_for(lambda: until(self.stands()), POLL_S):
                    return True
            if deadline is not None and time.monotonic() > deadline:
                return False
            self._check()

    def _ask(self, requests: dict[int, Message]) -> dict[int, Message]:
        return self._line.ask(requests, self._patience, self._check)
