"""One line on what to do about a standstill, by what is seen."""

from __future__ import annotations

import pytest

from dinfer.cluster.ranks import RankState
from dinfer.config import Config
from dinfer.engine.board import Stand
from dinfer.plan.partition import partition
from dinfer.plan.schedule import build
from dinfer.run.failure import advice

CONFIG = Config(world_size=2, timeout=60, start_timeout=180, log_dir="logs")
PLAN = build(partition(layers=4, tokens=8, world_size=2, chunk_size=4), "lockstep", "pairwise")


def place(rank: int, kind: str) -> int:
    """The first op of that kind on a rank's only lane."""
    (lane,) = PLAN.lanes[rank]
    return next(n for n, op in enumerate(lane.ops) if op.kind == kind)


def ranks(*kinds: str, process: str = "S") -> list[RankState]:
    """Ranks that are in an op of these kinds; "" is a rank that has not started its first op."""
    stands = [
        Stand((place(rank, kind) if kind else 0,), (bool(kind),), (99,)) for rank, kind in enumerate(kinds)
    ]
    return [RankState(stand=stand, phase="prefill", process=process) for stand in stands]


@pytest.mark.parametrize(
    ("kinds", "words"),
    [
        (("layer", "layer"), "All ranks are computing: if that is only slow, raise timeout (60)"),
        (("layer", "recv"), "Rank 0 is computing, and the others wait for what comes of it"),
        (
            ("send", "recv"),
            "Every rank waits for a peer (rank 0 for rank 1, rank 1 for rank 0): prove the plan",
        ),
        (("", ""), "Every rank waits for a peer: prove the plan"),
    ],
)
def test_in_prefill_it_is_told_by_the_ops(kinds: tuple[str, str], words: str) -> None:
    assert advice(PLAN, ranks(*kinds), CONFIG).startswith(words)


def test_a_stopped_rank_comes_first() -> None:
    states = ranks("layer", "recv")
    states[1].process = "T"
    assert advice(PLAN, states, CONFIG).startswith(
        "Rank 1 is stopped by a signal or a debugger: let it go on (kill -CONT"
    )


def test_a_rank_that_still_loads_needs_the_other_timeout() -> None:
    states = [RankState(phase="loading"), *ranks("recv")]
    text = advice(PLAN, states, CONFIG)
    assert text.startswith("Rank 0 is still starting or loading: raise start_timeout (180)")
    assert text.endswith("else see logs/rank0.log.")


def test_in_decode_a_process_that_runs_computes() -> None:
    states = [RankState(phase="decode", process="R"), RankState(phase="decode", process="S")]
    assert advice(PLAN, states, CONFIG).startswith("Rank 0 is computing, and the others wait")
