"""`dinfer bench session`: the overhead and latencies of a session, on engines started for it."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from time import perf_counter, process_time
from typing import Any

from dinfer.bench.prefill import BenchModel, random_checkpoint
from dinfer.cluster.engines import EngineRanks
from dinfer.cluster.ipyparallel.attach import attach
from dinfer.rank import kernel
from dinfer.run.report import processor
from dinfer.run.run import Run
from dinfer.session.session import Session
from dinfer.trace.events import Event

N = 3

PATIENCE_S = 60.0

CALL_S = 600.0

SMALL: dict[str, Any] = {"prompt": list(range(5, 101)), "chunk_size": 8}
"""12 chunks of the demo model, whose layers take about a millisecond"""

LARGE: dict[str, Any] = {"prompt": [5 + n % 1000 for n in range(1024)], "chunk_size": 128}
"""8 chunks of a model whose layers take 40 ms and more on one thread"""


def bench_session(repeats: int, say: Callable[[str], None]) -> dict[str, Any]:
    """All figures, in seconds. Raises ClusterError, ConfigError or RuntimeError."""
    with session_on_engines() as (session, ranks):
        say(session.ranks.describe())
        session.load("demo", threads=1)
        result = {"machine": f"{processor()}, {os.cpu_count()} cores", "n": N, "repeats": repeats}
        result["step"] = _steps(session, ranks)
        say("steps are timed")
        result["events"] = _events(session, repeats)
        say("events are counted")
        with random_checkpoint(BenchModel()) as folder:
            session.load(str(folder), threads=1)
            result["recording"] = _recording(session, ranks, repeats, say)
        session.load("demo", threads=1)
        result["death"] = _deaths(session, ranks, repeats, say)
    return result


def table(result: dict[str, Any]) -> str:
    step, events, cost, death = (result[name] for name in ("step", "events", "recording", "death"))
    return "\n".join(
        [
            f"{result['machine']}; {result['n']} engines, one thread each",
            f"step: {_ms(step['step'])}, of which the layer {_ms(step['layer'])}: {_ms(step['latency'])} on top; "
            f"{step['ratio']:.2f} × an empty round trip to the engines, {_ms(step['round_trip'])} (target: at most 4)",
            f"events: {events['per_second']:,.0f} a second, received {events['heard']} of {events['ops']}; "
            f"a message of each rank every {_ms(events['news'])}, at most {_ms(events['longest'])} apart",
            f"recorder and watcher: prefill {cost['on']:.3f} s with, {cost['off']:.3f} s without, layers of "
            f"{_ms(cost['layer'])}: {cost['cost']:+.2%}, {cost['lowest']:+.2%} to {cost['highest']:+.2%} in pairs; "
            f"CPU time {cost['cpu_cost']:+.2%}, of which watchers {cost['watcher_share']:.2%} (target: at most 1 %)",
            f"from kill to report: {_ms(death['median'])}, at worst {_ms(max(death['seconds']))} "
            f"of {len(death['seconds'])} (target: at most 1 s); recovered in {median(death['recovered']):.1f} s",
        ]
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


@contextmanager
def session_on_engines() -> Iterator[tuple[Session, EngineRanks]]:
    """A session on N engines of a cluster that is started for it and ended afterwards."""
    cluster = attach(N, start=True)
    try:
        ranks = EngineRanks(cluster, PATIENCE_S)
    except BaseException:
        cluster.close()
        raise
    with Session(ranks) as session:
        yield session, ranks


def _steps(session: Session, ranks: EngineRanks) -> dict[str, float]:
    """Steps by one layer and empty round trips, in turn."""
    run = session.prefill(**SMALL, paused=True)
    view = ranks.cluster.view
    trips, steps = [], []
    for _ in range(60):
        trips.append(_seconds(lambda: view.apply_sync(eval, "None")))
        steps.append(_seconds(lambda: run.step("layer")))
    layers = [event.end - event.start for event in run.trace.events if event.kind == "layer"]
    step, layer, trip = median(steps), median(layers) / 1e9, median(trips)
    latency = step - layer
    return {
        "step": step,
        "layer": layer,
        "latency": latency,
        "round_trip": trip,
        "ratio": latency / trip,
        "step_max": max(steps),
    }


def _events(session: Session, repeats: int) -> dict[str, float]:
    """Runs at full speed: events received per second, and seconds between two messages of a rank."""
    rates, gaps = list[float](), list[float]()
    for _ in range(repeats):
        run = session.prefill(**SMALL, paused=True)
        ops = sum(len(lane.ops) for lanes in run.plan.lanes for lane in lanes)
        began = time.monotonic()
        run.resume()
        gaps += _gaps(session, run, lambda run=run, ops=ops: len(run.trace.events) >= ops)  # type: ignore[misc]
        rates.append(len(run.trace.events) / (time.monotonic() - began))
    return {
        "per_second": median(rates),
        "heard": len(run.trace.events),
        "ops": ops,
        "news": median(gaps),
        "longest": max(gaps),
    }


def _gaps(session: Session, run: Run, until: Callable[[], bool]) -> list[float]:
    """Seconds between two messages of a rank while the run is running."""
    last = [state.heard for state in session.ranks.ranks]
    found = list[float]()
    with session.ranks.changed:
        while run.standing().state == "running" or not until():
            session.ranks.changed.wait(0.5)
            for rank, state in enumerate(session.ranks.ranks):
                if state.heard > last[rank]:
                    found.append(state.heard - last[rank])
                    last[rank] = state.heard
    return found


def _recording(
    session: Session, ranks: EngineRanks, repeats: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Prefill with recorder and watcher and without, in turn, after one warm-up round."""
    rounds, layer = [], 0.0
    for number in range(repeats + 1):
        if number % 2:
            off = _prefill(session, ranks, recording=False)
        on = _prefill(session, ranks, recording=True)
        layers = [event.end - event.start for event in session.run.trace.events if event.kind == "layer"]
        if not number % 2:
            off = _prefill(session, ranks, recording=False)
        if number:
            rounds.append((on, off))
            layer = median(layers) / 1e9
            say(f"prefill: {on['seconds']:.3f} s with recorder and watcher, {off['seconds']:.3f} s without")
    costs = [on["seconds"] / off["seconds"] - 1 for on, off in rounds]
    cpu_on, cpu_off = (sum(pair[k]["cpu_s"] for pair in rounds) for k in (0, 1))
    watchers = sum(on["watcher_cpu_s"] for on, _ in rounds)
    return {
        "on": median(on["seconds"] for on, _ in rounds),
        "off": median(off["seconds"] for _, off in rounds),
        "layer": layer,
        "cost": median(costs),
        "lowest": min(costs),
        "highest": max(costs),
        "cpu_cost": (cpu_on + watchers) / cpu_off - 1,
        "watcher_share": watchers / cpu_off,
        "rounds": rounds,
    }


def _prefill(session: Session, ranks: EngineRanks, *, recording: bool) -> dict[str, float]:
    """The seconds of the slowest rank, and the CPU seconds of all ranks."""
    session.prefill(**LARGE, paused=True)
    answers = ranks.cluster.call(None, "dinfer.bench.session:timed_prefill", recording, timeout=CALL_S)
    return {
        "seconds": max(one["seconds"] for one in answers),
        "cpu_s": sum(one["cpu_s"] for one in answers),
        "watcher_cpu_s": sum(one["watcher_cpu_s"] for one in answers),
    }


def _deaths(session: Session, ranks: EngineRanks, repeats: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Kill a rank of a running run, and recover."""
    named, recovered = [], []
    for number in range(repeats):
        run = session.prefill(**SMALL, paused=True)
        run.step("layer", 1 + number)
        run.resume()
        named.append(_seconds(lambda run=run, rank=number % N: _kill(ranks, run, rank)))  # type: ignore[misc]
        say(run.failure.splitlines()[0])
        recovered.append(_seconds(session.recover))
    return {"seconds": named, "median": median(named), "recovered": recovered}


def _kill(ranks: EngineRanks, run: Run, rank: int) -> None:
    os.kill(ranks.cluster.facts[rank].pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while not run.failure:
        if time.monotonic() > deadline:
            raise RuntimeError(f"rank {rank} was killed, but no failure was reported within 60 s")
        time.sleep(0.001)


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


class _Nothing:
    """A recorder that keeps no event."""

    def record(self, lane: int, event: Event) -> None:
        pass


def timed_prefill(recording: bool) -> dict[str, Any]:
    """Runs on every rank: prefill of the prepared prompt. Returns seconds, and CPU seconds of rank and watcher.

    Without `recording`, no event is kept and the watcher is stopped meanwhile.
    """
    current = kernel._current
    assert current
    engine = current.host.engine
    assert engine
    executor, watcher = engine.executor, current.control.watcher.pid
    if not recording:
        executor.recorder = _Nothing()  # type: ignore[assignment]  # all that lanes do with it
    engine.comm.all_gather(b"ready")
    with _stopped(0 if recording else watcher):
        used, began, cpu = _cpu_seconds(watcher), perf_counter(), process_time()
        executor.run_to_end()
        seconds = perf_counter() - began
        used = _cpu_seconds(watcher) - used
    return {"seconds": seconds, "cpu_s": process_time() - cpu, "watcher_cpu_s": used}


@contextmanager
def _stopped(pid: int) -> Iterator[None]:
    if not pid:
        yield
        return
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _cpu_seconds(pid: int) -> float:
    import psutil

    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)
