"""Traces for views to show: one on paper with a slow link, one that ranks on threads recorded. Not a test."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from dinfer.plan.partition import partition
from dinfer.plan.schedule import build
from dinfer.trace.simulated import Machine, paper_trace
from dinfer.trace.trace import Trace
from tests.support.threads import session_on_threads

PROMPT = "The code of Lima is 471. The code of Oslo is 306. What is the code of Lima? The code of Lima is"


@cache
def on_paper(
    layers: int = 36,
    chunks: int = 32,
    ranks: int = 3,
    strategy: str = "pairwise",
    schedule: str = "pipelined",
) -> Trace:
    """A run of that size; the link from rank 0 to rank 1 is eight times slower than the others."""
    shape = partition(layers=layers, tokens=chunks * 128, world_size=ranks, chunk_size=128)
    plan = build(shape, schedule, strategy)  # type: ignore[arg-type]
    return paper_trace(plan, Machine(slow={(0, 1): 8}))


@cache
def recorded() -> Trace:
    """What three ranks on threads record of the demo model, decode included."""
    with session_on_threads(3, Path("demo")) as session:
        run = session.prefill(PROMPT, chunk_size=4)
        run.wait(60)
        run.decode(4)
        return run.trace
