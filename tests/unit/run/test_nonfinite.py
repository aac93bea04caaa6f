"""NaN and Inf that all ranks compute alike: no diff differs, and still they are named, marked and counted."""

from __future__ import annotations

from math import inf
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dinfer.run.nonfinite import NonFiniteBlocks
from dinfer.run.run import Run
from dinfer.saved.saved import open_saved
from dinfer.session.session import Session
from dinfer.views.cells import NONFINITE, CellMap, marked
from dinfer.views.report.page import write_report
from tests.support.runs import wait_for
from tests.support.threads import session_on_threads
from tests.support.tiny import tiny_checkpoint
from tests.support.twin import prompt

IDS = tuple(prompt(12))
CHUNK, LAYERS, RANKS = 4, 4, 3
DEADLINE_S = 60.0
MODEL = {"layers": LAYERS}
FIRST = "first NaN in K of c1 l1, token 6, computed by rank 0"
SPREAD = {(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)}
"""chunk 1 from layer 1 on, and what attends to it"""


def begun(session: Session, **parameters: Any) -> Run:
    return session.prefill(IDS, paused=True, chunk_size=CHUNK, max_new_tokens=3, **parameters)


def spoilt(session: Session, **parameters: Any) -> Run:
    """One value of K is NaN as its owner computes it, so all ranks get it alike."""
    run = begun(session, **parameters)
    run.inject("nan", where="compute", layer=1, chunk=1, token=6)
    run.resume()
    run.wait(DEADLINE_S)
    return run


def marked_blocks(run: Run) -> set[tuple[int, int]]:
    return {(mark.chunk, mark.layer) for mark in run.standing().marks if "nonfinite" in mark.kind}


@pytest.mark.parametrize("schedule", ["pipelined", "lockstep"])
@pytest.mark.parametrize("digests", [True, False])
def test_where_names_the_first_and_counts_what_followed(
    session: Session, schedule: str, *, digests: bool
) -> None:
    run = spoilt(session, schedule=schedule, digests=digests)
    assert f"not finite: {FIRST}; " in str(run.where())
    blocks = marked_blocks(run)
    assert (1, 1) in blocks
    assert blocks <= SPREAD
    assert f"; {len(blocks) - 1} blocks since" in str(run.where())
    assert run.corrupt == []
    wait_for(lambda: any(f"⚠ warning: not finite: {FIRST}" in line for line in session.log), "the log has it")


def test_a_diff_says_so_beside_equal(session: Session) -> None:
    run = spoilt(session)
    found = run.kv().diff()
    assert found.equal
    assert "bit for bit; but " in found.verdict
    assert f"hold NaN or Inf: {FIRST}" in found.verdict
    assert "1 of these blocks holds" in run.kv(layer=1, chunk=1).diff().verdict
    assert "but" not in run.kv(layer=0).diff().verdict


def test_the_map_marks_the_block_on_every_rank_that_holds_it(session: Session) -> None:
    run = spoilt(session)
    run.where()
    standing = run.standing()
    cells = marked(CellMap(run.plan).states(standing.stands), standing.marks)
    assert (cells[1, 1] & NONFINITE).all()
    assert not (cells[0] & NONFINITE).any()
    (text,) = {
        mark.text for mark in standing.marks if (mark.chunk, mark.layer) == (1, 1) and "non" in mark.kind
    }
    assert "computed by rank 0" in text


def test_going_back_forgets_it_and_without_the_fault_it_does_not_return(session: Session) -> None:
    run = spoilt(session)
    run.run_to(chunk=0, layer=LAYERS - 1)
    assert "not finite" not in str(run.where())
    assert marked_blocks(run) == set()
    run.resume()
    run.wait(DEADLINE_S)
    assert FIRST in str(run.where())  # it is armed still, and strikes again
    run.run_to(chunk=0, layer=LAYERS - 1)
    run.faults.clear()
    run.resume()
    run.wait(DEADLINE_S)
    assert "not finite" not in str(run.where())
    run.restart()
    assert "not finite" not in str(run.where())


def test_report_and_saved_run_say_it(session: Session, tmp_path: Path) -> None:
    run = spoilt(session)
    folder = run.save(tmp_path / "saved")
    saved = open_saved(folder)
    assert FIRST in saved.findings.nonfinite
    assert f"not finite: {FIRST}" in str(saved)
    assert f"hold NaN or Inf: {FIRST}" in saved.kv().diff().verdict
    assert {(mark[1], mark[2]) for mark in saved.findings.marks if "nonfinite" in mark[3]} == marked_blocks(
        run
    )
    page = write_report([saved.trace], tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"not finite: {FIRST}".lower() in page.lower()


def test_a_damaged_weight_is_found_in_the_layer_that_it_makes_overflow(tmp_path: Path) -> None:
    """Inf first in V of the damaged layer, in the first chunk."""
    model = tiny_checkpoint(tmp_path / "model", layers=LAYERS)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.2.self_attn.v_proj.weight"][5, 3] = 3e38
    weights["model.layers.2.input_layernorm.weight"][3] = 1e3
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with session_on_threads(RANKS, model) as session:
        run = begun(session)
        run.resume()
        run.wait(DEADLINE_S)
        first = run._state.nonfinite.first
        assert first is not None
        assert (first.tensor, first.chunk, first.layer, first.value) == ("V", 0, 2, "Inf")
        assert first.rank == run.plan.shape.owners[2]
        assert str(first) in str(run.where())


def test_decode_names_the_same_layer_chunk_and_rank(session: Session) -> None:
    run = spoilt(session)
    with pytest.raises(
        Exception, match=r"not finite \(NaN or Inf\).*layer 1, chunk 1 \(token 6\).*computed by rank 0"
    ):
        run.decode(2)
    assert FIRST in str(run.where())


def test_healthy_runs_say_nothing(session: Session) -> None:
    run = begun(session)
    run.decode(2)
    assert "finite" not in str(run.where())
    assert "but" not in run.kv().diff().verdict
    assert run.standing().marks == ()


def test_hidden_states_that_users_make_infinite_are_named_by_what_comes_of_them(session: Session) -> None:
    run = begun(session)
    run.step("op")
    from tests.support.threads import engines

    engine: Any = engines(session)[0]
    engine.hidden[0, 0][0, 1, 0] = inf
    run.resume()
    run.wait(DEADLINE_S)
    first = run._state.nonfinite.first
    assert first is not None
    assert (first.chunk, first.layer, first.token, first.rank) == (0, 0, 1, 0)


def test_events_that_are_repeated_tell_of_no_block_that_was_made_again_without(session: Session) -> None:
    run = spoilt(session)
    run.trace  # noqa: B018 - waits for the last events
    before, _ = run.events_since([])
    run.step_back("chunk", n=3)
    run.faults.clear()
    run.run_to(chunk=1, layer=1)
    again = [event for event in run.trace.events if event not in before]
    lanes = sorted([*before, *again], key=lambda event: event.lane == "decode")  # a rank repeats lane by lane
    for events in ([*before, *again], lanes):
        known = NonFiniteBlocks()
        known.take(events)
        assert known.blocks.keys() == known.blocks.keys() & SPREAD - {(1, 1)}
    known = NonFiniteBlocks()
    known.take(before)
    assert (1, 1) in known.blocks
