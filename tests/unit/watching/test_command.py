"""What counts at the end of a command under watch, and when a verdict is told."""

from typing import Any

from dinfer.watch.probe.records import RaisedError, StacksTaken, ThreadLook
from dinfer.watching.alarm import CONFIRM_MISSING_S, CONFIRM_S, CONFIRM_UNKNOWN_S, HangAlarm
from dinfer.watching.command import JobFollowed, final_verdict
from dinfer.watching.evidence import Evidence
from dinfer.watching.folders import RECENT, shortened
from dinfer.watching.signs import ProcessPulse
from tests.support.made_processes import SECOND, op, process, raised
from tests.unit.watching.test_evidence import crossed_sends, evidence

GONE = ProcessPulse(None, gone=1.0)


def killed(now: float = 9.0, **pulses: ProcessPulse) -> Evidence:
    """Both ranks, in the midst of sends to each other."""
    sends = [op(0, "send", 1, peer=1), op(0, "send", 1, peer=0)]
    gone = pulses or {"rank0": GONE, "rank1": GONE}
    return evidence(*(process(rank, one) for rank, one in enumerate(sends)), now=now, **gone)


def interrupted() -> Evidence:
    error = raised("", 8, kind="KeyboardInterrupt")
    ranks = (process(rank, op(0, "barrier", 1, 2), ended="exception", exception=error) for rank in (0, 1))
    return evidence(*ranks, now=9)


def moves(now: float = 1.5) -> Evidence:
    return crossed_sends(now)


def test_a_death_is_told_and_stays() -> None:
    job = JobFollowed()
    told = job.look(killed(rank1=GONE), 1.0)
    assert told
    assert (told.kind, told.ranks) == ("dead", (1,))
    assert job.conclude(killed(), 1).problem


def test_ends_that_somebody_has_asked_for_are_no_news() -> None:
    for end in (killed(), interrupted()):
        job = JobFollowed()
        assert job.look(moves(), 1.0) is None
        assert job.look(end, 2.0, is_ending=True) is None
        assert job.conclude(end, 143, moves()) is end
        assert job.alarm.standing is None


def test_a_hang_that_somebody_ends_before_it_is_told_is_told_at_the_end() -> None:
    job, hangs = JobFollowed(), crossed_sends(3)
    assert job.look(hangs, 1.0) is None
    assert job.look(killed(), 1.1, is_ending=True) is None
    found = job.conclude(killed(), 130, hangs)
    assert found.problem
    assert found.problem.kind == "cycle"


def test_a_hang_that_was_told_stays_though_the_script_ends_well() -> None:
    job, hangs = JobFollowed(), crossed_sends(3)
    for at in (1.0, 1.1 + CONFIRM_S):
        job.look(hangs, at)
    assert job.conclude(killed(), 0).problem == hangs.problem
    over = evidence(*(process(rank, op(0, "barrier", 1, 2), ended="exit") for rank in (0, 1)), now=9)
    assert job.conclude(over, 0) is over  # it came free after all


def test_what_was_told_of_ranks_that_outlive_their_command_stays() -> None:
    """Such as those of `mp.spawn`, whose parent was ended by a signal: they hang on."""
    hangs = crossed_sends(3)
    told = hangs.problem
    assert told
    for asked in (True, False):
        said = final_verdict(hangs, told, 143, goes_on=True, is_asked_to_end=asked)
        assert said == told
        assert final_verdict(moves(), told, 143, goes_on=True, is_asked_to_end=asked) is None
        assert final_verdict(hangs, None, 143, goes_on=True, is_asked_to_end=asked) is None
    assert final_verdict(hangs, None, 143, goes_on=False, is_asked_to_end=True) == told
    assert final_verdict(killed(), None, 143, goes_on=False, is_asked_to_end=True) is None
    assert final_verdict(killed(), None, 0, goes_on=False, is_asked_to_end=False) is None


def test_what_a_rank_that_has_ended_left_out_is_told_at_the_next_look() -> None:
    alarm = HangAlarm()
    now = evidence(process(0, op(0, "recv", 1, peer=1)), process(1, ended="exit"), now=1.2)
    assert alarm.consider(now, 1.0) is None
    told = alarm.consider(now, 1.01 + CONFIRM_MISSING_S)
    assert told
    assert (told.kind, told.ranks) == ("never sent", (1,))


def test_a_handled_exception_is_told_as_late_as_any_hang() -> None:
    alarm = HangAlarm()
    handling = process(1, op(1, "barrier", 2), handled=[raised("a shape", 2)])
    now = evidence(process(0, op(0, "recv", 1, peer=1)), handling, now=9)
    assert alarm.consider(now, 1.0) is None
    told = alarm.consider(now, 1.1 + CONFIRM_S)
    assert told
    assert (told.kind, told.ranks) == ("exception", (1,))
    assert alarm.consider(killed(), 9.0) is None  # a hang is ended by killing it


def test_an_exception_that_ended_a_thread_alone_is_no_failure() -> None:
    lost = RaisedError("KeyError", "3", "/code/a.py", 7, "sender", 5 * SECOND, 1)
    ranks = [process(rank, op(0, "barrier", 1, 2), exception=lost) for rank in (0, 1)]
    assert evidence(*ranks, now=9).problem is None
    for one in ranks:
        one.ended = "exception"
    found = evidence(*ranks, now=9)
    assert (found.problem, found.signs[0].phase) == (None, "done")


def test_an_exception_after_which_a_rank_goes_on_is_no_failure() -> None:
    """Somebody has called sys.excepthook to print it."""
    printed = raised("a shape", 3)
    ranks = [
        process(rank, op(0, "barrier", 1, 2), op(1, "barrier", 4, 5), exception=printed) for rank in (0, 1)
    ]
    assert evidence(*ranks, now=9).problem is None
    ranks[1].ops.pop()
    found = evidence(*ranks, now=4.5).problem
    assert found
    assert (found.kind, found.ranks) == ("exception", (1,))


def test_where_a_stack_may_still_come_a_rank_is_given_the_time() -> None:
    heart = {"heartbeat_ns": 20 * SECOND}
    waits, idle = (
        process(0, op(0, "barrier", 0.5, 1), op(1, "barrier", 2)),
        process(1, op(0, "barrier", 0.5, 1)),
    )
    for one in (waits, idle):
        one.host = "here"
        one.heartbeat_ns = heart["heartbeat_ns"]
    alarm, now = HangAlarm(), evidence(waits, idle, now=20)
    assert now.problem
    assert now.problem.kind == "stuck"
    assert alarm.consider(now, 1.0) is None
    thread = ThreadLook("MainThread", 1, (("/code/a.py", 7, "serve", "sock.accept()"),), 1)
    idle.stacks = [StacksTaken(1, 19 * SECOND, (thread,))]
    serves = evidence(waits, idle, now=20)
    assert alarm.consider(serves, 1.1 + CONFIRM_UNKNOWN_S) is None
    assert serves.verdict.kind == "idle"
    assert "waits for a connection, at `sock.accept()` in serve (a.py:7); rank 0 waits for it" in str(
        serves.verdict
    )
    assert serves.where(1).startswith("waits for a connection")


def test_a_look_at_the_last_ops_judges_as_one_at_all_and_the_older_come_back_at_the_end() -> None:
    ranks = []
    for rank in (0, 1):
        barriers = [op(at, "barrier", 1 + at / 1000, 1 + (at + 0.5) / 1000, number=at) for at in range(2000)]
        lost = op(2000, "send", 4, peer=1 - rank, number=0)
        ranks.append(process(rank, *barriers, lost))
    whole, recent = evidence(*ranks, now=9), evidence(*map(shortened, ranks), now=9)
    assert len(recent.trace.events) == 2 * RECENT
    assert recent.problem
    assert whole.problem
    assert recent.problem.sentence == whole.problem.sentence
    assert recent.with_older(whole).trace.events == whole.trace.events
    assert whole.with_older(whole) is whole


def test_an_op_that_has_been_open_for_long_is_looked_at_still() -> None:
    opened = op(0, "send", 0.5, peer=1, number=0)
    later = [op(at, "barrier", at, at + 0.5, number=at, thread="other") for at in range(1, 1000)]
    short = shortened(process(0, opened, *later))
    assert (short.ops[0], len(short.ops), short.dropped) == (opened, RECENT + 1, 1000 - RECENT - 1)


def test_who_waited_is_told_though_they_have_lost_their_connections_since() -> None:
    left = process(2, op(0, "barrier", 0.5, 1), ended="exit")
    lost = raised("Connection closed by peer", 4, kind="RuntimeError")

    def seen(*, has_lost: bool) -> Evidence:
        end: dict[str, Any] = {"ended": "exception", "exception": lost} if has_lost else {}
        done = 4.0 if has_lost else 0.0
        sends = process(0, op(0, "barrier", 0.5, 1), op(1, "send", 1, done, peer=2), **end)
        receives = process(1, op(0, "barrier", 0.5, 1), op(1, "recv", 1, done, peer=0), **end)
        return evidence(sends, receives, left, now=7)

    job = JobFollowed()
    for at, has_lost in ((1.0, False), (1.1 + CONFIRM_S, False), (3.0, True)):
        job.look(seen(has_lost=has_lost), at)
    after = seen(has_lost=True)
    assert after.problem
    assert (after.problem.kind, after.problem.ranks, after.problem.blocked) == ("never received", (2,), (0,))
    found = job.conclude(after, 1).problem
    assert found
    assert (found.kind, found.ranks, found.blocked) == ("never received", (2,), (0, 1))
