"""py-spy at work on real processes: stuck in C with the interpreter held, stopped, gone; and a py-spy that is none."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from dinfer.messages import SpiedThread
from dinfer.rank import pyspy
from dinfer.rank.process import sign_of_life
from dinfer.rank.pyspy import Look, in_c, program
from tests.support.runs import wait_for
from tests.support.spies import LETS_ANYBODY_LOOK, NO_SPY, holding, may_spy


def seen(spy: str, pid: int, *, stopped: bool = False) -> list[SpiedThread]:
    look = Look(spy, pid, stopped=stopped)
    found: list[SpiedThread] = []

    def is_over() -> bool:
        nonlocal found
        threads = look.threads()
        found = threads or []
        return threads is not None

    wait_for(is_over, "py-spy has looked")
    return found


@pytest.mark.skipif(not may_spy(), reason=NO_SPY)
def test_a_process_whose_interpreter_is_held_is_seen_down_to_its_c_function() -> None:
    with holding(LETS_ANYBODY_LOOK) as process:
        calls: list[str] = []

        def is_in_c() -> bool:
            threads = seen(str(program()), process.pid)
            calls[:] = [in_c(thread.frames) for thread in threads if thread.holds_gil]
            return bool(calls and "usleep" in calls[0])

        wait_for(is_in_c, f"the C function is seen: {calls}")
        life = sign_of_life(process.pid)
        assert life is None or life.state == "S"  # it goes on as before


@pytest.mark.skipif(not may_spy(), reason=NO_SPY)
def test_a_stopped_process_is_seen_and_stays_stopped() -> None:
    with holding(LETS_ANYBODY_LOOK) as process:
        process.send_signal(signal.SIGSTOP)
        for stopped in (True, False):  # it may also be stopped a moment after it was asked whether it is
            functions = [
                frame.function
                for thread in seen(str(program()), process.pid, stopped=stopped)
                for frame in thread.frames
            ]
            assert "<module>" in functions
            life = sign_of_life(process.pid)
            assert life is None or life.state == "T"


@pytest.mark.parametrize(
    "text", ["no program", "#!/bin/sh\nexit 1", "#!/bin/sh\necho '[{'", "#!/bin/sh\nexec sleep 60"]
)
def test_a_py_spy_that_fails_or_takes_too_long_sees_nothing_and_is_ended(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pyspy, "PATIENCE_S", 0.2)
    spy = tmp_path / "py-spy"
    spy.write_text(text, encoding="utf-8")
    spy.chmod(0o755)
    before = os.listdir("/dev/fd")
    assert seen(str(spy), os.getpid()) == []
    assert os.listdir("/dev/fd") == before


def test_it_is_found_beside_this_python_and_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert program() is None
    for place in ("bin/py-spy", "py-spy"):
        (tmp_path / place).touch(0o755)
        assert program() == str(tmp_path / place)
