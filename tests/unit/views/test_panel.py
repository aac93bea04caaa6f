"""The kernel's side of the panel: what it sends, what its buttons do, that it never waits and hides no error."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from anywidget._util import enable_custom_widget_manager_once
from ipywidgets.widgets.widget import _instances

from dinfer.engine.board import DeviceMemory
from dinfer.plan.breakpoints import CONDITION_FORMS
from dinfer.plan.cut import UNITS
from dinfer.run.state import Mark
from dinfer.views.bins import packed
from dinfer.views.cells import ARMED, DIFFERS, EVERYWHERE, CellMap
from dinfer.views.panel.panel import Panel
from dinfer.views.panel.slotted import ONLY_WIDGETS, VIEW
from dinfer.views.protocol import InspectableRun
from tests.support.doubles import PaperRun, TwinRun, paper_plan
from tests.support.expected import panel_threads
from tests.support.maps import unpacked
from tests.support.runs import wait_for


class Held:
    """A panel and its run, with the messages of a browser."""

    def __init__(self, run: InspectableRun) -> None:
        self.run: Any = run
        self.panel = Panel(run)
        self.sent: list[Any] = []
        self.panel.send = lambda content, **_: self.sent.append(content)

    def press(self, do: str, **fields: object) -> None:
        """What the browser sends for a button."""
        self.panel._handle_custom_msg({"id": f"{do}", "do": do, **fields}, [])

    def see(self, key: str, value: object) -> None:
        """Wait until the panel shows that."""
        wait_for(lambda: self.panel.shown[key] == value, f"{key} is {value}, not {self.panel.shown[key]}")

    def done(self) -> None:
        """Wait until what was pressed is done and shown, and the map is the run's."""
        workers = self.panel._workers
        wait_for(lambda: not any(worker.current for worker in workers), "actions end")
        self.see("working", [])
        wait_for(lambda: self.panel.cells == self.now(), "the map agrees")

    def now(self) -> bytes:
        return packed(CellMap(self.run.plan).states(self.run.standing().stands))

    def everywhere(self) -> int:
        """How many blocks the panel shows on every rank."""
        cells = unpacked(self.panel.cells, CellMap(self.run.plan).shape)
        return int((cells == EVERYWHERE).all(axis=2).sum())


@pytest.fixture
def paper() -> Iterator[Held]:
    held = Held(PaperRun(paper_plan()))
    yield held
    held.run.open.set()
    held.panel.close()


def test_the_browser_is_told_what_the_run_is(paper: Held) -> None:
    assert paper.panel.board["owners"] == [0, 0, 1, 1]
    assert paper.panel.board["chunks"] == [[0, 8], [8, 16], [16, 24]]
    assert paper.panel.shown["state"] == "paused"
    assert [rank["state"] for rank in paper.panel.shown["ranks"]] == ["paused", "paused"]
    assert paper.panel.shown["cut"] == [0, 0, 0]


def test_every_button_is_the_call_it_says(paper: Held) -> None:
    for unit in UNITS:
        paper.press("step", unit=unit)
        paper.done()
        paper.press("step_back", unit=unit)
        paper.done()
    rest = {"run_to": {"chunk": 1, "layer": 2}, "resume": {}, "pause": {}, "undo": {}, "restart": {}}
    for do, fields in rest.items():
        paper.press(do, **fields)
        paper.done()
    expected = [call for unit in UNITS for call in (f'run.step("{unit}")', f'run.step_back("{unit}")')]
    expected += ["run.run_to(chunk=1, layer=2)", "run.resume()", "run.pause()", "run.undo()", "run.restart()"]
    assert paper.run.calls == expected
    paper.see("call", "run.restart()")


def test_a_press_is_answered_at_once_and_pause_is_not_behind_a_step(paper: Held) -> None:
    paper.run.open.clear()
    paper.press("step", unit="chunk")
    paper.press("step", unit="layer")
    assert paper.sent == [{"heard": "step"}, {"heard": "step"}]
    paper.see("working", ['run.step("chunk")'])
    paper.see("waiting", 'run.step("layer")')
    paper.press("pause")
    wait_for(lambda: paper.run.calls == ['run.step("chunk")', "run.pause()"], "pause is called")
    paper.run.open.set()
    paper.done()
    assert paper.run.calls == [
        'run.step("chunk")',
        "run.pause()",
    ]  # what waited was asked for before the pause


def test_breakpoints_and_faults_are_changed_while_a_step_goes_on(paper: Held) -> None:
    paper.run.open.clear()
    paper.press("step", unit="chunk")
    paper.see("working", ['run.step("chunk")'])
    paper.press("break_at", layer=2, chunk=1, when="")
    shown = {"number": 1, "text": "#1: after layer 2, chunk 1", "layer": 2, "chunk": 1, "rank": None}
    rest = {"when": "", "hit": None, "enabled": True, "hits": 0, "plain": True}
    paper.see("breakpoints", [{**shown, **rest}])
    paper.press("remove_breakpoint", number=1)
    paper.see("breakpoints", [])
    paper.run.faults.lines.append("armed: #1 bitflip")
    paper.press("clear_faults")
    paper.see("faults", [])
    paper.run.open.set()
    paper.done()


def test_a_breakpoint_is_changed_unless_the_new_one_is_refused(paper: Held) -> None:
    def listed() -> list[str]:
        return [one["text"] for one in paper.panel.shown["breakpoints"]]

    paper.press("break_at", layer=2, when="")
    wait_for(lambda: listed() == ["#1: after layer 2"], "it is set")
    paper.press("break_at", layer=2, when="nun", instead=1)
    call = "run.break_at(layer=2, when='nun'); run.breakpoints.remove(1)"
    paper.see("error", f"{call}: when is 'nun'; it must be one of {CONDITION_FORMS}.")
    assert listed() == ["#1: after layer 2"]
    paper.press("break_at", layer=2, when="nan", instead=1)
    wait_for(lambda: listed() == ["#2: after layer 2, when nan"], "the new one is there alone")
    paper.see("error", "")
    paper.press("break_at", layer=2, when="", hit=3, instead=2)
    wait_for(lambda: listed() == ["#3: after layer 2, only at hit 3"], "its form has the number of a hit")
    assert paper.panel.shown["breakpoints"][0]["hit"] == 3


def test_what_is_asked_for_is_answered_and_dismissed(paper: Held) -> None:
    paper.press("why")
    paper.see("answer", "the run moves")
    paper.press("dismiss")
    paper.see("answer", "")
    paper.press("diff")
    paper.see("error", "run.kv().diff(): this run holds no KV of layer None.")


def test_an_answer_is_gone_once_the_run_is_not_what_was_asked(paper: Held) -> None:
    """A cell that moves the run makes it old; of a run that moves by itself, it stays to be read."""
    paper.press("why")
    paper.see("answer", "the run moves")
    paper.run.step("wave")
    paper.see("answer", "")
    paper.run.state = "running"
    paper.press("why")
    paper.see("answer", "the run moves")
    done = paper.panel.shown["done"]
    paper.run.step("wave")
    wait_for(lambda: paper.panel.shown["call"] == 'run.step("wave")', "it is painted")
    assert (paper.panel.shown["answer"], paper.panel.shown["done"]) == ("the run moves", done)


def test_every_button_is_the_last_call(paper: Held) -> None:
    paper.press("why")
    paper.see("answer", "the run moves")
    assert paper.run.last_call == "run.verdict()"
    paper.press("clear_breakpoints")
    wait_for(lambda: paper.run.last_call == "run.breakpoints.clear()", "it is done")


def test_play_has_a_pace(paper: Held) -> None:
    paper.press("play", unit="wave", per_second=2.5)
    paper.done()
    assert paper.run.calls == ['run.play("wave", per_second=2.5)']
    assert paper.everywhere() > 0


def test_a_play_is_shown_though_nothing_of_the_panel_is_at_work(paper: Held) -> None:
    paper.run.playing = 'run.play("layer", per_second=2)'
    paper.run.listeners.tell()
    paper.see("playing", 'run.play("layer", per_second=2)')
    paper.see("working", [])


def test_what_undo_did_is_answered(paper: Held) -> None:
    paper.press("step", unit="wave")
    paper.done()
    paper.press("undo")
    paper.see("answer", "undid all")
    assert paper.run.calls[-1] == "run.undo()"


def test_cells_turn_where_something_is_known(paper: Held) -> None:
    paper.press("step", unit="chunk")
    paper.done()
    paper.run.marks = [
        Mark(1, 0, 2, "differs", "rank 1 differs at layer 2"),
        Mark(0, 2, 3, "armed", "armed: #1 lost"),
        Mark(0, 2, 3, "corrupt", "not there yet, so nothing to see"),
    ]
    paper.run.listeners.tell()
    wait_for(lambda: bool(paper.panel.marks), "marks are shown")
    cells = unpacked(paper.panel.cells, (4, 3, 2))
    assert cells[2, 0].tolist() == [EVERYWHERE, EVERYWHERE | DIFFERS]
    assert cells[3, 2].tolist() == [ARMED, 0]
    assert paper.panel.marks["2 0"] == ["✖ error: rank 1 differs at layer 2"]
    still = paper.panel._repr_mimebundle_()[0]["text/html"]
    assert 'class="differs"' in still
    assert 'class="armed"' in still
    assert "rank 1 differs at layer 2" in still


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"do": "run_to", "chunk": 9, "layer": 0}, "there is no block c9 l0: chunks go from 0 to 2"),
        ({"do": "step", "unit": "mile"}, "reload the page"),
        ({"do": "run_to", "chunk": "0"}, "reload the page"),
        ({}, "reload the page"),
    ],
)
def test_an_error_stays_until_it_is_dismissed(paper: Held, message: dict[str, Any], words: str) -> None:
    paper.press(**{"do": "", **message})
    wait_for(lambda: words in paper.panel.shown["error"], "the error is shown")
    paper.run.step("layer")
    paper.done()
    assert words in paper.panel.shown["error"]
    paper.press("dismiss")
    paper.see("error", "")


def test_a_run_that_cannot_be_looked_at_is_said_so(paper: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("the cluster is gone")

    monkeypatch.setattr(paper.run, "standing", fail)
    bundle, _ = paper.panel._repr_mimebundle_()
    assert "the cluster is gone" in bundle["text/html"]
    before = paper.panel.cells
    paper.run.listeners.tell()
    paper.see("error", "where the run stands cannot be shown: the cluster is gone")
    assert paper.panel.cells == before


def test_failures_lost_ranks_and_text_are_shown(paper: Held) -> None:
    paper.run.state, paper.run.message, paper.run.alive = (
        "failed",
        "rank 1 was killed in layer c0 l2",
        [True, False],
    )
    paper.run.decoded, paper.run.text = 2, "47"
    paper.run.listeners.tell()
    paper.see("state", "failed")
    shown = paper.panel.shown
    assert (shown["message"], shown["decoded"], shown["text"]) == (
        "rank 1 was killed in layer c0 l2",
        2,
        "47",
    )
    assert [rank["state"] for rank in shown["ranks"]] == ["paused", "lost"]


def test_a_run_that_is_over_says_so_once_and_what_to_do(paper: Held) -> None:
    begun = "another run has begun; session.debugger() shows it"
    paper.run.state, paper.run.message, paper.run.over = "closed", begun, begun
    paper.run.listeners.tell()
    paper.see("over", f"this run is over: {begun}")
    assert paper.panel.shown["message"] == ""
    assert [rank["state"] for rank in paper.panel.shown["ranks"]] == ["over", "over"]
    paper.press(
        "run_to", chunk=9, layer=0
    )  # pressed as the run ended: an error that needs no words of its own
    paper.see("done", 1)
    assert paper.panel.shown["error"] == ""
    still = paper.panel._repr_mimebundle_()[0]["text/html"]
    assert still.count(f"this run is over: {begun}") == still.count(begun) == 1
    paper.run.state, paper.run.message, paper.run.alive = "failed", "rank 1 was killed", [True, False]
    paper.run.listeners.tell()
    paper.see("message", "rank 1 was killed")
    assert [rank["state"] for rank in paper.panel.shown["ranks"]] == ["over", "lost"]


def test_memory_is_the_host_s_and_for_a_gpu_rank_the_gpu_s_too(paper: Held) -> None:
    assert [rank["memory"] for rank in paper.panel.shown["ranks"]] == ["", ""]
    paper.run.memory = [3 << 29, 3 << 29]
    paper.run.device_memory = [None, DeviceMemory(15 << 29, 8 << 30, 80 << 30)]
    paper.run.listeners.tell()
    wait_for(lambda: paper.panel.shown["ranks"][0]["memory"], "memory is shown")
    cpu, gpu = paper.panel.shown["ranks"]
    assert (cpu["memory"], cpu["about_memory"]) == ("1.50 GiB", "")
    assert gpu["memory"] == "7.50 of 80 GiB · host 1.50 GiB"
    assert all(size in gpu["about_memory"] for size in ("7.50", "80.00", "8.00"))
    paper.run.memory = [3 << 29, None]
    paper.run.listeners.tell()
    wait_for(lambda: paper.panel.shown["ranks"][1]["memory"] == "7.50 of 80 GiB", "without a host's")


def test_panels_of_one_run_agree_and_follow_it_whoever_moves_it(paper: Held) -> None:
    other = Held(paper.run)
    paper.press("step", unit="wave")
    paper.done()
    other.done()
    assert other.panel.cells == paper.panel.cells
    paper.run.run_to(chunk=1, layer=3)
    paper.done()
    other.done()
    assert other.everywhere() == paper.everywhere() > 4
    other.panel.close()
    paper.run.step("layer")
    paper.done()
    assert len(paper.run.listeners.callbacks) == 1


def test_a_closed_panel_is_gone_even_while_a_step_goes_on(paper: Held) -> None:
    paper.run.open.clear()
    paper.press("step", unit="layer")
    paper.see("working", ['run.step("layer")'])
    paper.panel.close()
    paper.panel.close()
    assert paper.run.listeners.callbacks == []
    assert panel_threads() == ["dinfer panel worker"]
    paper.run.open.set()
    wait_for(lambda: not panel_threads(), "the step ends, and the thread with it")


def test_an_idle_panel_has_no_thread(paper: Held) -> None:
    paper.press("step", unit="layer")
    paper.done()
    wait_for(lambda: not panel_threads(), "threads end")


def test_the_panel_follows_ranks_that_run() -> None:
    run = TwinRun("demo", "The code of Lima is 471. What is the code of Lima?", world_size=2, chunk_size=4)
    held = Held(run)
    try:
        for n in range(1, 4):
            held.press("step", unit="layer")
            held.done()
            assert held.everywhere() == n
        held.press("step_back", unit="layer")
        held.done()
        assert held.everywhere() == 2
        held.press("resume")
        held.see("state", "done")
        held.done()
        assert held.everywhere() == run.plan.shape.blocks
        assert [rank["where"] for rank in held.panel.shown["ranks"]] == [
            f"all {sum(len(lane.ops) for lane in lanes)} ops done" for lanes in run.plan.lanes
        ]
    finally:
        held.panel.close()
        assert run.close()


def widgets() -> set[str]:
    """The model ids of all widgets that this process has."""
    return set(_instances)


def test_the_output_is_a_picture_in_a_slot_that_names_the_model(paper: Held) -> None:
    """And no widget, which Jupyter would show as an error in a notebook that is opened again."""
    data, metadata = paper.panel._repr_mimebundle_()
    assert data.keys() == {"text/html", "text/plain"}
    assert data["text/html"].startswith(f'<div class="dinfer-slot {paper.panel.model_id}">')
    assert paper.panel.slot == paper.panel.model_id
    assert metadata == {}


@pytest.fixture(params=[*ONLY_WIDGETS, "__vsc_ipynb_file__"])
def editor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An editor that draws only widgets, by what tells it."""
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    if request.param in ONLY_WIDGETS:
        monkeypatch.setenv(request.param, "1")
    else:
        shell = SimpleNamespace(user_ns={request.param: "a.ipynb"})
        monkeypatch.setattr("dinfer.views.panel.slotted.ipython", lambda: shell)
    return str(request.param)


@pytest.mark.usefixtures("editor")
def test_an_editor_gets_the_widget_and_a_hint_that_goes_with_it() -> None:
    before = widgets()
    held = Held(PaperRun(paper_plan()))
    first, second = (held.panel._repr_mimebundle_()[0][VIEW]["model_id"] for _ in range(2))
    assert first == second
    shown, hint = _instances[first].children
    assert shown is held.panel
    assert "could not load anywidget" in hint.value
    assert "dinfer-hint" in hint._dom_classes
    assert ".dinfer-hint { display: none !important; }" in str(held.panel._css)
    held.panel.close()
    left = {type(_instances[one]).__name__ for one in widgets() - before}
    assert left.isdisjoint({"Panel", "VBox", "HTML"})


def test_jupyter_that_was_started_in_an_editor_gets_the_picture(
    paper: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VSCODE_PID", "1")
    monkeypatch.setenv("JPY_SESSION_NAME", "a.ipynb")
    assert VIEW not in paper.panel._repr_mimebundle_()[0]


def test_colab_is_told_to_load_other_people_s_widgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """anywidget does so; this is what a cell needs of it. Colab's own module is made up here."""
    calls = list[str]()
    colab = ModuleType("google.colab.output")
    colab.enable_custom_widget_manager = lambda: calls.append("enabled")  # type: ignore[attr-defined]
    colab._widgets = SimpleNamespace(_installed_url="https://colab.example/manager.js")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "google.colab.output", colab)
    enable_custom_widget_manager_once.cache_clear()
    held = Held(PaperRun(paper_plan()))
    data, metadata = held.panel._repr_mimebundle_()
    held.panel.close()
    enable_custom_widget_manager_once.cache_clear()
    assert calls == ["enabled"]
    assert VIEW in data
    assert metadata == {
        VIEW: {"colab": {"custom_widget_manager": {"url": "https://colab.example/manager.js"}}}
    }
