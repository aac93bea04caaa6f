"""Another run's block in the place of a run's own: what that changes, how it is undone, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import dinfer
from dinfer.cluster.ranks import RankRefused
from dinfer.errors import NotPossible
from dinfer.plan.ops import NothingYet, PlanError
from dinfer.run.run import Run
from dinfer.saved.saved import Saved
from dinfer.session.session import Session
from tests.support.threads import session_on_threads

MODEL = "demo"
PROMPT = "The code of Lima is 471. The code of Oslo is 306. What is the code of Lima? The code of Lima is"
ANSWER = "471"
WRONG = {"rank": 2, "layer": 3, "chunk": 1, "tensor": "K", "bit": 29}
"""a flipped bit that changes a token on rank 2"""


def prefilled(session: Session, *faults: dict[str, Any], **parameters: Any) -> Run:
    run = session.prefill(PROMPT, paused=True, **{"chunk_size": 8, "max_new_tokens": 8} | parameters)
    for fault in faults:
        run.inject(**{"kind": "bitflip", **fault})
    run.resume()
    run.wait()
    return run


@pytest.fixture(scope="module")
def right(session: Session, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return dinfer.open(prefilled(session).save(tmp_path_factory.mktemp("saved") / "right"))


def test_the_others_block_repairs_the_answer(session: Session, right: Saved) -> None:
    run = prefilled(session, WRONG)
    sha = run.sha256()
    assert sha[0] == sha[1] != sha[2]
    said = run.graft(layer=3, chunk=1, source=right)
    assert "values changed: 0 on rank 0, 0 on rank 1, 1 on rank 2" in said
    assert run.sha256() == [sha[0]] * 3
    assert run.kv().diff().severity.name == "OK"
    assert run.edited == ["K and V of block c1 l3 on rank 2"]
    assert "edited by hand: K and V of block c1 l3 on rank 2" in str(run.where())
    assert run.decode().text.strip() == ANSWER  # and the check of bytes before decode finds nothing changed
    assert not run.corrupt


def test_a_graft_is_undone(session: Session, right: Saved) -> None:
    run = prefilled(session, WRONG)
    sha = run.sha256()
    run.graft(layer=3, chunk=1, source=right, rank=2, part="K")
    call = f'run.graft(layer=3, chunk=1, source=dinfer.open("{right.path}"), rank=2, part="K")'
    assert run.last_call == call
    assert run.sha256() != sha
    said = run.undo()
    assert said == f"undid {call}: K of block c1 l3 is what it was on rank 2"
    assert run.sha256() == sha
    assert not run.edited
    assert "by hand" not in run.undo()


def test_a_graft_before_a_move_is_undone_after_it(session: Session, right: Saved) -> None:
    run = prefilled(session, WRONG)
    sha = run.sha256()
    run.graft(layer=3, chunk=1, source=right, rank=2)
    run.step_back("chunk", 3)
    run.undo()
    run.undo()
    assert run.sha256() == sha


def test_the_other_part_is_left_as_it_is(session: Session, right: Saved) -> None:
    run = prefilled(session, {"kind": "swap_kv", "rank": 2, "layer": 2, "chunk": 0})
    sha = run.sha256()
    run.graft(layer=2, chunk=0, source=right, rank=2, part="V")
    assert run.sha256()[2] not in (sha[0], sha[2])
    run.graft(layer=2, chunk=0, source=right, rank=2, part="K")
    assert run.sha256()[2] == sha[0]


def test_a_run_that_is_over_is_named_as_it_is_had(session: Session) -> None:
    right = prefilled(session, keep=True)
    run = prefilled(session, WRONG)
    run.graft(layer=3, chunk=1, source=right)
    assert run.last_call == f'run.graft(layer=3, chunk=1, source=session.runs["{right.name}"])'
    assert eval(right.call_name, {"session": session}) is right
    assert len(set(run.sha256())) == 1


def test_the_references_block(session: Session) -> None:
    run = prefilled(session, WRONG)
    said = run.graft(layer=3, chunk=1, source="reference")
    assert "is now the reference's" in said
    assert len(set(run.sha256())) == 1


def test_what_was_computed_from_it_is_computed_again_by_going_back(session: Session, right: Saved) -> None:
    """A fault in a computation: the block is put right on all ranks, and what follows computed again."""
    run = prefilled(session, {"layer": 1, "chunk": 1, "where": "compute", "bit": 29})
    run.faults.clear()
    run.run_to(chunk=1, layer=1)
    run.graft(layer=1, chunk=1, source=right)
    run.resume()
    run.wait()
    assert set(run.sha256()) == {prefilled(session).sha256()[0]}


def test_a_block_of_a_run_in_other_chunks(session: Session, right: Saved) -> None:
    run = prefilled(session, chunk_size=5)
    run.graft(layer=3, chunk=1, source=right)
    rows = run.plan.shape.chunks[1]
    mine = run.source().values(0, 3, rows)
    assert mine.equal(right.source().values(1, 3, rows))


def test_new_tokens_are_said_to_be_older(session: Session, right: Saved) -> None:
    run = prefilled(session, {"layer": 1, "chunk": 1, "where": "compute"})
    run.decode(2)
    assert 'run.step_back("token", 2)' in run.graft(layer=1, chunk=1, source=right)


def test_a_replay_has_the_graft(session: Session, right: Saved, tmp_path: Path) -> None:
    run = prefilled(session, WRONG)
    run.graft(layer=3, chunk=1, source=right)
    run.decode()
    with dinfer.open(run.save(tmp_path / "grafted")).replay(2) as replay:
        assert replay.decode().tokens == tuple(run.tokens)


def test_nothing_changes_where_the_bytes_are_the_same(session: Session, right: Saved) -> None:
    run = prefilled(session)
    assert "0 on rank 0, 0 on rank 1, 0 on rank 2" in run.graft(layer=0, chunk=0, source=right)
    assert not run.edited
    assert "graft" not in run.undo()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"layer": 6}, "layer"),
        ({"chunk": 99}, "chunk"),
        ({"rank": 3}, "rank"),
        ({"part": "k"}, "part is 'k'; it must be 'K' or 'V'"),
        ({"source": "yesterday"}, "source is 'yesterday'; it must be \"reference\""),
    ],
)
def test_what_does_not_exist_is_refused(
    session: Session, right: Saved, given: dict[str, Any], words: str
) -> None:
    run = prefilled(session)
    with pytest.raises(PlanError, match=words):
        run.graft(**{"layer": 0, "chunk": 0, "source": right, **given})
    assert not run.edited


def test_a_block_that_is_not_there_yet(session: Session, right: Saved) -> None:
    run = session.prefill(PROMPT, paused=True, chunk_size=8)
    run.run_to(chunk=0, layer=1)
    with pytest.raises(NothingYet, match=r"no rank holds block c2 l3 yet: run\.run_to"):
        run.graft(layer=3, chunk=2, source=right)
    with pytest.raises(NothingYet, match=r"rank 1 does not hold block c2 l3 yet"):
        run.graft(layer=3, chunk=2, source=right, rank=1)


def test_rows_out_of_place_are_refused_and_what_was_written_is_undone(session: Session, right: Saved) -> None:
    run = prefilled(session, {"layer": 3, "chunk": 1, "where": "compute"})
    run.inject("append_twice", rank=2, layer=3, chunk=0)
    with pytest.raises(RankRefused, match="does not lie where it should"):
        run.graft(layer=3, chunk=1, source=right)
    assert "is what it was on rank 0, rank 1" in run.undo()


def test_another_prompt_and_another_model(session: Session, right: Saved, checkpoint: Any) -> None:
    other = session.prefill("The code of Rome is 222.", chunk_size=8)
    other.wait()
    with pytest.raises(PlanError, match="different prompts"):
        other.graft(layer=0, chunk=0, source=right)
    with session_on_threads(2, checkpoint(layers=3, tokenizer=True)) as another:
        alien = another.prefill([1, 2, 3, 4, 5], chunk_size=3)
        alien.wait()
        with pytest.raises(PlanError, match="different checkpoints"):
            alien.graft(layer=0, chunk=0, source=right)


def test_a_run_that_is_over(session: Session, right: Saved) -> None:
    run = prefilled(session)
    prefilled(session)
    with pytest.raises(NotPossible):
        run.graft(layer=0, chunk=0, source=right)
