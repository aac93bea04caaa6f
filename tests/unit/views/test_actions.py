"""Verbs of a run from a panel's forms: each is the call that it shows, and takes no field that the verb has not."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from dinfer.display import Table
from dinfer.run.comparison import RunComparison
from dinfer.run.log import CallLog
from dinfer.run.run import Run
from dinfer.session.session import Session
from dinfer.views.panel.actions import board_of, is_edit, log_of, verb_of
from dinfer.views.panel.panel import Panel
from dinfer.views.panel.runs import RunsPage
from tests.support.doubles import PaperRun, paper_plan
from tests.support.runs import wait_for
from tests.support.twin import prompt

MODEL = {"layers": 3, "tokenizer": True}
RANKS = 2
DEADLINE_S = 120.0


@pytest.fixture
def run(session: Session) -> Run:
    return session.prefill(prompt(20), chunk_size=8, max_new_tokens=4, paused=True)


def do(run: Run, verb: str, **given: object) -> tuple[str, object]:
    """What a form asks for: the call, and its result."""
    action = verb_of(run, {"do": "verb", "verb": verb, "given": given})
    assert action
    return action.call, action.do()


def test_each_verb_is_the_call_that_it_shows(run: Run, tmp_path: Path) -> None:
    folder, page, book = (str(tmp_path / name) for name in ("kept", "report.html", "again.ipynb"))
    asked: list[tuple[str, dict[str, object], str]] = [
        ("inject", {"kind": "zero", "layer": 1, "chunk": 1}, 'run.inject("zero", layer=1, chunk=1)'),
        ("decode", {"max_new_tokens": 2}, "run.decode(max_new_tokens=2)"),
        ("step", {"unit": "token"}, 'run.step("token")'),
        ("step_back", {"unit": "token", "n": 2}, 'run.step_back("token", n=2)'),
        ("compare", {"what": "reference"}, 'run.compare("reference")'),
        ("save", {"folder": folder, "kv": False}, f'run.save("{folder}", kv=False)'),
        ("faults.remove", {"number": 1}, "run.faults.remove(1)"),
    ]
    for verb, given, call in asked:
        assert do(run, verb, **given)[0] == call
        assert run.last_call == call
    assert list(run.calls) == [call for _, _, call in asked]
    assert len(run.tokens) == 1
    assert (tmp_path / "kept" / "run.json").is_file()
    do(run, "calls.save", path=book)
    assert Path(book).is_file()
    run.break_at(layer=1)
    assert do(run, "breakpoints.disable", number=1)[0] == "run.breakpoints.disable(1)"
    assert not run.breakpoints[1].enabled
    assert page not in run.last_call


@pytest.mark.parametrize("given", [{"rank": "0"}, {"seconds": 3}, {"kind": 4}, {"layer": True}])
def test_what_no_form_has_is_refused(run: Run, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"run\.inject takes no \w+=.* from a form: reload the page"):
        do(run, "inject", **given)
    assert not run.faults


def test_no_other_method_can_be_called(run: Run) -> None:
    for verb in ("close", "faults.clear.__init__", "_stop", "session.close"):
        assert verb_of(run, {"do": "verb", "verb": verb, "given": {}}) is None


def test_edits_do_not_wait_for_a_step() -> None:
    assert is_edit({"do": "verb", "verb": "breakpoints.disable", "given": {"number": 1}})
    assert not is_edit({"do": "verb", "verb": "decode", "given": {}})


def test_the_log_has_what_undo_would_undo(run: Run) -> None:
    assert log_of(run) == {"count": 0, "calls": [], "undo": ""}
    run.step("chunk")
    found = log_of(run)
    assert (found["count"], found["undo"]) == (1, 'run.step("chunk")')
    assert found["calls"][0]["call"] == 'run.step("chunk")'


def test_a_run_without_verbs_has_no_forms() -> None:
    paper = PaperRun(paper_plan())
    assert board_of(paper) == {}
    assert log_of(paper)["count"] == 0


def test_runs_are_listed_and_compared(session: Session, run: Run) -> None:
    run.resume()
    run.wait(DEADLINE_S)
    new = session.prefill(prompt(20), chunk_size=4, paused=True)
    sent = list[Any]()
    page = RunsPage(new, sent.append)
    page.ask({"do": "runs", "view": "here"})
    wait_for(lambda: sent, "it is answered")
    (listed,) = sent
    assert listed["runs"]["mine"] == new.name
    assert [row[0] for row in listed["runs"]["rows"]] == [one.name for one in session.runs]
    page.ask({"do": "compare_runs", "view": "here", "names": [run.name, new.name]})
    wait_for(lambda: len(sent) == 2, "it is answered")
    said = sent[1]["compared"]
    assert said["call"] == f'session.runs.compare("{run.name}", "{new.name}")'
    assert "KV was not compared" in said["said"][0][1]
    page.ask({"do": "compare_runs", "view": "here", "names": [run.name, "run 99"]})
    wait_for(lambda: len(sent) == 3, "it is answered")
    assert "there is no run 'run 99'" in sent[2]["compared"]["error"]
    page.close()


class ListedSlowly:
    """The runs of a session, whose list waits for `door`."""

    def __init__(self) -> None:
        self.door = threading.Event()

    def table(self) -> Table:
        assert self.door.wait(DEADLINE_S)
        return Table(("name",), [("run 1",)], about={})

    def compare(self, one: str, other: str) -> RunComparison:
        raise ValueError(f"{one} cannot be compared with {other}")


class Unknown:
    """A run whose calls are not known, of such a session."""

    name = "run 1"

    def __init__(self) -> None:
        self.runs, self.calls = ListedSlowly(), CallLog()


def test_lists_displace_no_click_and_what_is_refused_is_said_where_it_was_asked() -> None:
    run, sent = Unknown(), list[Any]()
    page = RunsPage(run, sent.append)
    page.ask({"do": "runs", "view": "here"})
    page.ask({"do": "compare_runs", "view": "here", "names": ["run 1", "run 2"]})
    page.ask({"do": "cell", "view": "here"})
    for _ in range(3):
        page.ask({"do": "runs", "view": "here"})
    wait_for(lambda: len(sent) == 2, "both clicks are answered while the list is made")
    found = {key: one for message in sent for key, one in message.items()}
    assert found["compared"] == {"view": "here", "error": "run 1 cannot be compared with run 2"}
    assert found["cell"]["error"].startswith("how this run was made is not known")
    run.runs.door.set()
    wait_for(lambda: len(sent) == 4, "the lists follow, the waiting ones as one")
    assert [list(one) for one in sent[2:]] == [["runs"], ["runs"]]
    page.close()


def test_a_panel_that_is_closed_answers_nothing_more_of_runs(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    panel = Panel(run)
    closed = list[RunsPage]()
    monkeypatch.setattr(RunsPage, "close", lambda page: closed.append(page))
    panel.close()
    assert closed == [panel._runs]


# -- breakpoints


def test_a_disabled_breakpoint_stops_nothing_and_hits_are_counted(run: Run) -> None:
    run.break_at(layer=1, chunk=0)
    run.break_at(layer=2, chunk=0, when="absmax > 0")
    run.breakpoints.disable(1)
    assert str(run.breakpoints[1]) == "#1: after layer 1, chunk 0 (disabled)"
    run.resume()
    run.wait(DEADLINE_S)
    assert [run.breakpoints.hits(number) for number in (1, 2)] == [0, 1]
    run.restart()
    run.breakpoints.disable(2)
    run.breakpoints.enable(1)
    run.resume()
    run.wait(DEADLINE_S)
    assert run.standing().state == "paused"
    assert [run.breakpoints.hits(number) for number in (1, 2)] == [1, 1]


def test_disabling_is_undone(run: Run) -> None:
    run.break_at(layer=1)
    run.breakpoints.disable(1)
    assert str(run.undo()) == "undid run.breakpoints.disable(1): enabled #1"
    assert run.breakpoints[1].enabled
