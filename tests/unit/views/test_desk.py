"""The threads behind a panel: one action at a time, one that waits, none left; pictures at a bounded rate."""

from __future__ import annotations

import itertools
import threading
from types import SimpleNamespace

import pytest

from dinfer.views.panel.desk import Action, Painter, Worker
from tests.support.expected import panel_threads
from tests.support.runs import wait_for


class Scene:
    """A worker whose actions wait for `open`."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.done: list[str] = []
        self.changes = threading.Semaphore(0)
        self.worker = Worker("dinfer panel test", self.changes.release)

    def action(self, name: str) -> Action:
        def do() -> None:
            self.open.wait()
            self.done.append(name)

        return Action(name, do)

    def idle(self) -> None:
        wait_for(lambda: self.worker.current is None, "the worker is idle")


def test_one_action_at_a_time_and_of_those_that_wait_the_newest() -> None:
    scene = Scene()
    for name in "abc":
        scene.worker.ask(scene.action(name))
    assert scene.worker.current
    assert scene.worker.waiting
    assert (scene.worker.current.call, scene.worker.waiting.call) == ("a", "c")
    scene.open.set()
    scene.idle()
    assert scene.done == ["a", "c"]


def test_a_failure_is_kept_and_drops_what_waits() -> None:
    scene = Scene()

    def fail() -> None:
        scene.open.wait()
        raise RuntimeError("rank 1 was killed")

    scene.worker.ask(Action("run.step()", fail))
    scene.worker.ask(scene.action("late"))
    scene.open.set()
    scene.idle()
    assert scene.worker.error == "run.step(): rank 1 was killed"
    assert scene.done == []
    scene.worker.ask(scene.action("next"))
    assert scene.worker.error == ""


@pytest.mark.parametrize("error", [SystemExit(), KeyboardInterrupt(), ValueError()])
def test_an_error_without_words_is_named(error: BaseException) -> None:
    scene = Scene()

    def fail() -> None:
        raise error

    scene.worker.ask(Action("x", fail))
    scene.idle()
    assert scene.worker.error == f"x: {type(error).__name__}"


def test_a_closed_worker_begins_nothing_more() -> None:
    scene = Scene()
    scene.worker.ask(scene.action("under way"))
    scene.worker.ask(scene.action("waiting"))
    scene.worker.close()
    scene.worker.ask(scene.action("later"))
    scene.open.set()
    scene.idle()
    assert scene.done == ["under way"]


def test_asking_does_not_wait_and_each_change_is_told() -> None:
    scene = Scene()
    scene.worker.ask(scene.action("a"))
    assert scene.changes.acquire(timeout=60)
    scene.open.set()
    assert scene.changes.acquire(timeout=60)


def test_many_touches_are_few_pictures_and_the_last_is_painted() -> None:
    painted: list[int] = []
    latest = [0]
    # The second picture comes only when the painter is closed, or never.
    painter = Painter(lambda: painted.append(latest[0]), period=10.0)
    for n in range(1000):
        latest[0] = n
        painter.touch()
    wait_for(lambda: painted, "a picture")
    assert len(painted) == 1
    painter.close()
    assert panel_threads() == []

    painter = Painter(lambda: painted.append(latest[0]), period=0.001)
    for n in range(1000):
        latest[0] = n
        painter.touch()
    wait_for(lambda: painted[-1] == 999, "the last picture")
    wait_for(lambda: not panel_threads(), "the painter rests")
    painter.touch()
    wait_for(lambda: panel_threads() == [] and painted[-2:] == [999, 999], "it paints again")
    painter.close()
    painter.touch()
    assert panel_threads() == []


def test_a_picture_that_fails_is_told_once_and_the_next_touch_paints(monkeypatch: pytest.MonkeyPatch) -> None:
    told, painted = list[str](), list[str]()
    monkeypatch.setattr(threading, "excepthook", lambda failure: told.append(str(failure.exc_value)))
    errors = iter(["a rank went", "a rank went", "another", ""])

    def paint() -> None:
        error = next(errors)
        painted.append(error)
        if error:
            raise RuntimeError(error)

    painter = Painter(paint, period=0.001)
    for _ in range(4):
        painter.touch()
        wait_for(lambda: not panel_threads(), "the painter rests")
    assert painted == ["a rank went", "a rank went", "another", ""]
    assert told == ["a rank went", "another"]


def test_however_long_a_picture_takes_the_rest_after_it_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, rests = itertools.count(), list[float | None]()

    class Closing(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            rests.append(timeout)
            return self.is_set()

    monkeypatch.setattr(
        "dinfer.views.panel.desk.time", SimpleNamespace(monotonic=lambda: next(clock) * 100.0)
    )
    painter = Painter(lambda: None, period=0.1, rest=2.0, longest=0.3)
    painter._closing = Closing()
    painter.touch()
    wait_for(lambda: not panel_threads(), "the painter rests")
    assert rests == [0.3]
