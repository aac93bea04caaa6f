"""The whole engine in one process: every rank on threads, for tests. Not a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from dinfer.config import Config
from dinfer.engine.engine import Engine
from dinfer.engine.kernels import Kernels
from dinfer.engine.lanes import OpFailed
from dinfer.model.decoder import Decoder
from dinfer.plan.cut import Cut
from dinfer.plan.graph import channel_of
from dinfer.plan.plan import OpPlace, Plan
from dinfer.run.failure import RankFailed
from dinfer.run.stepper import Fleet, StandList
from dinfer.transport.gate import Gate
from dinfer.transport.gloo import CommError
from dinfer.transport.in_process import Exchange, StreamOrder

T = TypeVar("T")


class LocalFleet(Fleet):
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
        ):  # all at once, so that a seeded order does not depend on the sequence
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
        """Why a rank failed; the loss of a peer only if there is no other reason."""
        failures = [failure for engine in self._engines if (failure := engine.executor.failure)]
        return min(failures, key=lambda failure: isinstance(failure.error, CommError), default=None)


class Twin:
    """All ranks of a run, sharing one model in memory."""

    def __init__(
        self,
        decoder: Decoder,
        config: Config,
        *,
        gate: Gate | None = None,
        rendezvous: bool = True,
        streams: StreamOrder = "pairs",
        graphs: bool = False,
    ) -> None:
        self.gate = gate or Gate()
        self.exchange = Exchange(config.world_size, self.gate, rendezvous=rendezvous, streams=streams)
        self.engines = [
            Engine(
                decoder,
                self.exchange.comm(rank),
                config,
                gate=self.gate,
                graphs=Kernels().capture("graph", decoder, config) if graphs else None,
            )
            for rank in range(config.world_size)
        ]

    def all(self, call: Callable[[Engine], T]) -> list[T]:
        """Make one call on every rank, each in a thread of its own; the results by rank.

        When one raises, the exchange is closed, so that the others do not wait for ever, and its error is
        raised.
        """
        errors: list[BaseException] = []

        def close_on_error(done: Future[T]) -> None:
            if error := done.exception():
                errors.append(error)
                self.exchange.close()

        with ThreadPoolExecutor(len(self.engines)) as pool:
            futures = [pool.submit(call, engine) for engine in self.engines]
            for future in futures:
                future.add_done_callback(close_on_error)
        if errors:
            raise errors[0]
        return [future.result() for future in futures]

    def prepare(self, ids: Sequence[int], plan: Plan | None = None) -> LocalFleet:
        """Make a prompt ready on every rank; lanes wait at limit 0."""
        for engine in self.engines:
            engine.prepare(ids, plan=plan)
        return LocalFleet(self.exchange, self.engines)

    def go(self, fleet: LocalFleet) -> None:
        """Let all lanes of all ranks go to their end, at once; returns at once."""
        fleet.set_limits(tuple(tuple(len(lane.ops) for lane in lanes) for lanes in fleet.plan.lanes))

    def close(self) -> bool:
        """End all lanes; whether all ended."""
        self.exchange.close()
        ended = [engine.release() for engine in self.engines]
        return all(ended)


@contextmanager
def twin(
    decoder: Decoder,
    *,
    gate: Gate | None = None,
    rendezvous: bool = True,
    streams: Any = "pairs",  # a StreamOrder; `config` may hold anything
    graphs: Any = False,  # bool
    **config: object,
) -> Iterator[Twin]:
    """A Twin with a config of these parameters; afterwards no thread of it is left.

    With `backend="nccl"` its ranks issue to streams, which behave like NCCL's.
    """
    made = Twin(decoder, Config.of(config), gate=gate, rendezvous=rendezvous, streams=streams, graphs=graphs)
    try:
        yield made
    finally:
        assert made.close(), "a lane of the twin did not end"


def prompt(tokens: int, vocab: int = 128, seed: int = 0) -> Sequence[int]:
    """Token ids that look drawn, the same for the same arguments."""
    return [(seed * 31 + i * i * 7 + i * 13 + 5) % vocab for i in range(tokens)]
