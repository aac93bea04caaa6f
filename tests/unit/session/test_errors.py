"""Errors that are answers, as IPython shows them: the user's own line and the message; the rest on request."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterator
from typing import Any

import IPython
import pytest
from IPython.core.interactiveshell import InteractiveShell

import dinfer
from dinfer.cluster.lease import RunOver
from dinfer.errors import DinferError, NoSuch
from dinfer.plan.ops import PlanError
from dinfer.run.failure import RankFailed
from dinfer.run.hang import Hung
from dinfer.session.session import Session
from tests.support.twin import prompt

IDS = prompt(10)
FRAMES = ("/dinfer/session/", "/dinfer/plan/", "run.py", "run.py")


class Shell:
    """An IPython shell: `show(code)` is what it prints for a cell that fails."""

    def __init__(self, shell: Any, capsys: pytest.CaptureFixture[str]) -> None:
        self.shell, self._capsys = shell, capsys

    def show(self, code: str) -> str:
        self._capsys.readouterr()
        self.shell.run_cell(code)
        return self._capsys.readouterr().out


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Shell]:
    """Without colours."""
    made: Any = InteractiveShell.instance(colors="nocolor")
    for name in ("last_type", "last_value", "last_traceback", "last_exc"):
        monkeypatch.setattr(sys, name, None, raising=False)
    yield Shell(made, capsys)
    InteractiveShell.clear_instance()


RANKS = 2


@pytest.fixture
def begun(shell: Shell, session: Session) -> Shell:
    """The shell with a `run` in it that stands at its start."""
    shell.shell.user_ns["run"] = session.prefill(IDS, chunk_size=4, paused=True)
    return shell


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ('run.step("foo")', "PlanError: 'foo' is not a unit to step by"),
        ("run.kv(layer=99)", "PlanError: there is no layer 99"),
        ("run.run_to(chunk=99, layer=0)", "PlanError: there is no block c99 l0"),
        ("run.breakpoints[7]", "NoSuch: there is no breakpoint #7"),
    ],
)
def test_a_mistake_is_shown_with_the_user_s_line_alone(begun: Shell, call: str, said: str) -> None:
    shown = begun.show(f"before = 1\n{call}\nafter = 2")
    assert said in shown
    assert f"----> 2 {call}" in shown
    assert not any(frame in shown for frame in FRAMES)
    assert len(shown.splitlines()) <= 7


def test_the_whole_traceback_is_there_for_who_asks(begun: Shell) -> None:
    begun.show('run.step("foo")')
    assert "run.py" not in begun.show("%tb")
    assert "run.py" in begun.show("%tb verbose")
    assert "run.py" in begun.show("%tb plain")
    begun.shell.run_line_magic("xmode", "Verbose")
    assert "run.py" in begun.show('run.step("foo")')


def test_debug_enters_the_frames_of_dinfer(begun: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    begun.show('run.step("foo")')
    entered = list[Any]()
    debugger = begun.shell.InteractiveTB
    debugger.pdb = debugger.debugger_cls()
    monkeypatch.setattr(debugger.pdb, "interaction", lambda _, what: entered.append(what))
    begun.show("%debug")
    assert len(entered) == 1
    found = getattr(entered[0], "__traceback__", entered[0])
    names = []
    while found:
        names.append(found.tb_frame.f_code.co_name)
        found = found.tb_next
    assert names[-1] == "unit_of"


def test_what_it_was_raised_from_is_told_in_a_line(shell: Shell) -> None:
    def failing() -> None:
        raise RankFailed("rank 1 failed at `layer c0 l2`") from ZeroDivisionError("division by zero")

    shell.shell.user_ns["failing"] = failing
    shown = shell.show("failing()")
    assert (
        "RankFailed: rank 1 failed at `layer c0 l2`\ncaused by ZeroDivisionError: division by zero" in shown
    )

    def repeating() -> None:
        raise RankFailed("rank 1: division by zero") from ZeroDivisionError("division by zero")

    shell.shell.user_ns["failing"] = repeating
    assert "caused by" not in shell.show("failing()")


def test_mistakes_in_dinfer_keep_their_frames(begun: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinfer.run.run.unit_of", lambda _: 1 / 0)
    shown = begun.show('run.step("foo")')
    assert "run.py" in shown
    assert "ZeroDivisionError" in shown


def test_without_ipython_it_is_any_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(IPython, "get_ipython", lambda: None)
    assert PlanError("no")._render_traceback_() == ["PlanError: no"]
    assert str(NoSuch("there is no fault #2")) == "there is no fault #2"


OWN = {
    "CommError", "GivenUp", "Mischief", "NoInterface", "OpFailed", "RecordsError", "Stopped", "TokenFailed",
    "TransferError", "UnknownMessage",
}  # fmt: skip
"""those that stay within a rank, or the probe: what they say reaches the user in a RankFailed, or an ExplainError"""


@pytest.mark.filterwarnings("ignore:.* is .* now:DeprecationWarning")  # former import paths
def test_every_error_for_users_is_one_of_these() -> None:
    modules = [
        importlib.import_module(found.name)
        for found in pkgutil.walk_packages(dinfer.__path__, "dinfer.")
        if not found.name.endswith(
            ("__main__", "device_code")
        )  # the latter needs Triton, and defines no error
    ]
    made = {
        one
        for module in modules
        for one in vars(module).values()
        if inspect.isclass(one) and issubclass(one, Exception) and one.__module__.startswith("dinfer.")
    }
    assert {Hung, RunOver} <= made
    assert {one.__name__ for one in made if not issubclass(one, DinferError)} == OWN
