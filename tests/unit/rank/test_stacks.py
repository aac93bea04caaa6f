"""Where threads stand: which line, whether it has called into C, and by a signal where nobody answers."""

from __future__ import annotations

import ctypes
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from dinfer.engine.board import anonymous_file
from dinfer.messages import ThreadStack
from dinfer.monitor.stacks import as_dumped
from dinfer.rank.stacks import DUMP_SIGNAL, dump_into, dump_of, named, stacks, thread_names
from dinfer.verdict.signs import BUSY
from tests.support.runs import wait_for
from tests.support.spies import holding

C = ctypes.CDLL(None)


@contextmanager
def standing_in(
    call: Callable[[], object], function: str, end: Callable[[], object] = lambda: None
) -> Iterator[ThreadStack]:
    """What is said of a thread of rank 7 that makes this call again and again, once its innermost line is in that
    function. `end()` lets it go."""
    left = threading.Event()

    def calls() -> None:
        call()
        while not left.is_set():
            call()

    thread = threading.Thread(target=calls, name="rank 7 compute", daemon=True)
    thread.start()

    found: list[ThreadStack] = []

    def is_there() -> bool:
        found.extend(one for one in stacks(7, alone=False).threads if one.frames[0][2] == function)
        return bool(found)

    wait_for(is_there, f"it is in {function}")
    yield found[0]
    left.set()
    end()
    thread.join()


def test_a_line_that_waits_in_python_is_no_c() -> None:
    lock, items, done = threading.Lock(), queue.SimpleQueue[int](), threading.Event()
    lock.acquire()

    def acquires() -> None:
        lock.acquire()

    def gets() -> None:
        items.get()

    with standing_in(acquires, "acquires", lock.release) as said:
        assert (said.native, said.waits, said.held) == (False, False, False)
        assert said.frames[0][3] == "lock.acquire()"
        assert said.cpu_s is None or said.cpu_s >= 0
    with standing_in(gets, "gets", lambda: items.put(1)) as said:
        assert said.native is False
    with standing_in(lambda: done.wait(), "wait", done.set) as said:
        assert said.native is False


def test_who_waits_in_the_standard_library_stands_where_it_was_called() -> None:
    done = threading.Event()

    def waits() -> None:
        done.wait()

    with standing_in(waits, "wait", done.set) as said:
        assert said.frames[0][3] == "waiter.acquire()"
        assert said.frames[said.at][2:] == ("waits", "done.wait()")


def naps() -> None:
    time.sleep(0.2)


def naps_in_c() -> None:
    C.usleep(200_000)


def naps_by_a_library_made_in_passing() -> None:
    ctypes.CDLL(None).usleep(200_000)


@pytest.mark.parametrize(
    ("call", "native"), [(naps, False), (naps_in_c, True), (naps_by_a_library_made_in_passing, True)]
)
def test_a_call_into_a_library_is_told_from_a_sleep(call: Callable[[], None], native: bool) -> None:
    with standing_in(call, call.__name__) as said:
        assert said.native is native
        assert "sleep(" in said.frames[0][3]


def test_threads_of_other_ranks_are_left_out_unless_the_process_is_the_ranks_own() -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait, name="rank 8 compute")
    thread.start()
    assert [t.name for t in stacks(9, alone=False).threads] == []
    assert "rank 8 compute" in [t.name for t in stacks(9, alone=True).threads]
    done.set()
    thread.join()


TAKES_DUMPS = "from dinfer.rank.stacks import dump_into\nassert dump_into(int(sys.argv[1]))"


@pytest.mark.skipif(DUMP_SIGNAL is None, reason="there is no such signal")
def test_a_process_whose_interpreter_is_held_is_dumped() -> None:
    file, texts = anonymous_file(0), list[str]()
    with holding(TAKES_DUMPS, file) as process:

        def dumped() -> bool:
            texts.append(dump_of(process.pid, file, 1.0))
            return "in holds" in texts[-1]

        wait_for(dumped, "it says where it stands")
    assert texts[-1].count("in holds") == 1  # only what this signal has brought
    os.close(file)


def test_who_is_gone_says_nothing() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    file = anonymous_file(0)
    with suppress(ProcessLookupError):
        assert dump_of(process.pid, file, 0.05) == ""
    os.close(file)


@pytest.mark.skipif(DUMP_SIGNAL is None, reason="there is no such signal")
def test_a_signal_that_somebody_uses_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    monkeypatch.setattr(signal, "getsignal", lambda _: print)
    assert dump_into(1) is False


DUMP = """\
Thread 0x00007f1 (most recent call first):
  File "/usr/lib/threading.py", line 320 in wait
  File "/x/dinfer/transport/gate.py", line 80 in wait
  File "/x/dinfer/engine/threads.py", line 70 in _run

Thread 0x00007f4 (most recent call first):
  File "/usr/lib/torch/distributed/distributed_c10d.py", line 700 in wait
  File "/x/dinfer/transport/gloo.py", line 120 in send
  File "/x/dinfer/engine/ops.py", line 190 in send
  File "/x/dinfer/engine/threads.py", line 101 in _do

Thread 0x00007f2 (most recent call first):
  File "/models/own.py", line 12 in forward
  File "/x/dinfer/engine/ops.py", line 130 in layer
  File "/x/dinfer/engine/threads.py", line 101 in _do

Current thread 0x00007f3 (most recent call first):
  File "/x/ipykernel/app.py", line 1 in main
"""


def test_the_thread_that_is_in_an_op_is_found_in_a_dump() -> None:
    found = as_dumped(1, DUMP)
    assert (found.answers, found.text, found.holder) == (False, DUMP.strip(), "")
    frame = found.frames[BUSY]
    assert (frame.file, frame.line, frame.function) == ("/models/own.py", 12, "forward")
    assert as_dumped(1, "").frames == {}


def test_threads_are_named_in_a_dump_and_tell_the_lane() -> None:
    names = {0x7F1: "rank 1 kv-in:0", 0x7F2: "rank 1 compute"}
    text = named(DUMP, names.items())
    assert text.splitlines()[0] == "Thread 0x00007f1 [rank 1 kv-in:0] (most recent call first):"
    assert named(text, names.items()) == text  # as newer Pythons write it, which cut names
    assert as_dumped(1, text).holder == "compute"
    more = text.replace("transport/gloo.py", "engine/ops.py")  # now two lanes may hold the interpreter
    assert (as_dumped(1, more).holder, as_dumped(1, more).frames) == ("", {})


def test_names_are_those_of_the_threads_that_run() -> None:
    assert (threading.get_ident(), threading.current_thread().name) in thread_names()
