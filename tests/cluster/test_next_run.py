"""On real ranks, too, the next run just works after one that has failed or hung; nobody is started again."""

from __future__ import annotations

from typing import Any

import pytest

from dinfer.messages import Behave, Misbehave
from dinfer.run.failure import RankFailed
from dinfer.run.hang import Hung
from dinfer.run.run import Run
from dinfer.session.session import Session
from tests.support.twin import prompt

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(300)]

IDS = tuple(prompt(22))
DEADLINE_S = 60.0
FREED = "lanes that the run before had left blocked are freed: all ranks have met again"


def begun(session: Session, **parameters: Any) -> Run:
    return session.prefill(IDS, paused=True, chunk_size=4, max_new_tokens=3, **parameters)


def outcome(run: Run) -> tuple[list[int], list[str]]:
    run.decode()
    return run.tokens, run.sha256()


def test_after_an_op_that_raised_and_a_deadlock_the_next_runs_just_work(
    session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = session.ranks.cluster  # type: ignore[attr-defined]  # its ranks are engines
    wanted, pids = outcome(begun(session)), [facts.pid for facts in cluster.facts]

    run = begun(session)
    session.ranks.ask({1: Misbehave(act="raise", ops=("layer c1 l3",))}, DEADLINE_S)
    run.resume()
    with pytest.raises(RankFailed, match=r"rank 1 failed at `layer c1 l3`"):
        run.wait(DEADLINE_S)
    session.ranks.ask({1: Behave()}, DEADLINE_S)
    capsys.readouterr()
    run.restart()
    assert FREED in capsys.readouterr().out
    assert outcome(run) == wanted

    hangs = begun(session, schedule="batched", unsafe=True)
    hangs.resume()
    with pytest.raises(Hung):
        hangs.wait(DEADLINE_S)
    capsys.readouterr()
    after = begun(session)
    assert FREED in capsys.readouterr().out
    assert outcome(after) == wanted
    assert [facts.pid for facts in cluster.facts] == pids
