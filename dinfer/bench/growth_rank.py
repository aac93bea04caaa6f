"""What each rank of `dinfer bench growth` runs: prefills, and beside each the layers of its stage alone."""

from collections.abc import Sequence
from time import perf_counter, process_time
from typing import Any, NamedTuple

import torch

from dinfer.bench.rank import work_as_rank
from dinfer.config import Config, Schedule
from dinfer.engine.engine import Engine
from dinfer.model.decoder import Decoder
from dinfer.plan.plan import Plan
from dinfer.transport.gloo import Comm


class GrowthCase(NamedTuple):
    """A prefill of the first `tokens` tokens of the prompt."""

    tokens: int
    chunk_size: int
    schedule: Schedule = "pipelined"


class GrowthJob(NamedTuple):
    """What a rank is started with: the fields of its Config, the prompt, what to time, how often."""

    config: dict[str, Any]
    ids: Sequence[int]
    cases: Sequence[GrowthCase]
    repeats: int


class GrowthTimes(NamedTuple):
    """One case on one rank: the number of its ops; by round, seconds until all ranks were done, this rank's CPU
    seconds, and its CPU seconds of the same layers alone."""

    ops: int
    seconds: list[float]
    cpu_s: list[float]
    layers_cpu_s: list[float]


def measure(job: GrowthJob, decoder: Decoder, comm: Comm, config: Config) -> list[GrowthTimes]:
    """Time all cases in turn; all ranks make the same calls."""
    found = [GrowthTimes(0, [], [], []) for _ in job.cases]
    for repeat in range(job.repeats + 1):
        for number, case in enumerate(job.cases):
            settings = config.with_(chunk_size=case.chunk_size, schedule=case.schedule)
            plan, took, cpu = _prefill(decoder, comm, settings, job.ids[: case.tokens])
            alone = _layers_alone(decoder, plan, comm.rank, job.ids)
            if repeat:  # the first round warms up
                ops = sum(len(lane.ops) for lane in plan.lanes[comm.rank])
                one = found[number] = found[number]._replace(ops=ops)
                for values, value in zip(one[1:], (took, cpu, alone), strict=True):
                    values.append(value)
    return found


def _prefill(decoder: Decoder, comm: Comm, config: Config, ids: Sequence[int]) -> tuple[Plan, float, float]:
    """The plan, the seconds until all ranks are done, and this rank's CPU seconds until it is."""
    engine = Engine(decoder, comm, config)
    plan = engine.prepare(ids).plan
    comm.all_gather(b"s")
    started, cpu = perf_counter(), process_time()
    engine.prefill_phase()
    cpu = process_time() - cpu
    comm.all_gather(b"e")
    took = perf_counter() - started
    engine.release()
    return plan, took, cpu


def _layers_alone(decoder: Decoder, plan: Plan, rank: int, ids: Sequence[int]) -> float:
    """CPU seconds of what this rank computes, with nothing around it: embedding, its layers, the norm."""
    kinds = {"embed", "layer", "norm"}
    ops = [op for lane in plan.lanes[rank] for op in lane.ops if op.kind in kinds]
    chunks, cache = plan.shape.chunks, decoder.new_cache(plan.shape.tokens)
    inputs = [decoder.embed(ids[rows.start : rows.stop]) for rows in chunks]
    started = process_time()
    with torch.no_grad():
        for op in ops:
            rows = chunks[op.chunk]
            if op.kind == "embed":
                inputs[op.chunk] = decoder.embed(ids[rows.start : rows.stop])
            elif op.kind == "layer":
                inputs[op.chunk] = decoder.layer(op.layer, inputs[op.chunk], cache, rows.start)
            else:
                decoder.norm(inputs[op.chunk])
    return process_time() - started


if __name__ == "__main__":
    work_as_rank(GrowthJob, measure)
