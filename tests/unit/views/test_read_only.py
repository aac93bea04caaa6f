"""A saved run, or a trace, as views hold a run: the panel shows what is known, and nothing of it moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec import structs

import dinfer
from dinfer.errors import NotPossible
from dinfer.plan.cut import UNITS
from dinfer.run.run import Run
from dinfer.saved.about import About
from dinfer.saved.format import SavedError
from dinfer.saved.saved import Saved, open_saved
from dinfer.session.session import Session
from dinfer.trace.trace import Trace
from dinfer.views.bins import packed
from dinfer.views.cells import EVERYWHERE, CellMap
from dinfer.views.panel.panel import Panel
from dinfer.views.read_only import ReadOnlyRun, read_only
from tests.support.doubles import PaperRun, paper_plan
from tests.support.maps import unpacked
from tests.support.runs import wait_for
from tests.support.saved_runs import LAYERS, PROMPT, done
from tests.support.threads import session_on_threads

MODEL = {"layers": LAYERS, "tokenizer": True}


@pytest.fixture
def run(session: Session) -> Run:
    found = done(session)
    found.decode(4)
    return found


def opened(run: Run, folder: Path) -> ReadOnlyRun:
    return ReadOnlyRun(open_saved(run.save(folder, prompt=True)))


def answered(panel: Panel) -> str:
    wait_for(lambda: panel.shown["answer"] or panel.shown["error"], "it answers")
    return str(panel.shown["answer"] or panel.shown["error"])


@pytest.fixture
def panel(run: Run, tmp_path: Path) -> Iterator[Panel]:
    made = Panel(opened(run, tmp_path / "saved"))
    yield made
    made.close()


def test_it_stands_where_the_run_stood(run: Run, tmp_path: Path) -> None:
    saved = opened(run, tmp_path / "saved")
    live, then = run.standing(), saved.standing()
    assert saved.plan == run.plan
    assert [stand.positions for stand in then.stands] == [stand.positions for stand in live.stands]
    assert (then.state, then.decoded, then.text) == (live.state, live.decoded, live.text)
    assert (then.devices, then.alive, then.over) == (live.devices, live.alive, "")
    assert saved.chunk_labels() == run.chunk_labels()
    events, read = saved.events_since([])
    assert tuple(events) == run.trace.events
    assert saved.events_since(read)[0] == []


def test_a_run_that_stopped_half_way_is_shown_there(session: Session, tmp_path: Path) -> None:
    run = session.prefill(PROMPT, chunk_size=8, paused=True)
    run.run_to(chunk=1, layer=2)
    cells = CellMap(run.plan)
    folder = run.save(tmp_path / "saved")
    report = dinfer.open(folder).report(tmp_path / "report.html")
    for then in (ReadOnlyRun(open_saved(folder)), ReadOnlyRun(open_saved(report))):
        assert then.standing().state == "paused"
        assert packed(cells.states(then.standing().stands)) == packed(cells.states(run.standing().stands))


def test_a_bare_trace_has_its_positions_from_what_ended(session: Session, tmp_path: Path) -> None:
    run = session.prefill(PROMPT, chunk_size=8, paused=True)
    run.step("layer", 5)
    path = Trace.merge([run.trace.events], **run.trace.about).export("jsonl", tmp_path / "trace.jsonl")
    then = ReadOnlyRun(open_saved(path))
    assert [stand.positions for stand in then.standing().stands] == [
        stand.positions for stand in run.standing().stands
    ]
    assert then.standing().state == "paused"
    with pytest.raises(SavedError, match="a trace and findings, but no KV"):
        then.kv(layer=0)
    assert then.verdict() == "the trace says of the run: paused"


def test_a_trace_of_other_code_is_refused_with_what_shows_it(tmp_path: Path) -> None:
    path = Trace.merge([[]]).export("jsonl", tmp_path / "trace.jsonl")
    for given in (path, tmp_path):  # a folder of `dinfer watch` is opened as its trace
        with pytest.raises(NotPossible, match=r"has no plan of dinfer.*`dinfer report` draws it"):
            ReadOnlyRun(open_saved(given))


def test_all_that_moves_is_refused(run: Run, tmp_path: Path) -> None:
    saved = opened(run, tmp_path / "saved")
    unit = UNITS[0]
    acts: list[Callable[[], object]] = [
        lambda: saved.step(unit),
        lambda: saved.step_back(unit),
        lambda: saved.play(unit, 1),
        lambda: saved.run_to(chunk=0, layer=0),
        lambda: saved.break_at(layer=1),
        saved.undo,
        saved.resume,
        saved.pause,
        saved.restart,
        saved.mend,
        saved.faults.clear,
    ]
    for act in acts:
        with pytest.raises(NotPossible, match="this is a saved run: read-only"):
            act()
    assert saved.standing() == opened(run, tmp_path / "saved").standing()


def test_the_panel_says_what_it_is_and_refuses_what_a_browser_asks(panel: Panel) -> None:
    assert panel.board["read_only"].startswith("a saved run: read-only. In a notebook: run = dinfer.open(")
    panel._handle_custom_msg({"id": "1", "do": "step", "unit": "layer"}, [])
    assert "read-only" in answered(panel)
    cells = unpacked(panel.cells, CellMap(panel._run.plan).shape)
    assert (cells == EVERYWHERE).all()


def test_ranks_are_compared_and_the_map_shows_what_differs(session: Session, tmp_path: Path) -> None:
    run = session.prefill(PROMPT, chunk_size=8, paused=True)
    run.inject("bitflip", rank=2, layer=1, chunk=1, where="memory")
    run.resume()
    run.wait(60)
    saved = opened(run, tmp_path / "saved")
    heard: list[int] = []
    forget = saved.on_change(lambda: heard.append(1))
    known = [mark.text for mark in saved.standing().marks]
    found = saved.kv().diff()
    assert not found.equal
    assert heard
    forget()
    marks = [mark for mark in saved.standing().marks if mark.kind == "differs"]
    assert "differed when this was written: `compare ranks` says where" in known
    assert [(mark.rank, mark.chunk, mark.layer) for mark in marks] == [(2, 1, 1)]


def test_a_hung_run_is_read_all_the_same(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = open_saved(run.save(tmp_path / "saved"))
    assert saved.about
    monkeypatch.setattr(Saved, "about", property(lambda _: _with_state(saved, "hung")))
    panel = Panel(ReadOnlyRun(saved))
    sent: list[dict[str, object]] = []
    panel._inspector._send = lambda content, *_: sent.append(content)
    panel._inspector.ask({"view": "one", "layer": 1, "tensor": "K", "a": 0, "b": 1, "have": ""})
    wait_for(lambda: any("kv" in message for message in sent), "a picture comes")
    panel.close()
    assert panel.shown["state"] == "hung"
    assert "error" not in sent[0]["kv"]  # type: ignore[operator]


def _with_state(saved: Saved, state: str) -> About:
    assert saved._about
    return structs.replace(saved._about, state=state)


def test_dinfer_open_shows_it(tmp_path: Path, model: Path) -> None:
    with session_on_threads(2, model) as session:
        done(session).save(tmp_path / "saved")
    panel = dinfer.open(tmp_path / "saved").debugger()
    assert isinstance(panel, Panel)
    assert "rank 1" in panel.still() or "<td>1</td>" in panel.still()
    panel.close()
    with pytest.raises(NotPossible, match=r"use dinfer\.open"):
        open_saved(tmp_path / "saved").debugger()


def test_a_live_run_is_not_read_only() -> None:
    assert read_only(PaperRun(paper_plan())) == ""
