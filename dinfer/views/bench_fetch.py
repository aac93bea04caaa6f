"""`dinfer bench views --engines`: from a browser's question to its picture, of one layer's K that real engines hold."""

import queue
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from dinfer.session.benches.bench import Shape, random_checkpoint
from dinfer.session.benches.bench_session import session_on_engines
from dinfer.session.runs.run import Run
from dinfer.views.bench_live import DIMS, HEADS, TOKENS
from dinfer.views.inspector import Inspector

SHAPE = Shape(layers=3, kv_heads=HEADS, head_dim=DIMS)
"""a layer for each engine; that of the others does not change what one layer's KV is"""
ANSWER_S = 60.0


def fetch_costs(repeats: int, say: Callable[[str], None]) -> dict[str, float]:
    """On three engines started for it. Raises ClusterError, ConfigError or RuntimeError."""
    with session_on_engines() as (session, _), random_checkpoint(SHAPE) as folder:
        session.load(str(folder), threads=1)
        run = session.prefill([5 + n % 1000 for n in range(TOKENS)], chunk_size=128)
        run.wait()
        costs = fetched(run, repeats)
        say("the inspector's fetch from engines is timed")
        return costs


def fetched(run: Run, repeats: int) -> dict[str, float]:
    """Milliseconds to the picture of the first layer, medians, and the bytes of its values: `first`, when nothing of it
    is here; `difference`, with that of a rank that holds the same; `again`, when nothing has changed."""
    times: dict[str, list[float]] = {"first": [], "difference": [], "again": []}
    last = run.world_size - 1
    for _ in range(repeats + 1):
        asked = _Asked(run)
        for name, show in (("first", "a"), ("difference", "a-b"), ("again", "a")):
            times[name].append(asked.seconds(last, show) * 1e3)
        asked.inspector.close()
    heads, tokens, dims = run.kv(layer=0, rank=last).k.shape
    size = heads * tokens * dims * run.source().subject.dtype.itemsize
    return {"bytes": size, **{name: median(some[1:]) for name, some in times.items()}}  # the first warms up


class _Asked:
    """One browser."""

    def __init__(self, run: Run) -> None:
        self._heard: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.inspector = Inspector(run, lambda content, _=None: self._heard.put(content))

    def seconds(self, rank: int, show: str) -> float:
        """Until the picture is sent; returns once the comparison after it is told, too."""
        began = time.perf_counter()
        self.inspector.ask({"view": "bench", "layer": 0, "tensor": "K", "a": rank, "b": 0, "show": show})
        head = self._heard.get(timeout=ANSWER_S)["kv"]
        took = time.perf_counter() - began
        if "error" in head:
            raise RuntimeError(head["error"])
        self._heard.get(timeout=ANSWER_S)
        return took


def line(costs: dict[str, float]) -> str:
    """What was measured, for people."""
    return (
        f"inspector, K of a layer ({HEADS} × {TOKENS} × {DIMS}) from one of three engines: {costs['first']:.0f} ms "
        f"from question to picture, {costs['bytes'] / 1e6:.1f} MB; A − B with a rank that holds the same "
        f"{costs['difference']:.0f} ms; again, unchanged, {costs['again']:.0f} ms"
    )
