"""The whole engine in one process: every rank on threads, for tests. Not a test."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from dinfer.config import Config
from dinfer.engine.engine import Engine
from dinfer.engine.exchange import Exchange
from dinfer.engine.gate import FreeGate, Gate
from dinfer.model.decoder import Decoder

T = TypeVar("T")


class Twin:
    """All ranks of a run, sharing one model in memory."""

    def __init__(self, decoder: Decoder, config: Config, *, gate: Gate | None = None, rendezvous: bool = True) -> None:
        self.gate = gate or FreeGate()
        self.exchange = Exchange(config.world_size, self.gate, rendezvous=rendezvous)
        self.engines = [
            Engine(decoder, self.exchange.comm(rank), config, gate=self.gate) for rank in range(config.world_size)
        ]

    def all(self, call: Callable[[Engine], T]) -> list[T]:
        """Make one call on every rank, each in a thread of its own; the results by rank. The first error is raised."""
        with ThreadPoolExecutor(len(self.engines)) as pool:
            futures = [pool.submit(call, engine) for engine in self.engines]
            for future in futures:
                future.add_done_callback(lambda done: self.exchange.close() if done.exception() else None)
            return [future.result() for future in futures]

    def close(self) -> None:
        self.exchange.close()
        for engine in self.engines:
            engine.release()


@contextmanager
def twin(decoder: Decoder, *, gate: Gate | None = None, rendezvous: bool = True, **config: object) -> Iterator[Twin]:
    made = Twin(decoder, Config.of(config), gate=gate, rendezvous=rendezvous)
    try:
        yield made
    finally:
        made.close()


def prompt(tokens: int, vocab: int = 128, seed: int = 0) -> Sequence[int]:
    """Token ids that look drawn, the same for the same arguments."""
    return [(seed * 31 + i * i * 7 + i * 13 + 5) % vocab for i in range(tokens)]
