"""What each rank of `dinfer bench cores` runs: plans on all ranks, and on rank 0 alone what one process does with the
cores of all, and decode beside transformers' `generate`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import torch

from dinfer.bench.rank import prefill_together, work_as_rank
from dinfer.config import Config
from dinfer.engine.engine import Engine
from dinfer.model.decoder import Decoder
from dinfer.transport.gate import Gate
from dinfer.transport.gloo import Comm
from dinfer.transport.in_process import Exchange

DECODE, GENERATE = "decode, dinfer", "decode, transformers' generate"

PROMPT = 256
"""tokens of the prompt before decode"""


class CoresJob(NamedTuple):
    """What a rank is started with: the fields of its Config, the prompt, texts of plans by variant, the chunk sizes of
    one process by variant, how often, and how many steps of decode."""

    config: dict[str, Any]
    ids: Sequence[int]
    plans: Mapping[str, str]
    alone: Mapping[str, int]
    repeats: int
    new_tokens: int


class CoresTimes(NamedTuple):
    """Seconds of one rank by variant and round; 0 where it only waited for rank 0."""

    seconds: dict[str, list[float]]


def measure(job: CoresJob, decoder: Decoder, comm: Comm, config: Config) -> CoresTimes:
    """Time all variants in turn; all ranks make the same calls."""
    alone = partial(_alone, decoder, config)
    variants: dict[str, Callable[[], float]] = {
        **{
            name: partial(_on_rank_0, comm, partial(alone, job.ids, size)) for name, size in job.alone.items()
        },
        **{
            name: partial(_together, decoder, comm, config, job.ids, text) for name, text in job.plans.items()
        },
        DECODE: partial(_on_rank_0, comm, partial(_decode, decoder, config, job.ids, job.new_tokens)),
        GENERATE: partial(_on_rank_0, comm, partial(_generate, decoder, job.ids, job.new_tokens)),
    }
    # What is slow the first time: torch's kernels, transformers' generation, connections of gloo.
    _on_rank_0(comm, partial(alone, job.ids[:PROMPT], config.chunk_size))
    for name in (min(job.plans), DECODE, GENERATE):
        variants[name]()
    found: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(job.repeats):
        for name, run in variants.items():
            found[name].append(run())
    return CoresTimes(found)


def _on_rank_0(comm: Comm, run: Callable[[], float]) -> float:
    took = run() if comm.rank == 0 else 0.0
    comm.all_gather(b"a")
    return took


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _single(decoder: Decoder, config: Config, chunk_size: int) -> Engine:
    """An engine without other ranks."""
    alone = config.with_(world_size=1, layer_split=(), chunk_size=chunk_size)
    return Engine(decoder, Exchange(1, Gate()).comm(0), alone)


def _alone(decoder: Decoder, config: Config, ids: Sequence[int], chunk_size: int) -> float:
    """Seconds of prefill in one process with as many threads as all ranks have."""
    with _threads(config.threads * config.world_size):
        engine = _single(decoder, config, chunk_size)
        engine.prepare(ids)
        started = perf_counter()
        engine.prefill_phase()
        took = perf_counter() - started
        engine.release()
    return took


def _together(decoder: Decoder, comm: Comm, config: Config, ids: Sequence[int], text: str) -> float:
    """Seconds of a plan until all ranks are done."""
    engine, took = prefill_together(decoder, comm, config, ids, text)
    engine.release()
    return took


def _decode(decoder: Decoder, config: Config, ids: Sequence[int], steps: int) -> float:
    """Seconds of so many steps of decode after a prompt of PROMPT tokens, with as many threads as a rank has."""
    engine, clock = _single(decoder, config, config.chunk_size), _Clock()
    engine.prefill_phase(ids[:PROMPT])
    engine.decode_phase(max_new_tokens=steps + 1, on_token=clock.note)
    engine.release()
    return clock.step_s * steps


def _generate(decoder: Decoder, ids: Sequence[int], steps: int) -> float:
    """The same of transformers' `generate`."""
    clock = _Clock()
    with torch.no_grad():
        decoder.model.generate(
            torch.tensor([list(ids[:PROMPT])]),
            max_new_tokens=steps + 1,
            min_new_tokens=steps + 1,
            do_sample=False,
            pad_token_id=0,
            streamer=clock,
        )
    return clock.step_s * steps


class _Clock:
    """When tokens came; to transformers a streamer, which is given the prompt first."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._has_prompt = False

    def note(self, _: object) -> None:
        self._times.append(perf_counter())

    def put(self, tokens: object) -> None:
        if self._has_prompt:
            self.note(tokens)
        self._has_prompt = True

    def end(self) -> None:
        """No token follows."""

    @property
    def step_s(self) -> float:
        """Seconds from one token to the next."""
        return (self._times[-1] - self._times[0]) / (len(self._times) - 1)


if __name__ == "__main__":
    work_as_rank(CoresJob, measure)
