"""What py-spy has seen: which C functions, which lane, and when it is not so any more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from dinfer.cluster.ranks import RankStates
from dinfer.messages import Command, Reply, SpiedFrame, SpiedThread, SpiedThreads, SpyOnRank
from dinfer.monitor.stacks import Spied, Stacks, as_dumped, as_spied
from dinfer.rank.pyspy import in_c, read
from dinfer.verdict.signs import BUSY, StackFrame

RECORDED = Path(__file__).with_name("py-spy.json").read_text(encoding="utf-8")
"""of a process of which one thread sleeps in C and holds the interpreter, and one waits in gloo"""
FILE = "/x/dinfer/engine/own.py"


def thread(name: str) -> SpiedThread:
    return next(one for one in read(RECORDED) if one.name == name)


def test_what_py_spy_writes_is_read() -> None:
    assert {one.name: one.holds_gil for one in read(RECORDED)} == {
        "MainThread": False,
        "rank 1 compute": True,
        "rank 1 kv-in:0": False,
    }
    assert [frame[1:3] for frame in thread("rank 1 compute").frames][:8] == [
        (None, "clock_nanosleep"),
        (None, "nanosleep"),
        (None, "usleep"),
        (None, "ffi_call"),
        (None, "_call_function_pointer"),
        (None, "_ctypes_callproc"),
        (None, "PyCFuncPtr_call"),
        (7, "work"),
    ]


@pytest.mark.parametrize("text", ["", "Error: Failed", RECORDED[:500], "{}", "[1]", '[{"frames": []}]'])
def test_what_it_does_not_write_whole_is_nothing(text: str) -> None:
    assert read(text) == []


def test_c_functions_are_told_without_what_binds_them() -> None:
    assert in_c(thread("rank 1 compute").frames) == "usleep → clock_nanosleep"
    gloo = "c10d::ProcessGroupGloo::RecvWork::wait → pthread_cond_timedwait"
    assert in_c(thread("rank 1 kv-in:0").frames) == gloo
    assert in_c([SpiedFrame("/own.so", None, "spin"), SpiedFrame(FILE, 7, "work")]) == "spin"
    assert in_c([SpiedFrame(FILE, 7, "work"), SpiedFrame("/own.so", None, "spin")]) == ""


def answered(line: int = 7, *, native: bool = True) -> Stacks:
    frames = {"compute": StackFrame(FILE, line, "work", "c.usleep()", native=native)}
    return Stacks(frames, "as asked", answers=True, cpu_s=0.5)


def test_a_line_that_has_called_into_c_is_told_with_what_it_has_called() -> None:
    known = answered()
    found = as_spied(1, read(RECORDED), known)
    assert found
    assert found.frames["compute"] == known.frames["compute"]._replace(c="usleep → clock_nanosleep")
    assert found == replace(known, frames=found.frames, text=found.text)
    assert "  in usleep (libc.so.6)\n" in found.text
    assert f'  File "{FILE}", line 7, in work' in found.text
    assert "rank 1 compute, which holds the interpreter (the GIL):" in found.text


def test_what_is_so_no_more_is_not_added() -> None:
    assert as_spied(1, read(RECORDED), answered(line=8)) is None
    python = answered(line=8, native=False)
    found = as_spied(1, read(RECORDED), python)
    assert found
    assert found.frames == python.frames


DUMP = f"""\
Thread 0x0007f1 [rank 1 kv-in:0] (most recent call first):
  File "/x/dinfer/engine/threads.py", line 101 in _do

Thread 0x0007f2 [rank 1 compute] (most recent call first):
  File "{FILE}", line 7 in work
  File "/x/dinfer/engine/threads.py", line 101 in _do
"""


def test_who_holds_a_mute_ranks_interpreter_is_told() -> None:
    """A dump alone cannot tell of two threads which it is."""
    dumped = as_dumped(1, DUMP)
    assert dumped.holder == ""
    found = as_spied(1, read(RECORDED), dumped)
    assert found
    assert (found.holder, found.answers) == ("compute", False)
    assert found.frames["compute"] == found.frames[BUSY]
    assert found.frames[BUSY].c == "usleep → clock_nanosleep"
    assert as_spied(1, read(RECORDED), as_dumped(1, DUMP.replace("line 7", "line 9"))) is None
    assert as_spied(1, read(RECORDED), Stacks(answers=False)) == replace(found, cpu_s=None)  # no dump at all
    free = [structs.replace(one, holds_gil=False) for one in read(RECORDED)]
    assert as_spied(1, free, dumped) == dumped


def test_of_a_stopped_rank_there_is_a_text() -> None:
    found = as_spied(1, read(RECORDED), Stacks())
    assert found
    assert (found.frames, found.answers) == ({}, None)
    assert "in work" in found.text


class Line(RankStates):
    """Ranks that are asked, and say what a test has them say."""

    def __init__(self) -> None:
        super().__init__(3)
        self.sent: list[tuple[int, Command[Any], int]] = []
        for state in self.ranks[:2]:  # the third is a thread
            state.process = "S"

    def _send(self, rank: int, command: Command[Any], number: int) -> None:
        self.sent.append((rank, command, number))

    def say(self, threads: list[SpiedThread]) -> None:
        """Answer the last request."""
        rank, _, number = self.sent[-1]
        self.take(rank, Reply(number, SpiedThreads(tuple(threads))))


def test_each_process_is_looked_at_once_until_it_has_moved() -> None:
    line = Line()
    spied = Spied(line)
    for _ in range(2):
        spied.begin([1, 2])
    assert [one[:2] for one in line.sent] == [(1, SpyOnRank())]
    assert spied.looks_at(range(3)) == {1}
    assert not spied.collect()
    assert spied.added_to({1: answered()}) == {1: answered()}
    line.say(read(RECORDED))
    assert spied.collect()
    assert spied.ranks == {1}
    assert not spied.collect()
    assert not spied.looks_at(range(3))
    found = spied.added_to({1: answered()})
    assert found[1].frames["compute"].c
    spied.begin([1])
    assert len(line.sent) == 1
    assert spied.added_to({1: answered(8)}) == {1: answered(8)}  # it stands elsewhere
    spied.begin([1])
    assert len(line.sent) == 2


def test_where_py_spy_sees_nothing_it_is_not_asked_again_and_nothing_changes() -> None:
    line = Line()
    spied = Spied(line)
    spied.begin([0])
    line.say([])
    assert not spied.collect()
    spied.begin([0])
    assert len(line.sent) == 1
    assert spied.added_to({0: answered()}) == {0: answered()}
    spied.forget()
    spied.begin([0])
    assert len(line.sent) == 2


def test_what_is_in_an_op_is_shown_before_a_thread_that_has_nothing_to_do() -> None:
    idle = SpiedThread(
        "control, slow commands", False, (SpiedFrame("/lib.so", None, "wait"), SpiedFrame(FILE, 1, "_work"))
    )
    lane = SpiedThread("rank 1 main", False, (SpiedFrame(FILE, 7, "work"),))
    busy = structs.replace(idle, frames=(SpiedFrame(FILE, 9, "answer"), *idle.frames))
    for threads, first in (([idle, lane], "rank 1 main:"), ([busy, lane], "control, slow commands:")):
        found = as_spied(1, threads, Stacks())
        assert found
        assert found.text.startswith(first)
