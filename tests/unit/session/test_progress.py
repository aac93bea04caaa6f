"""A rank's progress in one line."""

from __future__ import annotations

from dinfer.cluster.ranks import RankState
from dinfer.engine.board import Phase, Stand
from dinfer.launch.runner import progress_line
from dinfer.plan.partition import partition
from dinfer.plan.schedule import build

PLAN = build(partition(layers=4, tokens=10, world_size=2, chunk_size=4), "lockstep", "pairwise")


def line(rank: int, position: int, phase: Phase = "prefill") -> str:
    """The line of a rank whose one lane has that many ops done."""
    return progress_line(PLAN, rank, RankState(stand=Stand((position,), (False,), (99,)), phase=phase))


def test_prefill_shows_chunk_layer_and_blocks() -> None:
    ops = PLAN.lanes[0][0].ops
    second = next(n for n, op in enumerate(ops) if (op.kind, op.chunk, op.layer) == ("layer", 1, 1))
    blocks = sum(op.kind == "layer" or (op.kind, op.what) == ("recv", "kv") for op in ops[: second + 1])
    assert line(0, second + 1) == f"rank 0  prefill  chunk 2 of 3, layer 1  KV {blocks} of 12 blocks"


def test_the_end_shows_all_blocks() -> None:
    assert line(1, len(PLAN.lanes[1][0].ops)).endswith("chunk 3 of 3, layer 3  KV 12 of 12 blocks")


def test_a_later_stage_first_waits() -> None:
    assert line(1, 0) == "rank 1  prefill  waiting for hidden states  KV 0 of 12 blocks"


def test_other_phases_are_named() -> None:
    assert progress_line(PLAN, 0, RankState()) == "rank 0  starting"
    assert progress_line(PLAN, 1, RankState(phase="prefill", stand=Stand((), (), ()))) == "rank 1  prefill"
    assert line(0, 3, phase="decode") == "rank 0  decode"
    assert line(0, 3, phase="loading") == "rank 0  loading"
