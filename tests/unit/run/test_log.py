"""The log of a run's calls, and what makes them again: the run ends where the first one stood."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

import dinfer
from dinfer.errors import NotPossible
from dinfer.plan.ops import PlanError
from dinfer.results import Decoded
from dinfer.run import log
from dinfer.run.run import Run
from dinfer.session.session import Session
from dinfer.views.panel.actions import verb_of
from tests.support.runs import wait_for
from tests.support.twin import prompt

MODEL = {"layers": 6, "tokenizer": True}
IDS = tuple(prompt(22))
DEADLINE_S = 120.0


@pytest.fixture(scope="module")
def session(model: Path) -> Iterator[Session]:
    with dinfer.connect("threads", n=3) as session:
        yield session.load(str(model), threads=1)


@pytest.fixture
def run(session: Session) -> Run:
    return session.prefill(IDS, chunk_size=8, max_new_tokens=8, paused=True)


def place(run: Run) -> tuple[object, ...]:
    """Where a run stands, and what is set."""
    stands = run.standing().stands
    cut = tuple(tuple(stand.positions) for stand in stands)
    return cut, run.tokens, list(map(str, run.breakpoints)), [one.number for one in run.faults]


def again(run: Run) -> Run:
    """Make the run and its calls again by its cell, in a session of its own; the new run."""
    scope: dict[str, Any] = {}
    exec(run.calls.cell(), scope)
    scope["session"].close()
    made = scope["run"]
    assert isinstance(made, Run)
    return made


def check_again(run: Run) -> Run:
    """The run that is made again stands where this one does."""
    wanted, last = place(run), run.last_standing().state
    made = again(run)
    assert place(made) == wanted, run.calls.cell()
    assert made.last_standing().state == last
    return made


def calls_of(run: Run) -> list[str]:
    """The lines of the cell after those that make the run."""
    lines = run.calls.cell().splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("run = "))
    return lines[first + 1 :]


# -- what is logged


def test_calls_are_logged_as_they_were_written(run: Run) -> None:
    run.step("chunk")
    run.break_at(layer=4, chunk=1)
    run.resume()
    run.wait(DEADLINE_S)
    run.breakpoints.remove(1)
    run.inject("bitflip", layer=1, chunk=2)
    run.faults.clear()
    run.undo()
    run.decode(2, lambda _: None)
    assert list(run.calls) == [
        'run.step("chunk")',
        "run.break_at(layer=4, chunk=1)",
        "run.resume()",
        "run.breakpoints.remove(1)",
        'run.inject("bitflip", layer=1, chunk=2)',
        "run.faults.clear()",
        "run.undo()",
        "run.decode(2)",
    ]
    assert len(run.calls) == 8
    assert 'run.step("chunk")' in str(run.calls)


def test_a_run_without_calls_says_so(run: Run) -> None:
    assert str(run.calls) == "no calls yet"
    assert calls_of(run) == []


def test_the_cell_begins_with_what_makes_the_run(session: Session, model: Path) -> None:
    run = session.prefill("The code of Lima", chunk_size=4, sync_strategy="ring", temperature=0.5, seed=3)
    run.wait(DEADLINE_S)
    assert run.calls.cell().splitlines() == [
        "import dinfer",
        'session = dinfer.connect("threads", n=3)',
        f"session.load({str(model)!r}, threads=1)",
        "run = session.prefill('The code of Lima', chunk_size=4, sync_strategy='ring', schedule='pipelined', "
        "temperature=0.5, seed=3, paused=True)",
        "run.resume()",
        "run.wait()",
    ]


def test_what_was_refused_is_a_remark(run: Run) -> None:
    with pytest.raises(PlanError):
        run.run_to(chunk=9, layer=0)
    (line,) = calls_of(run)
    assert line.startswith("# run.run_to(chunk=9, layer=0)  was refused: there is no block")


# -- made again


def test_moves_breakpoints_faults_and_decode_are_made_again(run: Run) -> None:
    run.step("layer", 3)
    run.step_back("layer")
    run.break_at(layer=4, chunk=1)
    run.break_at(layer=5)
    run.resume()
    run.wait(DEADLINE_S)
    run.breakpoints.remove(2)
    run.inject("bitflip", rank=2, layer=3, chunk=2)
    run.run_to(chunk=2, layer=5)
    run.decode(4)
    run.step_back("token", 2)
    made = check_again(run)
    assert made.kv().diff().first
    assert "run.go_to" not in run.calls.cell()


def test_undo_is_made_again(run: Run) -> None:
    run.step("chunk")
    run.break_at(layer=1)
    run.decode(3)
    run.breakpoints.clear()
    run.decode(3)
    run.undo()
    run.undo()
    check_again(run)


def test_where_a_pause_has_stopped_it_is_gone_to(session: Session) -> None:
    run = session.prefill([1 + n % 60 for n in range(400)], chunk_size=2)
    wait_for(lambda: run.standing().stands[0].positions[0] > 9, "it moves")
    run.pause()
    run.step("layer")
    assert run.standing().state == "paused"
    check_again(run)
    lines = calls_of(run)
    assert lines[0].startswith("run.go_to([[")
    assert lines[0].endswith("]])  # run.resume(), which stopped there")
    assert lines[1:] == ['run.step("layer")']


def test_a_play_that_was_paused_is_gone_to(session: Session) -> None:
    run = session.prefill([1 + n % 60 for n in range(100)], chunk_size=2, paused=True)
    run.play("layer", per_second=50)
    wait_for(lambda: any(map(any, (stand.positions for stand in run.standing().stands))), "it plays")
    run.pause()
    check_again(run)
    assert calls_of(run)[0].endswith('# run.play("layer", per_second=50), which stopped there')


def test_a_play_to_its_end_is_played_again(run: Run) -> None:
    run.play("chunk", per_second=100)
    run.wait(DEADLINE_S)
    check_again(run)
    assert calls_of(run) == ['run.play("chunk", per_second=100)', "run.wait()"]


def test_a_condition_that_was_met_is_gone_to(run: Run) -> None:
    run.break_at(layer=3, when="absmax > 0")
    run.resume()
    run.wait(DEADLINE_S)
    assert run.standing().state == "paused"
    check_again(run)


def test_a_decode_that_was_stopped_makes_as_many_tokens(session: Session) -> None:
    run = session.prefill(IDS, chunk_size=8, max_new_tokens=2000, paused=True)
    for host in session.ranks.hosts:  # type: ignore[attr-defined]
        host.decoder.eos_ids = frozenset()
    thread = threading.Thread(target=lambda: run.decode(2000))
    thread.start()
    wait_for(lambda: all(run.standing().tokens), "it decodes")
    run.pause()
    thread.join(DEADLINE_S)
    count = len(run.tokens)
    assert 0 < count < 2000
    assert calls_of(run) == [f"run.decode(max_new_tokens={count})  # run.decode(2000), which was stopped"]


def test_a_decode_that_was_stopped_before_its_first_token_makes_none(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.decode(2)
    go = run._generation.go

    def stopped(*args: Any) -> Decoded:
        run._generation.stop()
        return go(*args)

    monkeypatch.setattr(run._generation, "go", stopped)
    run.step("token", 3)
    monkeypatch.undo()
    run.step("token")
    first, second, third = calls_of(run)
    assert (first, third) == ("run.decode(2)", 'run.step("token")')
    assert second.startswith("run.go_to([[")
    assert second.endswith('# run.step("token", 3), which stopped there')
    assert len(check_again(run).tokens) == 3


def test_a_decode_that_was_interrupted_makes_as_many_tokens(session: Session) -> None:
    run = session.prefill(IDS, chunk_size=8, max_new_tokens=2000, paused=True)
    for host in session.ranks.hosts:  # type: ignore[attr-defined]
        host.decoder.eos_ids = frozenset()
    pieces = list[str]()

    def interrupted(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.decode(2000, interrupted)
    count = len(run.tokens)
    assert 0 < count < 2000
    assert calls_of(run) == [f"run.decode(max_new_tokens={count})  # run.decode(2000), which was stopped"]


def test_a_step_that_was_interrupted_is_gone_to(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    stepper, reach = run._moves.stepper, run._moves.stepper.step

    def interrupted(*args: Any) -> Any:
        reach(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(stepper, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.step("layer", 2)
    monkeypatch.undo()
    check_again(run)


def test_what_needs_another_run_is_left_out(session: Session, tmp_path: Path) -> None:
    other = session.prefill(IDS, chunk_size=8, keep=True)
    other.wait(DEADLINE_S)
    run = session.prefill(IDS, chunk_size=8, paused=True)
    run.inject("bitflip", rank=1, layer=2, chunk=1)
    run.resume()
    run.wait(DEADLINE_S)
    run.graft(layer=2, chunk=1, source=other, rank=1)
    run.undo()
    graft, undo = calls_of(run)[-2:]
    call = f'run.graft(layer=2, chunk=1, source=session.runs["{other.name}"], rank=1)'
    assert graft == f"# {call}  was left out: the other run is needed for it, and is not made here"
    assert undo == f"# run.undo()  was left out: it undid {call}"
    book = nbformat.read(run.calls.save(tmp_path / "graft.ipynb"), as_version=4)  # type: ignore[no-untyped-call]
    assert [cell.source for cell in book.cells[-3:]] == [graft, undo, "run.where()"]
    check_again(run)


def test_a_restart_is_made_again(run: Run) -> None:
    run.step("chunk")
    run.restart()
    run.step("layer", 2)
    check_again(run)


def test_a_run_that_is_over_is_made_again(session: Session, run: Run) -> None:
    run.step("chunk")
    wanted = place(run)
    session.prefill(IDS, chunk_size=8, paused=True)
    assert place(again(run)) == wanted


# -- going to a cut


def test_any_cut_is_gone_to(run: Run) -> None:
    run.step("op", 7)
    there = tuple(stand.positions for stand in run.standing().stands)
    run.resume()
    run.wait(DEADLINE_S)
    run.go_to([list(lanes) for lanes in there])
    assert tuple(stand.positions for stand in run.standing().stands) == there
    run.undo()
    assert run.standing().state == "done"


@pytest.mark.parametrize("positions", [5, [], [[1]], "abc", [[10**6] * 9] * 3])
def test_what_is_no_cut(run: Run, positions: Any) -> None:
    with pytest.raises(
        (PlanError, ValueError), match=r"positions (is|are) .*; (they must be|there an op|it must)"
    ):
        run.go_to(positions)
    with pytest.raises(PlanError, match="there an op would lack what it needs"):
        run.go_to([[n + 1 for n in stand.positions] for stand in run.standing().stands])


# -- a notebook


def test_a_notebook_has_a_cell_for_each_call(run: Run, tmp_path: Path) -> None:
    run.step("chunk")
    run.decode(2)
    made = run.calls.save(tmp_path / "replay.ipynb")
    book = nbformat.read(made, as_version=4)  # type: ignore[no-untyped-call]
    nbformat.validate(book)
    assert [cell.source for cell in book.cells[3:]] == ['run.step("chunk")', "run.decode(2)", "run.where()"]
    assert book.cells[2].source.startswith("run = session.prefill((")
    assert run.calls.save(tmp_path / "replay.ipynb") == made, "this run's own file is replaced"


def test_a_notebook_goes_on_where_the_run_hung(session: Session, tmp_path: Path) -> None:
    run = session.prefill(IDS, chunk_size=8, schedule="batched", unsafe=True)
    with pytest.raises(RuntimeError, match="deadlock"):
        run.wait(DEADLINE_S)
    book = nbformat.read(run.calls.save(tmp_path / "hang.ipynb"), as_version=4)  # type: ignore[no-untyped-call]
    cell = next(cell for cell in book.cells if cell.source.startswith("run.resume()"))
    assert cell.metadata["tags"] == ["raises-exception"]


@pytest.mark.parametrize("by", ["session", "mend", "panel"])
def test_a_run_that_hung_and_began_again_is_made_again(session: Session, tmp_path: Path, by: str) -> None:
    run = session.prefill(IDS, chunk_size=8, schedule="batched", unsafe=True)
    with pytest.raises(RuntimeError, match="deadlock"):
        run.wait(DEADLINE_S)
    if by == "mend":
        run.mend()
    else:
        recover = verb_of(run, {"do": "recover"})
        assert recover
        recover.do() if by == "panel" else session.recover()
        run.restart()
    run.inject("bitflip", rank=1, layer=1, chunk=1)
    run.resume()
    with pytest.raises(RuntimeError, match="deadlock"):
        run.wait(DEADLINE_S)
    book = nbformat.read(run.calls.save(tmp_path / "again.ipynb"), as_version=4)  # type: ignore[no-untyped-call]
    assert [(cell.source, cell.metadata.get("tags", [])) for cell in book.cells[3:]] == [
        ("run.resume()\nrun.wait()", ["raises-exception"]),
        ("session.recover()", []),
        ("run.restart()", []),
        ('run.inject("bitflip", rank=1, layer=1, chunk=1)', []),
        ("run.resume()\nrun.wait()", ["raises-exception"]),
        ("run.where()", []),
    ]


def test_a_failure_that_was_mended_is_not_where_it_stopped(session: Session) -> None:
    run = session.prefill(IDS, chunk_size=8, paused=True)
    resumed = run.calls.add("run.resume()")
    cuts = run._moves.stepper.cuts
    resumed.start, resumed.target = cuts.start, cuts.end
    run.calls.add("session.recover()").before = None
    restarted = run.calls.add("run.restart()")
    restarted.before, restarted.after = None, cuts.start
    run.step("chunk")
    assert calls_of(run) == [
        "run.resume()",
        "run.wait()",
        "session.recover()",
        "run.restart()",
        'run.step("chunk")',
    ]


def test_what_is_no_notebook(run: Run, tmp_path: Path) -> None:
    with pytest.raises(NotPossible, match=r"it must end in \.ipynb"):
        run.calls.save(tmp_path / "replay.py")


def test_a_log_is_bounded(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "MOST", 2)
    for _ in range(3):
        run.step("op")
    assert list(run.calls) == ['run.step("op")'] * 2
    with pytest.raises(NotPossible, match="this run has 3 calls, and only the last 2 are known"):
        run.calls.cell()
