"""Calls that wait for other ranks end at a deadline, and continue when repeated."""

from __future__ import annotations

import threading

import pytest

from dinfer.transport.deadline import Deadline, StillWaiting


def test_a_call_in_time_gives_its_result_or_its_error() -> None:
    deadline = Deadline(0, 10)
    assert deadline.run("add", lambda: 1 + 1) == 2
    with pytest.raises(ZeroDivisionError):
        deadline.run("divide", lambda: 1 / 0)
    assert deadline.run("add", lambda: 2 + 2) == 4


def test_a_call_past_its_deadline_stays_under_way_and_is_found_again() -> None:
    deadline, others_came, calls = Deadline(1, 0.01), threading.Event(), list[int]()

    def call() -> str:
        calls.append(1)
        assert others_came.wait(60)
        return "met"

    for _ in range(2):
        with pytest.raises(StillWaiting, match=r"rank 1: gather has waited 0\.01 s .*call it on the others"):
            deadline.run("gather", call)
    with pytest.raises(StillWaiting, match="rank 1 is still in gather"):
        deadline.run("another", call)
    others_came.set()
    deadline.seconds = 10
    assert deadline.run("gather", call) == "met"
    assert calls == [1]


def test_a_time_out_of_the_call_itself_is_its_error() -> None:
    deadline = Deadline(0, 10)

    def call() -> None:
        raise TimeoutError("the store")

    with pytest.raises(TimeoutError, match="the store"):
        deadline.run("open", call)
    assert deadline.run("again", lambda: 1) == 1


def test_without_a_deadline_the_call_runs_on_its_callers_thread() -> None:
    assert Deadline(0, None).run("who", threading.current_thread) is threading.current_thread()
