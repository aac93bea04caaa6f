"""The watch of ranks that it did not start: their end, and silence, known through their watchers alone."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dinfer.cluster.link import Link
from dinfer.cluster.ranks import RankState
from dinfer.config import Config
from dinfer.engine.board import Stand
from dinfer.job import Job
from dinfer.launch.watch import ProcessWatch
from dinfer.plan.partition import partition
from dinfer.plan.schedule import build
from dinfer.run.failure import silence_limit
from dinfer.run.fleet import RankFailed

PLAN = build(partition(layers=6, tokens=8, world_size=3, chunk_size=4), "lockstep", "pairwise")
SPEC = SimpleNamespace(kv_heads=1, head_dim=4, hidden_size=8, dtype="float32")
JOB = cast(Job, SimpleNamespace(plan=PLAN, config=Config(world_size=3, timeout=8, log_dir="logs"), spec=SPEC))


class QuietLink:
    """A link whose ranks' states a test sets; nothing more comes, so nobody need wait."""

    def __init__(self) -> None:
        now = time.monotonic()
        stand = Stand((1,), (True,), (99,))
        self.ranks = [RankState(stand=stand, phase="prefill", heard=now) for _ in range(3)]
        self.changed: Any = self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def wait_for(self, *_: object) -> None:
        """As if the time had run out."""


@pytest.fixture
def link() -> QuietLink:
    """Three ranks that have just been heard of."""
    return QuietLink()


def failure(link: QuietLink) -> str:
    """What the watch says; it must say something."""
    with pytest.raises(RankFailed) as raised:
        ProcessWatch(JOB, cast(Link, link)).explain()
    return str(raised.value)


def test_ranks_that_are_heard_of_have_not_failed(link: QuietLink) -> None:
    ProcessWatch(JOB, cast(Link, link)).check()


def test_a_rank_that_is_gone_is_named(link: QuietLink) -> None:
    link.ranks[2].gone = True
    assert failure(link).startswith("rank 2 ")


def test_a_rank_that_was_told_to_end_is_not_the_cause(link: QuietLink) -> None:
    link.ranks[1].gone = link.ranks[2].gone = True
    link.ranks[1].reports["told_to_end"] = {}
    assert failure(link).startswith("rank 2 ")


def test_only_ranks_that_were_told_to_end_are_no_failure(link: QuietLink) -> None:
    for state in link.ranks[1:]:
        state.gone = True
        state.reports["told_to_end"] = {}
    ProcessWatch(JOB, cast(Link, link)).explain()


def test_a_silent_rank_is_named_well_before_the_timeout(link: QuietLink) -> None:
    limit = silence_limit(JOB.config.timeout)
    assert limit == 4
    link.ranks[1].heard -= limit + 0.1
    said = failure(link)
    assert said.startswith("rank 1 ")
    assert "4 s" in said


def test_when_all_others_are_silent_this_host_is_suspected(link: QuietLink) -> None:
    for state in link.ranks[1:]:
        state.heard -= 60
    assert "rank 0's host may be cut off" in failure(link)


def test_a_rank_that_has_not_come_yet_is_not_silent(link: QuietLink) -> None:
    link.ranks[1].heard = 0.0
    ProcessWatch(JOB, cast(Link, link)).check()


def test_what_all_ranks_report_alike_is_no_ranks_own(link: QuietLink) -> None:
    for state in link.ranks:
        state.reports["error"] = {"message": "they differ.", "secondary": False}
    assert failure(link) == "they differ."
