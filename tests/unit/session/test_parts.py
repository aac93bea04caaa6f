"""The parts of a session, each alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dinfer.cluster.ranks import RankState
from dinfer.messages import Failed
from dinfer.run.state import State
from dinfer.session.news import RunNews
from dinfer.session.ranks_watch import RanksWatch
from dinfer.severity import Severity
from dinfer.verdict.verdict import Verdict
from tests.support.bare_ranks import BareRanks


class WatchedRanks(BareRanks):
    """Ranks that note what they are asked to record."""

    def __init__(self) -> None:
        super().__init__(2)
        self.asked: list[tuple[str, bool]] = []

    def watch(self, folder: str, *, compare: bool = False) -> None:
        self.asked.append((folder, compare))


def test_one_watch_serves_all_calls_until_one_asks_to_compare() -> None:
    ranks = WatchedRanks()
    watch = RanksWatch(ranks, None, None)
    try:
        first = watch.begin(compare=False)
        assert watch.begin(compare=False) is first
        assert [compare for _, compare in ranks.asked] == [False]
        second = watch.begin(compare=True)
        assert second is not first
        assert watch.begin(compare=False) is second
        (before, _), (after, compare) = ranks.asked
        assert before != after
        assert compare
    finally:
        watch.close()


def test_ranks_that_were_started_again_record_where_the_others_do() -> None:
    ranks = WatchedRanks()
    watch = RanksWatch(ranks, None, None)
    watch.began_anew()
    assert ranks.asked == [], "nothing is watched yet"
    try:
        watch.begin(compare=True)
        with watch.recovering():
            assert watch.stuck_ranks() == ()
        watch.began_anew()
        assert ranks.asked == [ranks.asked[0]] * 2
    finally:
        watch.close()


def run_of(**known: Any) -> Any:
    """A run, as far as its news need it."""
    standing = SimpleNamespace(state=State.FAILED, severity=Severity.ERROR, remedy="run.restart()")
    nothing = {"cause": "", "failure": "", "silence": "", "hang": "", "told": None}
    return SimpleNamespace(**{**nothing, **known}, standing=lambda: standing)


def test_what_is_known_of_a_run_is_news_once() -> None:
    news, ranks = (
        RunNews(),
        [RankState(), RankState(error=Failed("it failed", traceback="Traceback of rank 1"))],
    )
    run = run_of(silence="rank 1 does not answer")
    (silent,) = news.of(run, ranks)
    assert "rank 1 does not answer" in silent
    assert "run.restart()" in silent
    assert list(news.of(run, ranks)) == []
    run.silence = ""
    assert list(news.of(run, ranks)) == ["all ranks answer again"]
    run.cause = run.failure = "rank 1 failed"
    failed, traceback = news.of(run, ranks)
    assert "rank 1 failed" in failed
    assert traceback == "rank 1:\nTraceback of rank 1"
    assert list(news.of(run, ranks)) == []
    assert len(list(news.of(run_of(cause="rank 1 failed"), ranks))) == 2, "of another run it is news"


@pytest.mark.parametrize("failure", ["", "a rank is gone"])
def test_a_hang_is_news_of_a_run_that_has_not_failed(failure: str) -> None:
    run, news = run_of(hang="deadlock", failure=failure), RunNews()
    run.told = Verdict("cycle", "deadlock: rank 0 waits for rank 1", (0, 1), stacks={1: "in send"})
    lines = list(news.of(run, []))
    assert lines[1:] == ([] if failure else ["rank 1 stands at:\nin send"])
    assert all("rank 0 waits for rank 1" in line for line in lines[:1])
    run.told, run.hang = None, ""
    assert list(news.of(run, [])) == ([] if failure else ["the run moves again"])
