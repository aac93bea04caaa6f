"""What each rank of `dinfer bench` runs: several plans in turn on the same ranks, so that times can be compared."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from time import perf_counter, process_time
from typing import Any, NamedTuple, Protocol, TypeVar

import msgspec
import torch

from dinfer.config import Config, Schedule, SyncStrategy
from dinfer.engine.engine import Engine
from dinfer.model.decoder import Decoder
from dinfer.plan.plan import Lane, Plan, parse_plan
from dinfer.trace.trace import Trace
from dinfer.transport.gate import Gate
from dinfer.transport.gloo import Comm, GlooComm, join_store
from dinfer.transport.in_process import Exchange

START_S = 300.0


class Variant(NamedTuple):
    """A way to run prefill. `alone`: on rank 0 only; `sync`: whether blocks are synced; `digests`: whether blocks get
    digests, which are checked afterwards."""

    name: str
    schedule: Schedule = "pipelined"
    sync_strategy: SyncStrategy = "pairwise"
    alone: bool = False
    sync: bool = True
    digests: bool = True


VARIANTS = (
    Variant("one process", alone=True),
    Variant("pipelined, no sync", sync=False),
    Variant("pipelined, pairwise"),
    Variant("pipelined, ring", sync_strategy="ring"),
    Variant("lockstep, pairwise", schedule="lockstep"),
    Variant("lockstep, ring", schedule="lockstep", sync_strategy="ring"),
)


class BenchCase(NamedTuple):
    """A variant on the first `tokens` tokens of the prompt, in chunks of `chunk_size` tokens."""

    variant: Variant
    tokens: int
    chunk_size: int


class TimedPrefill(NamedTuple):
    """One prefill of one rank: its seconds; those in which the rank moved KV but computed nothing; its CPU seconds; and
    the seconds of the check before decode."""

    seconds: float
    exposed_sync_s: float
    cpu_s: float = 0.0
    check_s: float = 0.0


def result_key(rank: int) -> str:
    """Where a rank leaves its result at the store at which the ranks meet."""
    return f"times of rank {rank}"


def without_sync(plan: Plan) -> Plan:
    """The plan without KV transfers, for the cost of sync. Its KV is not enough to decode."""
    lanes = tuple(
        tuple(
            Lane(lane.name, kept)
            for lane in rank
            if (kept := tuple(op for op in lane.ops if not (op.is_transfer and op.what == "kv")))
        )
        for rank in plan.lanes
    )
    return replace(plan, lanes=lanes)


class BenchJob(NamedTuple):
    """What a rank of the benchmark is started with: the fields of its Config, the prompt, what to time, how often."""

    config: dict[str, Any]
    ids: Sequence[int]
    cases: Sequence[BenchCase]
    repeats: int


JobT = TypeVar("JobT", bound="RankWork")


class RankWork(Protocol):
    """What every rank of a benchmark is started with: among others, the fields of its Config."""

    @property
    def config(self) -> dict[str, Any]: ...


def prefill_together(
    decoder: Decoder, comm: Comm, config: Config, ids: Sequence[int], text: str
) -> tuple[Engine, float]:
    """Run prefill by the plan with this text. Returns the engine, to be released, and the seconds from when all ranks
    were ready until all were done."""
    plan = parse_plan(text)
    engine = Engine(decoder, comm, config.with_(layer_split=plan.shape.starts[1:]))
    engine.prepare(ids, plan=plan)
    comm.all_gather(b"s")
    started = perf_counter()
    engine.prefill_phase()
    comm.all_gather(b"e")
    return engine, perf_counter() - started


def work_as_rank(kind: type[JobT], work: Callable[[JobT, Decoder, Comm, Config], object]) -> None:
    """Be the rank that standard input says: load, meet the others, `work`, and leave what that returns at the store
    where the ranks have met."""
    number, given = msgspec.json.decode(sys.stdin.buffer.read(), type=tuple[int, Any])
    job = msgspec.convert(given, kind)
    config = Config.of(job.config)
    torch.set_num_threads(config.threads)
    store = join_store(config.master_addr, config.master_port, START_S)
    decoder = Decoder.load(config.model_path, config.dtype)
    comm = GlooComm(number, config.world_size, store, START_S)
    found = work(job, decoder, comm, config)
    comm.all_gather(b"d")  # nobody leaves while another still needs it
    comm.close()
    store.set(result_key(number), msgspec.json.encode(found).decode())


def measure(job: BenchJob, decoder: Decoder, comm: Comm, config: Config) -> list[list[TimedPrefill]]:
    """Time all cases in turn; all ranks make the same calls. The times, by case and round."""
    timed: list[list[TimedPrefill]] = [[] for _ in job.cases]
    for repeat in range(job.repeats + 1):
        for case, kept in zip(job.cases, timed, strict=True):
            took = _time(case, decoder, comm, config, job.ids[: case.tokens])
            if repeat:  # the first round warms up
                kept.append(took)
    return timed


def _time(case: BenchCase, decoder: Decoder, comm: Comm, config: Config, ids: Sequence[int]) -> TimedPrefill:
    variant = case.variant
    settings = config.with_(
        chunk_size=case.chunk_size,
        schedule=variant.schedule,
        sync_strategy=variant.sync_strategy,
        unsafe=not variant.sync,
        digests=variant.digests,
    )
    if variant.alone:
        alone = comm.rank == 0
        took = _prefill(_alone(decoder, settings), ids, sync=True) if alone else TimedPrefill(0.0, 0.0)
        comm.all_gather(b"a")
        return took
    engine = Engine(decoder, comm, settings)
    return _prefill(engine, ids, sync=variant.sync)


def _alone(decoder: Decoder, config: Config) -> Engine:
    return Engine(decoder, Exchange(1, Gate()).comm(0), config.with_(world_size=1, layer_split=()))


def _prefill(engine: Engine, ids: Sequence[int], *, sync: bool) -> TimedPrefill:
    """Time prefill from when all ranks are ready until all are done."""
    plan = engine.plan_for(len(ids))
    engine.prepare(ids, plan=plan if sync else without_sync(plan))
    engine.comm.all_gather(b"s")
    started, cpu = perf_counter(), process_time()
    engine.prefill_phase()
    cpu = process_time() - cpu
    engine.comm.all_gather(b"e")
    took = perf_counter() - started
    engine.recheck()
    assert engine.recorder is not None
    figures = Trace.merge([engine.recorder.events()]).rank_figures(engine.rank)
    engine.release()
    return TimedPrefill(took, figures.exposed_sync_s, cpu, engine.check_s)


if __name__ == "__main__":
    work_as_rank(BenchJob, measure)
