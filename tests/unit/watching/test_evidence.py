"""The evidence of one moment: signs of life, first failures, and what is kept of it in a trace."""

from pathlib import Path

from dinfer.trace.read import read_jsonl
from dinfer.verdict.signs import Signs
from dinfer.watch.probe.records import StacksTaken, ThreadLook, WatchedProcess
from dinfer.watching.alarm import CONFIRM_S, HangAlarm
from dinfer.watching.events import trace_of
from dinfer.watching.evidence import Evidence
from dinfer.watching.failures import before_they_were_killed, only_first_failures
from dinfer.watching.given import of_trace
from dinfer.watching.signs import ProcessPulse, dumped_frame, signs_of
from tests.support.made_processes import SECOND, op, process, raised


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
    assert alarm.is_suspicious
    told = alarm.consider(now, 10.1 + CONFIRM_S)
    assert told == now.problem
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
