"""200 prefills in one session on threads: memory, threads and files do not grow."""

from __future__ import annotations

import gc
import os

import pytest

from dinfer.plan.plan import Plan
from dinfer.session.session import Session
from tests.support import held
from tests.support.fixtures import fresh_session
from tests.support.twin import prompt

RANKS = 2
LAYERS, ROW_BYTES = 7, 2 * 2 * 16 * 4  # of the tiny checkpoint: K and V of a token
session = fresh_session


def plans() -> int:
    """How many plans are in memory."""
    gc.collect()
    return sum(type(one) is Plan for one in gc.get_objects())  # isinstance would ask lazy modules


def test_a_run_that_is_dropped_leaves_no_plan_behind(session: Session) -> None:
    session.runs.limit = 2
    before = plans()
    for _ in range(8):
        session.prefill(list(prompt(9)), chunk_size=4, max_new_tokens=1, paused=False).decode(1)
    assert plans() - before <= session.runs.limit + RANKS  # each rank has its own
    assert [row["name"] for row in session._figures_before(session.runs[-1].job)][
        -1
    ] == "run 7 of this session"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nothing_grows_with_the_prefills(session: Session) -> None:
    seen = held.check_prefills(session, [os.getpid()], RANKS * LAYERS * held.TOKENS * ROW_BYTES)
    print("memory, MiB:", [round(one / 2**20, 1) for one in seen[0]])
