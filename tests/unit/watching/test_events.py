"""Records of watched processes as a trace."""

from dinfer.trace.flight import groups_of
from dinfer.watch.probe.records import WatchedGroup
from dinfer.watching.events import ranks_of, trace_of
from tests.support.made_processes import SECOND, op, process


def test_an_op_becomes_an_event_with_its_call() -> None:
    sends = process(0, op(0, "send", 1, 3, peer=1, tag=7, layer=2, chunk=1))
    recvs = process(1, op(0, "recv", 2, 3, peer=0, tag=7))
    trace = trace_of({0: sends, 1: recvs})
    send = next(event for event in trace.events if event.rank == 0)
    assert (send.kind, send.peer, send.layer, send.chunk, send.bytes) == ("send", 1, 2, 1, 16)
    assert (send.start, send.met, send.end) == (SECOND, 2 * SECOND, 3 * SECOND)
    assert send.call
    assert (send.call.group, send.call.backend, send.call.tag) == ("default", "gloo", 7)
    assert (send.call.place, send.call.tensor) == ("infer.py:10", "[4] float32")
    assert groups_of(trace)["default"].ranks == (0, 1)


def test_the_root_of_a_collective_is_no_peer() -> None:
    trace = trace_of({0: process(0, op(0, "broadcast", 1, 2, peer=1))})
    assert trace.events[0].peer is None


def test_an_async_op_is_waited_for_later_or_never() -> None:
    later = op(0, "send", 1, 5, peer=1, is_async=True, waited_ns=4 * SECOND)
    never = op(1, "send", 2, 3, peer=1, is_async=True, waited_ns=0)
    first, second = sorted(trace_of({0: process(0, later, never)}).events, key=lambda event: event.ready)
    assert (first.ready, first.start) == (SECOND, 4 * SECOND)
    assert first.call
    assert second.call
    assert (first.call.is_waited, second.call.is_waited) == (True, False)


def test_groups_of_one_name_and_other_members_are_told_apart() -> None:
    left, right = process(0), process(1)
    left.groups["1"] = WatchedGroup("1", (0, 2), "gloo", "pair")
    right.groups["1"] = WatchedGroup("1", (1, 3), "gloo", "pair")
    groups = groups_of(trace_of({0: left, 1: right}))
    assert groups["pair 1 [0, 2]"].ranks == (0, 2)
    assert groups["pair 1 [1, 3]"].ranks == (1, 3)


def test_a_group_that_was_made_anew_meets_that_of_a_rank_that_was_started_again() -> None:
    old = process(0, op(0, "barrier", 1, 2), op(1, "barrier", 8, 9, group="0#2"))
    old.groups["0#2"] = WatchedGroup("0#2", (0, 1), "gloo", "default_pg")
    new = process(1, op(0, "barrier", 8, 9))
    groups = {
        event.call.group
        for event in trace_of({0: old, 1: new}).events
        if event.ready == 8 * SECOND and event.call
    }
    assert groups == {"default"}


def test_a_rank_is_the_process_that_said_so_last() -> None:
    first, again = process(0, started=1), process(0, started=9)
    launcher, helper = process(None), process(None, expected_rank=0, started=10)
    meant = process(None, expected_rank=1, started=2)
    found = ranks_of([again, launcher, helper, meant, first])
    assert found == {0: again, 1: meant}
    assert ranks_of([launcher, meant]) == {}  # it may not be about torch.distributed at all
