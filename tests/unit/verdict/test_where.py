"""Where a rank stands, in a sentence about it: at most three transfers are named, and the others counted."""

from __future__ import annotations

import pytest

from dinfer.engine.board import Stand
from dinfer.plan.partition import partition
from dinfer.plan.schedule import build
from dinfer.verdict.where import stood_text

LANES = build(partition(layers=6, tokens=8, world_size=4, chunk_size=4), "pipelined", "pairwise").lanes[1]
TRANSFERS = [n for n, lane in enumerate(LANES) if lane.ops[0].is_transfer]


@pytest.mark.parametrize(("begun", "end"), [(3, "`"), (4, "and in 1 other"), (6, "and in 3 others")])
def test_transfers_beyond_three_are_counted(begun: int, end: str) -> None:
    inside = TRANSFERS[:begun]
    stand = Stand(
        tuple(0 for _ in LANES),
        tuple(n in inside for n in range(len(LANES))),
        tuple(len(lane.ops) for lane in LANES),
    )
    text = stood_text(LANES, stand)
    assert text.count(" in `") == 3
    assert text.endswith(end)
    assert all(f"{LANES[n].name} in `{LANES[n].ops[0]}`" in text for n in inside[:3])
