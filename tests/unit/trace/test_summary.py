"""A run in one row, and which of two was faster."""

from __future__ import annotations

import re
from typing import Any

import pytest

from dinfer.plan.partition import partition
from dinfer.plan.schedule import build
from dinfer.trace.findings import Findings, with_findings
from dinfer.trace.shares import shares
from dinfer.trace.simulated import Machine, paper_trace
from dinfer.trace.summary import summary, verdict
from dinfer.trace.trace import Trace


def run(strategy: str = "pairwise", slow: float = 1.0, tokens: int = 40) -> Trace:
    plan = build(partition(layers=6, tokens=tokens, world_size=3, chunk_size=8), "lockstep", strategy)  # type: ignore[arg-type]
    return paper_trace(plan, Machine(slow={(0, 1): slow}))


def stopped(trace: Trace, **known: Any) -> Trace:
    """With what is known of how it ended."""
    return with_findings(trace, Findings(**known))


def test_a_row_of_figures() -> None:
    found = summary(run())
    assert (found["sync_strategy"], found["schedule"], found["tokens"], found["world_size"]) == (
        "pairwise",
        "lockstep",
        40,
        3,
    )
    assert found["prefill_s"] == max(rank.prefill_s for rank in shares(run()).ranks)
    assert found["bytes"] == sum(e.bytes for e in run().prefill() if e.kind == "recv")
    assert 0 < found["exposed"] < 1
    assert found["p50_s"] <= found["p99_s"]


def test_chunks_of_different_lengths_are_all_told() -> None:
    assert summary(run())["chunk_size"] == "8"
    shape = partition(layers=6, tokens=40, world_size=3, chunk_size=1, lengths=(8, 16, 16))
    assert summary(paper_trace(build(shape, "lockstep", "ring")))["chunk_size"] == "8, 2 × 16"
    assert summary(Trace(()))["chunk_size"] is None


def test_a_run_without_transfers() -> None:
    found = summary(Trace(()))
    assert (found["prefill_s"], found["p50_s"], found["bytes"]) == (0.0, None, 0)


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (
            run(),
            run(slow=90),
            r"^A took [\d.]+ s and B [\d.]+ s, [\d.]+ × as long; exposed communication: A \d+ %, B \d+ %",
        ),
        (run(slow=90), run(), r"^B took [\d.]+ s and A [\d.]+ s, "),
        (run(), run(), "cannot show so small a difference"),
        (run(), run(tokens=48), "^These are runs of different things, .*: tokens 40 and 48"),
        (Trace((), run().about), run(), "no prefill in its trace"),
        (
            run(),
            stopped(run(), failure="rank 1 is gone"),
            "^B did not come to the end of its prefill: there are no",
        ),
        (
            stopped(run(), state="paused"),
            stopped(run(), state="running"),
            "^A and B did not come to the end of their",
        ),
        (stopped(run(), state="done"), run(), "cannot show so small a difference"),
    ],
)
def test_which_of_two_was_faster(first: Trace, second: Trace, said: str) -> None:

    assert re.search(said, verdict(summary(first), summary(second), ("A", "B")))
