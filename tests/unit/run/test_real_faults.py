"""The two faults of the system that our first users wrote, each named in the first line of what dinfer says.

One rank appended what it had received twice, while a matrix of what was received said 100 %; and, after that was
mended, decode appended each row twice on all ranks alike, so that the ranks agreed and the text was wrong.
"""

from __future__ import annotations

import pytest

from dinfer.cluster.threads import LocalRanks
from dinfer.run.run import Run
from dinfer.session.session import Session

PROMPT = "Where do the rows come from?"[:26]
NEW = 5
DEADLINE_S = 60.0


MODEL = {"layers": 4, "tokenizer": True}


def finished(run: Run) -> Run:
    run.resume()
    assert run.wait(DEADLINE_S).state == "done"
    return run


def first_line(said: object) -> str:
    return str(said).splitlines()[0]


@pytest.fixture
def received_twice(session: Session) -> Run:
    """Rank 0 holds the prompt's rows of layer 0 twice."""
    run = session.prefill(PROMPT, chunk_size=26, paused=True)
    run.inject("append_twice", rank=0, layer=0, chunk=0)
    return finished(run)


@pytest.fixture
def received_twice_in_chunks(session: Session) -> Run:
    """The same, where the layer came in four blocks: all of it again, behind the last."""
    run = finished(session.prefill(PROMPT, chunk_size=8, max_new_tokens=30, paused=True))
    assert isinstance(session.ranks, LocalRanks)
    engine = session.ranks.hosts[0].engine
    assert engine
    state = engine.executor.state
    rows = state.cache.tensor(0)
    rows[26:52] = rows[:26].clone()
    state.extra[0] = 26
    return run


@pytest.fixture
def appends_each_row_twice(session: Session) -> Run:
    """Decode of five tokens, on all ranks alike."""
    run = finished(session.prefill(PROMPT, chunk_size=8, paused=True))
    run.inject("repeat_row")
    run.decode(NEW)
    return run


@pytest.mark.parametrize("fixture", ["received_twice", "received_twice_in_chunks"])
def test_a_rank_that_has_received_a_layer_twice(request: pytest.FixtureRequest, fixture: str) -> None:
    run: Run = request.getfixturevalue(fixture)
    said = "rank 0 holds 52 tokens of layer 0, the others 26; rows 26–51 repeat rows 0–25"
    for found in (run.kv().diff(), run.kv(layer=0).diff(), run.kv().diff(ranks=(0, 2))):
        assert first_line(found) == said
        assert [(one.rank, one.layer, one.kind, one.rows) for one in found.differences] == [
            (0, 0, "repeated", 26)
        ]
    assert run.kv(layer=1).diff().equal
    assert first_line(run.compare("reference")) == (
        "placement is wrong: rank 0 holds 52 rows of layer 0, ranks 1, 2 and the reference 26; "
        "rows 26–51 repeat rows 0–25"
    )


def test_decode_that_appends_each_row_twice_everywhere(session: Session, appends_each_row_twice: Run) -> None:
    run = appends_each_row_twice
    wrong, tokens = run.text, run.tokens
    assert len(set(run.sha256())) == 1
    assert first_line(run.compare("reference")) == (
        "placement is wrong: all 3 ranks hold 34 rows of every layer, the reference 30; row 27 repeats row 26"
    )
    assert first_line(run.kv().diff()).startswith(
        "all 3 ranks hold 34 tokens of layers 0–3, it should be 30; row 27 repeats row 26"
    )
    right = session.prefill(PROMPT, chunk_size=8, max_new_tokens=NEW)
    right.decode(NEW)
    assert right.compare("reference").equal
    assert len(right.tokens) == len(tokens) == NEW
    assert right.text != wrong
