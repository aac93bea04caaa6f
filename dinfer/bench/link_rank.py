"""What each rank of `dinfer bench links` and `dinfer bench planner` runs: measure, then several plans in turn, each
with its trace."""

from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

from dinfer.bench.paced import PacedComm
from dinfer.bench.rank import prefill_together, work_as_rank
from dinfer.config import Config
from dinfer.engine.kernels import Kernels
from dinfer.engine.measure import Measured
from dinfer.engine.measure import measure as time_all
from dinfer.messages import MeasureRank
from dinfer.model.decoder import Decoder
from dinfer.plan.ops import Op
from dinfer.trace.events import Event
from dinfer.transport.gloo import Comm


class LinksJob(NamedTuple):
    """What a rank is started with beside its number. `plans`: texts of plans of that prompt; `lengths`: of chunks whose
    layer times are measured, empty to measure nothing; `slow`: by rank, how often each layer is run, empty for once;
    `codecs`: that of each plan, empty for none; `pace`: links to slow down here (`bench.paced`): source, target, bytes
    per second."""

    config: dict[str, Any]
    ids: Sequence[int]
    plans: Sequence[str]
    repeats: int
    lengths: Sequence[int]
    slow: Sequence[int] = ()
    codecs: Sequence[str] = ()
    pace: Sequence[tuple[int, int, float]] = ()


class TimedPlan(NamedTuple):
    """One plan on one rank. `seconds`: of each round, from when all ranks were ready until all were done; `computed`:
    by op, the median of its seconds; `events`: those of the last round; `sha256`: of the KV that the rank held then."""

    seconds: list[float]
    computed: list[tuple[str, float]]
    events: list[Event]
    sha256: str


class Round(NamedTuple):
    """One prefill of one rank."""

    seconds: float
    events: list[Event]
    sha256: str


class RankLinks(NamedTuple):
    """What one rank has measured, None where it was not to, and the plans that it has timed."""

    measured: Measured | None
    plans: list[TimedPlan]


def measure(job: LinksJob, decoder: Decoder, comm: Comm, config: Config) -> RankLinks:
    """Measure, then time all plans in turn; all ranks make the same calls."""
    if job.slow:
        make_slow(decoder, job.slow[comm.rank])
    if job.pace:
        comm = PacedComm(comm, {(source, target): speed for source, target, speed in job.pace})
    comm.all_gather(b"m")
    command = MeasureRank(len(job.ids), tuple(job.lengths), config.chunk_size)
    found = time_all(decoder, comm, command, Kernels()) if job.lengths else None
    rounds: list[list[Round]] = [[] for _ in job.plans]
    for repeat in range(job.repeats + 1):
        codecs = job.codecs or ["none"] * len(job.plans)
        for text, codec, kept in zip(job.plans, codecs, rounds, strict=True):
            took = _prefill(decoder, comm, config.with_(codec=codec), job.ids, text)
            if repeat:  # the first round warms up
                kept.append(took)
    return RankLinks(found, [_timed(took) for took in rounds])


def make_slow(decoder: Decoder, times: int) -> None:
    """Have the decoder run each layer so many times, as a rank does that is so many times slower."""
    once = decoder.layer

    def layer(*given: Any) -> Any:
        for _ in range(times - 1):
            once(*given)
        return once(*given)

    vars(decoder)["layer"] = layer


def _timed(rounds: Sequence[Round]) -> TimedPlan:
    seconds: dict[str, list[float]] = {}
    for one in rounds:
        for event in one.events:
            if event.kind in ("embed", "layer", "norm") and event.chunk is not None:
                op = Op(event.kind, event.chunk, -1 if event.layer is None else event.layer)  # type: ignore[arg-type]
                seconds.setdefault(str(op), []).append(event.busy / 1e9)
    computed = [(op, median(some)) for op, some in seconds.items()]
    return TimedPlan([one.seconds for one in rounds], computed, rounds[-1].events, rounds[-1].sha256)


def _prefill(decoder: Decoder, comm: Comm, config: Config, ids: Sequence[int], text: str) -> Round:
    """Time prefill from when all ranks are ready until all are done."""
    engine, took = prefill_together(decoder, comm, config, ids, text)
    assert engine.recorder is not None
    assert engine.cache is not None
    found = Round(took, engine.recorder.events(), engine.cache.sha256(len(ids)))
    engine.release()
    return found


if __name__ == "__main__":
    work_as_rank(LinksJob, measure)
