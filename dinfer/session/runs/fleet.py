"""Fleet: all ranks of a run, as those who step it see them; here, ranks that are threads."""

from collections.abc import Callable, Sequence
from typing import Protocol

from dinfer.engine.board import Stand
from dinfer.engine.engine import Engine
from dinfer.engine.executor import OpFailed
from dinfer.engine.transport.comm import CommError
from dinfer.engine.transport.exchange import Exchange
from dinfer.errors import DinferError
from dinfer.plan.cut import Cut
from dinfer.plan.graph import channel_of
from dinfer.plan.plan import Place, Plan

Stands = list[Stand]
"""where each rank stands, by rank"""


class RankFailed(DinferError, RuntimeError):
    """A rank raised or died. The message names rank, op, layer, chunk and the original error."""


class Fleet(Protocol):
    """What stepping needs of the ranks. Every call speaks to all of them."""

    plan: Plan

    def stands(self) -> Stands:
        """Where the ranks stand."""

    def freeze(self) -> Stands:
        """Let no rank start another op; where each stood at its moment."""

    def set_limits(self, limits: Cut, *, order: int = 0, stopping: bool = False) -> None:
        """Let lanes go that far. `order` names this call in what ranks say of it; `stopping`: to come to a stand, so no
        breakpoint's condition may stop them short."""

    def release(self, recvs: Sequence[Place]) -> None:
        """Have the peers of these posted recvs release them with a void header."""

    def rewind(self, cut: Cut) -> None:
        """Go back to a cut that all lanes have passed."""

    def wait(self, until: Callable[[Stands], bool], timeout: float | None) -> bool:
        """Wait until `until(stands)`; False once `timeout` seconds have passed. Raises RankFailed."""


class LocalFleet:
    """Ranks that are threads of this process, around one Exchange."""

    def __init__(self, exchange: Exchange, engines: Sequence[Engine]) -> None:
        self._exchange, self._engines = exchange, engines
        self.plan = engines[0].executor.plan

    def stands(self) -> Stands:
        return [engine.executor.stand() for engine in self._engines]

    def freeze(self) -> Stands:
        return [engine.executor.freeze() for engine in self._engines]

    def set_limits(self, limits: Cut, *, order: int = 0, stopping: bool = False) -> None:  # noqa: ARG002
        with (
            self._exchange.gate.change()
        ):  # at once, so that a seeded order does not depend on who is told first
            for engine, lanes in zip(self._engines, limits, strict=True):
                engine.executor.set_limits(lanes)

    def release(self, recvs: Sequence[Place]) -> None:
        for place in recvs:
            op = self.plan.op(place)
            self._engines[op.peer].executor.release([channel_of(place.rank, op)])

    def rewind(self, cut: Cut) -> None:
        for engine, lanes in zip(self._engines, cut, strict=True):
            engine.executor.rewind(lanes)

    def wait(self, until: Callable[[Stands], bool], timeout: float | None) -> bool:
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
