"""Evidence as plain data and back: nothing of it is lost, and it leads to the same verdict."""

from __future__ import annotations

import json

import pytest

from dinfer.monitor.signs import HangEvidence
from dinfer.plan.ops import Value
from dinfer.plan.partition import partition
from dinfer.plan.schedule import build
from dinfer.verdict.judge import explain
from dinfer.verdict.signs import Came, KvBytes, Raised, Signs, StackFrame

PLAN = build(partition(layers=4, tokens=8, world_size=2, chunk_size=4), "lockstep", "pairwise")
FULL = Signs(
    positions=(1, 2), started=(True, False), limits=(3, 4), still_s=(0.5, 7.25), quiet_s=1.5, phase="decode",
    decoded=3, process="S", cpu_moves=True, answers=False, ended="was killed",
    raised=Raised("no", "layer c0 l1", "main", True, Came(Value("kv", 0, 1), 4, 512, 1 << 63)), plan_id=(1 << 64) - 1,
    frames={"main": StackFrame("model.py", 12, "forward", "x()", native=True, waits=True, held=True, c="usleep")},
    holder="main",
    medians={"layer": 0.25}, links={1: 0.125}, empty=frozenset({(0, 2), (1, 5)}),
 full=frozenset({(1, 2)}),
)  # fmt: skip


def plain(evidence: HangEvidence) -> HangEvidence:
    """There and back, through JSON."""
    return HangEvidence.of_json(json.dumps(evidence.as_dict()).encode())


@pytest.mark.parametrize("signs", [FULL, Signs()], ids=["all", "nothing"])
def test_nothing_is_lost(signs: Signs) -> None:
    evidence = HangEvidence((signs, Signs()), KvBytes(512, 64), {0: "stack"}, 0.5, "told")
    assert plain(evidence) == evidence


def test_the_first_frame_stays_the_first() -> None:
    """It says where a rank stands that has no lanes yet."""
    frames = {"load": StackFrame("model.py", 12, "load"), "control": StackFrame("service.py", 3, "serve")}
    signs = (Signs(phase="loading", quiet_s=60.0, answers=True, frames=frames), Signs(phase="done"))
    found = plain(HangEvidence(signs, KvBytes(), {})).judge(PLAN)
    assert found == explain(PLAN, signs, KvBytes())
    assert "load (model.py:12)" in found.sentence


def test_it_is_judged_as_it_was() -> None:
    signs = (
        Signs(positions=(1,), started=(True,), limits=(9,), still_s=(20.0,), quiet_s=20.0),
        Signs(
            positions=(0,), started=(False,), limits=(9,), still_s=(20.0,), quiet_s=20.0, ended="was killed"
        ),
    )
    evidence = HangEvidence(signs, KvBytes(512, 64), {})
    found = plain(evidence).judge(PLAN)
    assert found == explain(PLAN, signs, KvBytes(512, 64))
    assert (found.kind, found.rank) == ("dead", 1)
    assert plain(HangEvidence(signs, KvBytes(), {}, sentence="as told")).judge(PLAN).sentence == "as told"
