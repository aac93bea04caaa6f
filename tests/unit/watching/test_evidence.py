"""The evidence of one moment: signs of life, first failures, and what is kept of it in a trace."""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from dinfer.trace.read import read_jsonl
from dinfer.verdict.signs import Signs
from dinfer.watch.probe.records import StacksTaken, ThreadLook, WatchedOp, WatchedProcess
from dinfer.watching.alarm import CONFIRM_S, HangAlarm
from dinfer.watching.events import trace_of
from dinfer.watching.evidence import Evidence
from dinfer.watching.failures import before_they_were_killed, only_first_failures
from dinfer.watching.given import of_trace
from dinfer.watching.live import EnginesSource
from dinfer.watching.signs import ProcessPulse, _Sample, dumped_frame, signs_of
from tests.support.made_processes import SECOND, op, process, raised
from tests.support.runs import wait_for


def evidence(*processes: WatchedProcess, now: float, **pulses: ProcessPulse) -> Evidence:
    ranks = dict(enumerate(processes))
    now_ns = int(now * SECOND)
    signs = {rank: signs_of(one, pulses.get(f"rank{rank}"), now, now_ns) for rank, one in ranks.items()}
    return Evidence(trace_of(ranks), only_first_failures(signs, ranks, {}), now_ns, ranks)


def crossed_sends(now: float) -> Evidence:
    return evidence(
        process(0, op(0, "send", 1, peer=1), heartbeat_ns=int(now * SECOND)),
        process(1, op(0, "send", 1, peer=0), heartbeat_ns=int(now * SECOND)),
        now=now,
    )


def test_both_ends_that_send_first() -> None:
    found = crossed_sends(3).problem
    assert found
    assert (found.kind, found.ranks) == ("cycle", (0, 1))
    assert crossed_sends(1.5).problem is None  # it may go on


def test_an_alarm_comes_once_and_only_if_the_verdict_stands() -> None:
    alarm, now = HangAlarm(), crossed_sends(3)
    assert alarm.consider(now, 10.0) is None
    assert (alarm.is_suspicious, alarm.is_deciding) == (True, True)
    told = alarm.consider(now, 10.1 + CONFIRM_S)
    assert told == now.problem
    assert (alarm.is_suspicious, alarm.is_deciding) == (True, False)
    assert alarm.consider(now, 11.0 + CONFIRM_S) is None
    moves = evidence(process(0, op(0, "barrier", 1, 2)), process(1, op(0, "barrier", 1, 2)), now=3)
    assert alarm.consider(moves, 12.0) is None
    assert alarm.standing is None


def test_a_hang_stays_the_verdict_once_it_is_killed() -> None:
    alarm = HangAlarm()
    for at in (10.0, 10.1 + CONFIRM_S):
        alarm.consider(crossed_sends(3), at)
    killed = evidence(
        process(0, op(0, "send", 1, peer=1), ended="os._exit(1)"),
        process(1, op(0, "send", 1, peer=0)),
        now=20,
    )
    assert killed.problem
    assert killed.problem.kind == "dead"
    assert alarm.consider(killed, 12.0) is None
    assert alarm.standing
    assert alarm.standing.kind == "cycle"


def test_the_first_of_two_failures_is_to_blame() -> None:
    found = evidence(
        process(0, op(0, "recv", 1, 6, peer=1), ended="exception", exception=raised("went wrong later", 6)),
        process(1, ended="exception", exception=raised("a shape", 5)),
        now=7,
    ).problem
    assert found
    assert (found.kind, found.ranks) == ("exception", (1,))
    assert "ValueError: a shape at infer.py:99" in found.sentence


def test_a_lost_connection_is_no_cause() -> None:
    lost = raised("[...] Connection closed by peer [127.0.0.1]:1", 4, kind="RuntimeError")
    found = evidence(
        process(0, op(0, "recv", 1, 4, peer=1), ended="exception", exception=lost),
        process(1, op(0, "recv", 1, peer=0), ended="os._exit(3)", heartbeat_ns=5 * SECOND),
        now=7,
    ).problem
    assert found
    assert (found.kind, found.ranks) == ("dead", (1,))
    assert "os._exit(3)" in found.sentence


def test_a_death_before_the_first_heartbeat_is_no_earlier_than_an_exception() -> None:
    found = evidence(
        process(0, op(0, "recv", 5, peer=1)),
        process(1, ended="exception", exception=raised("a shape", 5)),
        now=7,
        rank0=ProcessPulse(None, gone=6.0),
    ).problem
    assert found
    assert (found.kind, found.ranks) == ("exception", (1,))


@pytest.mark.parametrize("first", [0, 1])
def test_of_ranks_that_said_nothing_the_first_that_vanished_is_to_blame(first: int) -> None:
    """Whatever their heartbeats say, and although another rank ended well before."""
    ranks = {
        0: process(0, op(0, "barrier", 1, 2), heartbeat_ns=2 * SECOND),
        1: process(1, op(0, "barrier", 1, 2), heartbeat_ns=3 * SECOND),
        2: process(2, op(0, "barrier", 1, 2), ended="exit"),
    }
    gone = {first: 5.0, 1 - first: 5.5, 2: 4.0}
    signs = {
        rank: signs_of(one, ProcessPulse(None, gone=gone[rank]), 7, 7 * SECOND) for rank, one in ranks.items()
    }
    told = only_first_failures(signs, ranks, gone)
    assert told[first].ended
    assert not told[first].raised
    later = told[1 - first].raised
    assert later
    assert later.secondary


@pytest.mark.parametrize(
    ("mine", "theirs", "kind", "ranks"),
    [
        (op(0, "recv", 5, peer=1), op(0, "send", 5, 6, peer=0, nbytes=64, shape=(16,)), "other size", (1,)),
        (op(0, "all_reduce", 5), op(0, "all_reduce", 5, nbytes=64, shape=(16,)), "other size", (1,)),
        (op(0, "all_reduce", 5), op(0, "barrier", 5, nbytes=0, shape=()), "out of order", (1,)),
        (op(0, "all_reduce", 5), op(0, "all_reduce", 5), "dead", (0,)),
    ],
)
def test_a_rank_that_died_of_what_it_met_is_no_mere_death(
    mine: WatchedOp, theirs: WatchedOp, kind: str, ranks: tuple[int, ...]
) -> None:
    """gloo ends the process whose op meets another size."""
    found = evidence(
        process(0, mine, heartbeat_ns=6 * SECOND),
        process(1, theirs, heartbeat_ns=6 * SECOND),
        now=9,
        rank0=ProcessPulse(None, gone=6.0),
    ).problem
    assert found
    assert (found.kind, found.ranks) == (kind, ranks)
    if kind != "dead":
        assert "infer.py:10" in found.sentence
        assert "this ended rank 0" in found.sentence
        assert "waits for it" not in found.sentence


def test_a_handled_exception_counts_while_its_handler_waits() -> None:
    handling = process(1, op(1, "barrier", 2), handled=[raised("a shape", 2)])
    assert evidence(process(0, op(0, "recv", 1, peer=1)), handling, now=2.5).problem is None
    found = evidence(process(0, op(0, "recv", 1, peer=1)), handling, now=9).problem
    assert found
    assert (found.kind, found.ranks) == ("exception", (1,))
    over = process(1, op(1, "barrier", 2, 3), op(2, "recv", 4, peer=0), handled=[raised("a shape", 2)])
    other = evidence(process(0, op(0, "recv", 1, peer=1)), over, now=9).problem
    assert other
    assert other.kind == "cycle"


def test_a_rank_that_has_not_begun_may_be_loading() -> None:
    waiting = process(0, op(0, "barrier", 1), heartbeat_ns=20 * SECOND)
    idle = ProcessPulse(None)
    late = process(1, heartbeat_ns=20 * SECOND)
    assert evidence(waiting, late, now=20, rank1=idle).problem is None


def test_where_a_rank_stands_is_its_stack_if_that_is_newer_than_its_last_op() -> None:
    thread = ThreadLook("MainThread", 1, (("/code/infer.py", 7, "work", "time.sleep(99)"),), 1)
    stands = process(
        1, op(0, "barrier", 0.5, 1), heartbeat_ns=20 * SECOND, stacks=[StacksTaken(1, 19 * SECOND, (thread,))]
    )
    waits = process(0, op(0, "barrier", 0.5, 1), op(1, "barrier", 2), heartbeat_ns=20 * SECOND)
    found = evidence(waits, stands, now=20).problem
    assert found
    assert (found.kind, found.ranks) == ("stuck in Python", (1,))
    assert "`time.sleep(99)` in work (infer.py:7)" in found.sentence
    assert "rank 0 is in `barrier` ([4] float32) at infer.py:11" in found.sentence


def test_what_was_known_is_in_the_trace_that_is_kept(tmp_path: Path) -> None:
    before = crossed_sends(30)
    path = before.kept(before.problem).export("jsonl", tmp_path / "a.jsonl")
    after = of_trace(read_jsonl(path))
    assert after.problem == before.problem
    assert (
        after.where(0) == before.where(0) == "in `send -> 1` ([4] float32) at infer.py:10 in main, for 29 s"
    )


def test_a_dump_names_the_line_that_holds_the_interpreter() -> None:
    text = (
        "Thread 0x01 (most recent call first):\n"
        '  File "/usr/lib/python3.11/threading.py", line 331 in wait\n'
        '  File "/x/dinfer_probe/thread.py", line 40 in run\n\n'
        "Current thread 0x02 (most recent call first):\n"
        '  File "/code/model.py", line 12 in forward\n'
        '  File "/code/infer.py", line 3 in <module>\n'
    )
    frame = dumped_frame(text)
    assert frame
    assert (frame.file, frame.line, frame.function) == ("/code/model.py", 12, "forward")
    assert dumped_frame("") is None


def test_signs_without_pulse_say_what_the_record_says() -> None:
    assert signs_of(process(0, ended="exit"), None, 0.0) == Signs(phase="done")
    assert signs_of(process(0, ended="os._exit(0)"), None, 0.0).phase == "done"
    assert signs_of(process(0, ended="os._exit(3)"), None, 0.0).ended == "ended by os._exit(3)"
    gone = ProcessPulse(None, gone=1.0)
    assert "a signal killed it" in signs_of(process(0), gone, 2.0).ended


def test_ranks_that_were_killed_together_hung_before() -> None:
    heart = {"heartbeat_ns": 30 * SECOND}
    gone = {f"rank{rank}": ProcessPulse(None, gone=1.0) for rank in (0, 1)}
    ops = [op(0, "send", 1, peer=1), op(0, "send", 1, peer=0)]
    killed = evidence(*(process(rank, one, **heart) for rank, one in enumerate(ops)), now=40, **gone)
    assert killed.problem
    assert killed.problem.kind == "dead"
    before = before_they_were_killed(killed).problem
    assert before
    assert (before.kind, before.ranks) == ("cycle", (0, 1))
    alone = evidence(process(0, ops[0], **heart), process(1, heartbeat_ns=20 * SECOND), now=40, **gone)
    assert before_they_were_killed(alone) is alone  # one died first


def test_ranks_that_were_interrupted_by_ctrl_c_hung_before() -> None:
    """The command of a hang is ended by Ctrl-C, and then explained from its records: not as a KeyboardInterrupt."""
    at = 30 * SECOND
    error = raised("", 30, "KeyboardInterrupt")
    killed = process(0, op(0, "recv", 1, peer=1), heartbeat_ns=at)
    interrupted = process(
        1, op(0, "all_reduce", 1, 30.1), heartbeat_ns=at, exception=error, ended="exception"
    )
    found = evidence(killed, interrupted, now=40, rank0=ProcessPulse(None, gone=1.0))
    assert found.problem
    assert found.problem.kind == "exception"
    before = before_they_were_killed(found).problem
    assert before
    assert sorted(before.ranks) == [0, 1]
    assert "KeyboardInterrupt" not in str(before)
    assert "`recv <- 1`" in before.sentence
    assert "`all_reduce`" in before.sentence
    other = evidence(
        killed, replace(interrupted, exception=raised("", 30)), now=40, rank0=ProcessPulse(None, gone=1.0)
    )
    assert before_they_were_killed(other) is other


def test_a_rank_whose_cell_has_ended_is_no_rank_that_is_stuck() -> None:
    """A notebook's engine lives on between cells; its own exception is told only where another rank waits for it."""
    waits = process(
        0, op(0, "barrier", 1, 2), op(1, "recv", 3, peer=1), heartbeat_ns=20 * SECOND, cell="running"
    )
    idle = process(1, op(0, "barrier", 1, 2), heartbeat_ns=20 * SECOND, cell="ended")
    assert evidence(waits, idle, now=4).problem is None  # its next cell may send
    found = evidence(waits, idle, now=20)
    assert found.problem
    assert (found.problem.kind, found.problem.ranks) == ("never sent", (1,))
    assert "rank 1 has ended its cell" in found.problem.sentence
    assert found.where(1) == "has ended its cell"
    failed = process(
        1, op(0, "barrier", 1, 2), heartbeat_ns=20 * SECOND, cell="ended", cell_raised=raised("a shape", 3)
    )
    found = evidence(waits, failed, now=20)
    assert found.problem
    assert (found.problem.kind, found.problem.ranks) == ("exception", (1,))
    assert "ValueError: a shape at infer.py:99" in found.problem.sentence
    assert evidence(process(0, op(0, "barrier", 1, 2), cell="ended"), failed, now=20).problem is None


LOST = "Connection closed by peer [127.0.0.1]:4242"


def after_a_lost_cell(at: float = 4, **other: Any) -> Evidence:
    """Rank 0's cell has ended by a lost connection, in an op for which rank 1 was not there."""
    lost = raised(LOST, at, kind="RuntimeError")
    cell = process(
        0, op(0, "barrier", 1, 2), op(1, "all_reduce", 3, 4, error=LOST), heartbeat_ns=20 * SECOND, cell="ended",
        cell_raised=lost,
    )  # fmt: skip
    return evidence(cell, process(1, op(0, "barrier", 1, 2), heartbeat_ns=3 * SECOND, **other), now=20)


@pytest.mark.parametrize(
    ("ended", "kind", "words"),
    [("os._exit(0)", "never joined", "has ended"), ("os._exit(3)", "dead", "ended by os._exit(3)")],
)
def test_who_ended_is_told_though_the_others_cells_have_ended_too(ended: str, kind: str, words: str) -> None:
    found = after_a_lost_cell(ended=ended)
    assert found.problem
    assert (found.problem.kind, found.problem.ranks) == (kind, (1,))
    assert words in found.problem.sentence
    alarm = HangAlarm()
    told = [alarm.consider(found, at) for at in (1.0, 1.1 + CONFIRM_S)]
    assert [one for one in told if one] == [found.problem]


@pytest.mark.parametrize("ahead", [-3600, 3600])
def test_what_a_cell_ran_into_before_a_recovery_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: float
) -> None:
    """Whatever the clock of its host says."""
    at = time.time() + ahead
    seen = [after_a_lost_cell(at, cell="ended")]
    assert seen[0].problem
    source = EnginesSource(tmp_path, lambda _: None)
    monkeypatch.setattr(source.watched, "look", lambda **_: seen[-1:])
    monkeypatch.setattr(source.watched, "ask", lambda *_: None)
    try:
        source.recovering(ended=False)
        source.recovering(ended=True)
        assert source.evidence.problem is None
        seen.append(after_a_lost_cell(at + 1, cell="ended"))
        assert source.evidence.problem
    finally:
        source.close()


def test_a_rank_that_polls_for_a_request_hangs_nobody() -> None:
    """As a server does that shares its requests out by a broadcast."""
    polling = ProcessPulse(None, deque([_Sample(18, 1.0, False, wakes=0), _Sample(20, 1.0, False, wakes=40)]))
    asleep = ProcessPulse(None, deque([_Sample(18, 1.0, False, wakes=0), _Sample(20, 1.0, False, wakes=0)]))
    waits = process(0, op(0, "barrier", 1, 2), op(1, "broadcast", 3), heartbeat_ns=20 * SECOND)
    serves = process(1, op(0, "barrier", 1, 2), heartbeat_ns=20 * SECOND)
    found = evidence(waits, serves, now=20, rank1=polling)
    assert found.problem is None
    assert "looks for again and again" in found.verdict.sentence
    assert evidence(waits, serves, now=20, rank1=asleep).problem


def test_a_rank_computes_while_what_it_has_started_does() -> None:
    """A shell in between, which waits itself."""
    spins = "while True: pass"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {spins!r}])"
    child = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    try:
        pulse = ProcessPulse(psutil.Process(child.pid))

        def look() -> None:
            pulse.look(time.monotonic())

        wait_for(lambda: pulse.cpu_moves, "something computes", look)
        pulse.samples.clear()  # its own start took CPU time, too
        wait_for(
            lambda: pulse.cpu_moves is not None and pulse.samples[0].children,
            "its child is seen from the first look on",
            look,
        )
        assert pulse.cpu_moves
        assert not pulse._computes
        assert pulse._children_compute
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def test_a_rank_whose_heart_beat_late_died_after_it_was_last_seen() -> None:
    """On a busy machine; the launcher has killed it, as another rank had failed."""
    failed = process(1, ended="exception", exception=raised("a shape", 5))
    killed = process(0, op(0, "barrier", 1), heartbeat_ns=2 * SECOND)
    ranks = {0: killed, 1: failed}
    gone = {0: ProcessPulse(None, gone=1.0), 1: ProcessPulse(None, gone=1.0)}
    signs = {rank: signs_of(one, gone[rank], 9.0, 9 * SECOND) for rank, one in ranks.items()}
    told = only_first_failures(signs, ranks, {}, {0: 6 * SECOND})
    assert told[1].raised
    assert not told[1].raised.secondary
    assert told[0].raised
    assert told[0].raised.secondary


@pytest.mark.parametrize("ended", ["exit", None])
def test_an_op_whose_end_is_unknown_is_over_once_its_thread_or_program_has_gone_on(ended: str | None) -> None:
    """DDP waits for it in C++, where nothing is seen of that."""
    unseen = op(1, "all_reduce", 2, waited_ns=0, state="issued")
    goes_on = process(
        0, op(0, "barrier", 1, 2), unseen, op(2, "barrier", 3, 4), ended=ended, heartbeat_ns=20 * SECOND
    )
    other = process(
        1, op(0, "barrier", 1, 2), op(1, "all_reduce", 2, 3), op(2, "barrier", 3, 4), ended="exit"
    )
    assert evidence(goes_on, other, now=20).problem is None
    blocked = process(0, op(0, "barrier", 1, 2), unseen, heartbeat_ns=20 * SECOND)
    assert evidence(blocked, other, now=20).problem


def test_ranks_that_connect_to_one_another_may_take_long() -> None:
    for at, is_told in ((20, False), (60, True)):
        ranks = [process(rank, op(0, "init_group", 1, group=""), heartbeat_ns=at * SECOND) for rank in (0, 1)]
        assert bool(evidence(*ranks, now=at).problem) == is_told


def test_a_rank_that_lost_one_that_had_ended_did_not_die() -> None:
    lost = raised("[...] Connection closed by peer [127.0.0.1]:1", 4, kind="RuntimeError")
    found = evidence(
        process(0, op(0, "barrier", 0.5, 1), op(1, "all_reduce", 1, 4), ended="exception", exception=lost),
        process(1, op(0, "barrier", 0.5, 1), ended="os._exit(0)"),
        now=7,
    ).problem
    assert found
    assert (found.kind, found.ranks) == ("never joined", (1,))
    assert found.sentence.startswith("missing collective: rank 1 has ended after `barrier`")
    assert "takes no part in `all_reduce`" in found.sentence
    assert "of rank 0" in found.sentence
    assert "Connection closed by peer" in str(found)


def test_who_left_is_told_in_the_same_words_before_and_after_its_connection_is_seen_to_be_lost() -> None:
    """The verdict that stands is not another one because the rank that waits has been ended by it."""
    left = process(1, op(0, "barrier", 0.5, 1), ended="exit")
    waits = evidence(process(0, op(0, "barrier", 0.5, 1), op(1, "all_reduce", 1, 0)), left, now=7).problem
    lost = raised("[...] Connection closed by peer [127.0.0.1]:1", 4, kind="RuntimeError")
    has_lost = evidence(
        process(0, op(0, "barrier", 0.5, 1), op(1, "all_reduce", 1, 4), ended="exception", exception=lost),
        left,
        now=7,
    ).problem
    assert waits
    assert has_lost
    assert waits.sentence == has_lost.sentence
