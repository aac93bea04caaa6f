"""Of all that is known of the ranks, the message names the cause."""

from __future__ import annotations

import time
from typing import Any

import pytest

from dinfer.cluster.ranks import RankState
from dinfer.config import Config
from dinfer.engine.board import Stand
from dinfer.messages import Failed
from dinfer.plan.partition import partition
from dinfer.plan.schedule import build
from dinfer.run.failure import MEASURE_S, advice, broken, standstill
from dinfer.verdict.verdict import Verdict

CONFIG = Config(world_size=2, timeout=60, start_timeout=180, log_dir="logs")
PLAN = build(partition(layers=4, tokens=8, world_size=2, chunk_size=4), "lockstep", "pairwise")
"""two ranks, two chunks, four layers, one lane a rank"""
NOBODY = (None, None)


def at(*positions: int, started: bool = True, limit: int = 99) -> list[RankState]:
    """Ranks of one lane each in prefill, in the op after so many, last heard to move at time 0."""
    return [
        RankState(stand=Stand((n,), (started,), (limit,)), phase="prefill", progressed=0.0) for n in positions
    ]


def error(message: str, secondary: bool = False) -> Failed:
    """A rank's report of an error."""
    return Failed(message, secondary=secondary)


def said(ranks: list[RankState], exits: tuple[int | None, ...] = NOBODY, now: float = 1.0) -> str | None:
    """Why the run is over, if it is."""
    found = broken(PLAN, ranks, exits, CONFIG)
    return found.why if found else standstill(PLAN, ranks, CONFIG, now)


def told(ranks: list[RankState], exits: tuple[int | None, ...] = NOBODY, now: float = 1.0) -> str:
    """The message; there must be one."""
    message = said(ranks, exits, now)
    assert message is not None
    return message


def test_ranks_that_move_have_not_failed() -> None:
    assert said(at(1, 2), now=59) is None


def test_an_error_ranks_above_deaths_and_what_it_did_to_others() -> None:
    ranks = at(1, 2)
    ranks[0].error = error("rank 0 failed at `x`: CommError: closed", secondary=True)
    assert told(ranks).startswith("rank 0 failed at `x`: CommError")
    killed = told(ranks, (None, -9))
    assert killed.startswith("rank 1 was killed by SIGKILL; it stood at: 2 of ")
    assert "\nIf nobody killed it, the kernel did, because memory ran out" in killed
    ranks[1].error = error("ValueError: the cause")
    message = "rank 1: ValueError: the cause\nThe whole traceback is in logs/rank1.log."
    assert told(ranks, (-9, 1)) == message


def test_a_traceback_that_no_log_could_take_is_in_the_message() -> None:
    ranks = at(1, 2)
    lost: dict[str, Any] = {
        "log_trouble": "2 records could not be written to logs/rank1.log: No space left",
        "traceback": "Traceback …",
    }
    ranks[1].error = Failed("ValueError: the cause", **lost)
    assert told(ranks) == (
        "rank 1: ValueError: the cause\n2 records could not be written to logs/rank1.log: No space left. So the whole "
        "traceback is here:\nTraceback …"
    )


def test_a_death_is_told_with_the_last_position() -> None:
    text = told(at(1, 2), (None, 7))
    assert text.startswith("rank 1 ended with exit status 7; it stood at: 2 of ")
    assert f"in `{PLAN.lanes[1][0].ops[2]}`" in text
    assert "logs/rank1.err" in text


def test_a_rank_that_leaves_with_status_0_and_no_result_has_failed() -> None:
    assert "rank 0 ended with exit status 0; it stood at: loading" in told(
        [RankState(phase="loading"), RankState()], (0, None)
    )


def test_a_standstill_is_told_with_every_position() -> None:
    ranks = at(1, 2)
    ranks[0].phase, ranks[0].decoded, ranks[1].process = "decode", 3, "T"
    text = told(ranks, now=61)
    assert text.startswith("no rank has made progress for 61 s (timeout); where they stand:\n")
    assert "\nrank 0: decode, token 3\n" in text
    assert f"in `{PLAN.lanes[1][0].ops[2]}` (its process is stopped)\nRank 1 is stopped by a signal" in text


def test_starting_has_a_limit_of_its_own() -> None:
    ranks = [RankState(phase="loading", progressed=0.0), RankState(progressed=0.0)]
    assert said(ranks, now=179) is None
    text = told(ranks, now=181)
    assert (
        "181 s (start_timeout); where they stand:\nrank 0: loading\nrank 1: starting\nRanks 0–1 are still"
        in text
    )


def test_measuring_takes_as_long_as_in_a_session_and_is_told_as_such() -> None:
    ranks = [RankState(phase="measuring", progressed=0.0), RankState(phase="loading", progressed=0.0)]
    assert said(ranks, now=181) is None
    assert "\nRank 0 is still measuring layers and links: " in told(ranks, now=MEASURE_S + 1)


def test_one_rank_that_moves_is_progress() -> None:
    ranks = at(1, 2)
    ranks[1].progressed = 30.0
    assert said(ranks, now=80) is None


def test_a_user_who_thinks_is_no_standstill() -> None:
    """All ranks stand where they were told to stop, for as long as one likes."""
    ranks = at(2, 2, started=False, limit=2)
    assert said(ranks, now=10_000) is None
    ranks[1].stand = Stand((1,), (True,), (2,))
    assert said(ranks, now=10_000)


# -- what to do about a standstill, in a line


def place(rank: int, kind: str) -> int:
    """The first op of that kind on a rank's only lane."""
    (lane,) = PLAN.lanes[rank]
    return next(n for n, op in enumerate(lane.ops) if op.kind == kind)


def in_ops(*kinds: str, process: str = "S") -> list[RankState]:
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
    assert advice(PLAN, in_ops(*kinds), CONFIG).startswith(words)


def test_a_stopped_rank_comes_first() -> None:
    states = in_ops("layer", "recv")
    states[1].process = "T"
    assert advice(PLAN, states, CONFIG).startswith(
        "Rank 1 is stopped by a signal or a debugger: let it go on (kill -CONT"
    )


def test_a_rank_that_still_loads_needs_the_other_timeout() -> None:
    states = [RankState(phase="loading"), *in_ops("recv")]
    text = advice(PLAN, states, CONFIG)
    assert text.startswith("Rank 0 is still starting or loading: raise start_timeout (180)")
    assert text.endswith("else see logs/rank0.log.")


def test_in_decode_a_process_that_runs_computes() -> None:
    states = [RankState(phase="decode", process="R"), RankState(phase="decode", process="S")]
    assert advice(PLAN, states, CONFIG).startswith("Rank 0 is computing, and the others wait")


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        (
            Verdict("stuck in Python", "rank 0 is in `layer c0 l0` and stuck in Python", (0,)),
            "DINFER_DEBUGPY=1",
        ),
        (Verdict("computing", "rank 0 is still computing", (0,)), "raise timeout (60) or lower chunk_size"),
        (Verdict("stalled link", "the link 0→1 carries nothing", (0,)), "dinfer doctor"),
        (Verdict("cycle", "deadlock: rank 0 waits for rank 1", (0, 1)), "dinfer verify"),
    ],
)
def test_a_verdict_takes_the_place_of_what_the_ops_suggest(verdict: Verdict, words: str) -> None:
    """A rank that is stuck in its op would also be said to compute."""
    states = in_ops("layer", "recv")
    text = standstill(PLAN, states, CONFIG, time.monotonic() + 100, verdict)
    assert text
    last = text.splitlines()[-1]
    assert last.startswith(verdict.sentence)
    assert words in last
    assert "Rank 0 is computing" not in text


def test_a_rank_with_many_lanes_is_told_in_one_short_line() -> None:
    """By the lane that computes: `where()` has all of them."""
    plan = build(partition(layers=4, tokens=8, world_size=2, chunk_size=4), "pipelined", "pairwise")
    lanes = plan.lanes[1]
    positions = tuple(min(1, len(lane.ops) - 1) for lane in lanes)
    state = RankState(stand=Stand(positions, (True,) * len(lanes), (99,) * len(lanes)), phase="prefill")
    ranks = [RankState(phase="loading"), state]
    found = broken(plan, ranks, (None, -9), Config(world_size=2, log_dir=""))
    computes = next(n for n, lane in enumerate(lanes) if not lane.ops[positions[n]].is_transfer)
    total = sum(len(lane.ops) for lane in lanes)
    assert found
    assert found.why == (
        f"rank 1 was killed by SIGKILL; it stood at: {sum(positions)} of {total} ops done; "
        f"{lanes[computes].name} in `{lanes[computes].ops[positions[computes]]}`"
    )


def test_of_many_ranks_five_are_told() -> None:
    plan = build(partition(layers=8, tokens=8, world_size=8, chunk_size=4), "lockstep", "pairwise")
    config = Config(world_size=8, timeout=60, log_dir="")
    lost = broken(plan, at(*[1] * 8), (None, *[-9] * 7), config)
    assert lost
    assert [line[:6] for line in lost.why.split("\n")] == [*(f"rank {n}" for n in range(1, 6)), "and 2 "]
    stands = standstill(plan, at(*[1] * 8), config, 61.0)
    assert stands
    assert stands.count("\nrank ") == 5
    assert "\nand 3 more\n" in stands
