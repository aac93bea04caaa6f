"""The parts of a run, each alone: its state, its actions, its lease of the ranks; and how short the way of a step
is."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

import pytest

from dinfer.cluster.lease import RankLease, RunOver
from dinfer.cluster.ranks import RankState
from dinfer.cluster.threads import LocalRanks
from dinfer.config import Config
from dinfer.engine.board import Stand
from dinfer.errors import NotPossible
from dinfer.history import History, call_text
from dinfer.job import Job
from dinfer.messages import BreakpointHit, Edited, GetStand, SetBreakpoints
from dinfer.model.checkpoint import check
from dinfer.plan.cut import Cuts
from dinfer.plan.ops import PlanError
from dinfer.plan.partition import partition
from dinfer.plan.schedule import build
from dinfer.plan.verify import verify
from dinfer.run.action import Actions
from dinfer.run.breakpoints import BreakpointTable
from dinfer.run.failure import Broken
from dinfer.run.result import merge
from dinfer.run.state import RunState, State
from dinfer.session.session import Session
from dinfer.trace.events import Event
from dinfer.trace.trace import Trace
from dinfer.verdict.verdict import Verdict
from tests.support.bare_ranks import BareRanks
from tests.support.threads import session_on_threads

PLAN = build(partition(layers=2, tokens=8, world_size=2, chunk_size=4), "lockstep", "pairwise")
ENDS = [tuple(len(lane.ops) for lane in lanes) for lanes in PLAN.lanes]
DEADLINE_S = 20.0


class SilentRanks(BareRanks):
    """Two ranks that never answer; rank 1 ended with status 3."""

    def __init__(self) -> None:
        super().__init__(2)

    def exits(self) -> list[int | None]:
        return [None, 3]

    def silent(self) -> list[int]:
        return [0]


@pytest.fixture
def lease() -> RankLease:
    return RankLease(SilentRanks())


@pytest.fixture
def state(lease: RankLease) -> RunState:
    job = Job(Config(world_size=2), check("demo"), tuple(range(8)), PLAN, verify(PLAN))
    return RunState(job, lease, ["cpu", "cpu"])


def stand(lease: RankLease, *, at: int = 0, limit: int = 0) -> None:
    """Both ranks have reported their position: `at` of the ops of a lane, -1 for all."""
    for rank, ends in zip(lease.ranks, ENDS, strict=True):
        positions = tuple(end if at < 0 else at for end in ends)
        limits = tuple(end if limit < 0 else limit for end in ends)
        rank.stand = Stand(positions, (False,) * len(ends), limits)


# -- the state


def test_the_state_follows_from_the_lanes_until_something_ends_the_run(
    lease: RankLease, state: RunState
) -> None:
    assert (state.now, state.stands()) == (State.PREPARING, ())
    stand(lease)
    assert state.decide()[0] == "paused"
    assert len(state.stands()) == 2
    stand(lease, limit=-1)
    assert state.decide()[0] == State.RUNNING
    stand(lease, at=-1, limit=-1)
    assert state.decide()[0] == State.DONE
    state.note_decoding(is_decoding=True)
    assert state.decide()[0] == State.DECODING
    state.close("another run has begun")
    assert state.decide() == (State.CLOSED, "another run has begun")
    state.fail(Broken("failed", "rank 1 raised"))
    assert state.decide() == (State.FAILED, "rank 1 raised")


def test_a_rank_that_was_started_again_has_no_position_in_this_run(lease: RankLease, state: RunState) -> None:
    """Its lanes come with the next prompt; until then the run can still be shown."""
    for rank, (known, end) in enumerate(zip(lease.ranks, ENDS, strict=True)):
        known.stand = (
            Stand((0,) * len(end), (False,) * len(end), (0,) * len(end)) if rank else Stand((), (), ())
        )
    assert state.stands() == ()
    assert state.now is State.PREPARING


def test_the_reason_is_the_gravest_that_is_known(lease: RankLease, state: RunState) -> None:
    stand(lease)
    state.say("stopped at #1")
    assert state.decide() == (State.PAUSED, "stopped at #1")
    stand(lease, limit=-1)
    state.note_hang(Verdict("cycle", "ranks 0 and 1 wait for one another"))
    assert state.decide() == (State.HUNG, "ranks 0 and 1 wait for one another")
    stand(lease, at=-1, limit=-1)  # it has gone on, and the monitor has not looked again yet
    assert state.decide() == (State.DONE, "stopped at #1")
    state.note_silence("rank 1 does not answer")
    assert state.decide() == (State.LOST, "rank 1 does not answer")
    state.note_silence("")
    state.note_hang(None)
    assert state.decide()[1] == "stopped at #1"
    assert (state.said, state.story) == (["stopped at #1"], ["stopped at #1"])


def test_the_first_failure_stays_and_what_is_added_follows_it(state: RunState) -> None:
    state.fail(Broken("failed", "rank 1 raised"))
    state.fail(Broken("lost", "rank 0 lost its peer"))
    assert state.failure == "rank 1 raised"
    state.note_recovery(ended=True)
    cause, told = state.failure.splitlines()
    assert (state.now, cause) == (State.FAILED, "rank 1 raised")
    assert "recovered" in told
    state.begin()
    assert (state.now, state.failure) == (State.PREPARING, "")


# -- the actions


def actions(state: RunState, interrupted: Callable[[], None] = lambda: None) -> Actions:
    return Actions(state, lambda: None, interrupted)


def test_a_call_is_remembered_as_its_user_wrote_it() -> None:
    assert call_text("step", ("layer",), {"n": 2}) == 'run.step("layer", n=2)'


def test_actions_happen_one_after_another_but_for_those_that_stop_them(state: RunState) -> None:
    made = actions(state)
    inside, leave, order = threading.Event(), threading.Event(), list[str]()

    def first() -> None:
        with made.taken("first"):
            inside.set()
            assert leave.wait(DEADLINE_S)
            order.append("first")

    def second() -> None:
        with made.taken("second"):
            order.append("second")

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert inside.wait(DEADLINE_S)
    threads[1].start()
    with made.taken("stop", alone=False):
        order.append("stop")
        leave.set()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert order == ["stop", "first", "second"]


def test_listeners_hear_of_an_action_once_it_has_ended_however_it_ended(state: RunState) -> None:
    heard = list[str]()
    made = actions(state, lambda: heard.append("interrupted"))
    stop = made.on_change(lambda: heard.append("told"))
    with pytest.raises(KeyboardInterrupt), made.taken("step"):
        raise KeyboardInterrupt
    assert heard == ["interrupted", "told"]
    stop()
    with made.taken("step"):
        pass
    assert heard == ["interrupted", "told"]


def test_a_run_that_is_over_or_cannot_go_on_refuses_actions(state: RunState) -> None:
    def fail() -> None:
        raise RuntimeError("rank 1 is gone")

    entered = list[str]()
    with pytest.raises(RuntimeError, match="rank 1 is gone"), Actions(state, fail, fail).taken("step"):
        entered.append("failed")
    state.close("the session is closed")
    made = actions(state)
    with pytest.raises(NotPossible, match="this run is over: the session is closed"), made.taken("step"):
        entered.append("closed")
    assert not entered
    assert state.last_call == "step"
    with pytest.raises(RunOver), made.hold():
        pass


# -- the lease


def test_a_lease_that_was_given_back_asks_nothing_and_keeps_what_it_saw(lease: RankLease) -> None:
    lent = lease.ranks
    lent[0].decoded, lent[0].notes = 3, [Edited(("K",))]
    lease.give_back("another run has begun")
    lent[0].decoded = 7
    assert lease.ranks[0].decoded == 3
    assert (lease.exits(), lease.silent(), lease.new_notes(), lease.new_texts()) == ([None, 3], [], [], [])
    with pytest.raises(RunOver, match="its ranks hold its KV no more: another run has begun"):
        lease.ask({0: GetStand()}, 1.0)
    with pytest.raises(RunOver, match="its ranks hold its KV no more: another run has begun"):
        lease.begin({0: GetStand()})


def test_who_waits_for_an_answer_when_the_run_ends_gets_none(lease: RankLease) -> None:
    begun = lease.begin({0: GetStand()})
    with pytest.raises(RunOver):
        lease.finish(begun, DEADLINE_S, lambda: lease.give_back("another run has begun"))


# -- breakpoints


def test_breakpoints_arm_conditions_and_know_which_is_met() -> None:
    armed = list[SetBreakpoints]()
    table, cuts = BreakpointTable(Config(digests=False), armed.append, History(), str), Cuts(PLAN)
    plain = table.add(cuts, None, None, chunk=1, layer=0)
    with_condition = table.add(cuts, None, "nan", rank=1)
    assert [[one["number"] for one in told.breakpoints] for told in armed] == [[1], [1, 2]]
    limit, met = table.ahead(cuts, cuts.start)
    assert (limit, met) == (cuts.after_block(1, 0), [plain])
    table.expect(met, limit)
    assert table.arrived(cuts.start) == ""  # it is on its way
    assert table.arrived(limit) == f"stopped at {plain}"
    assert table.arrived(limit) == ""
    note = BreakpointHit(with_condition.as_dict(), "layer c0 l1", "3 NaN", 1)
    assert table.hit(1, note) == f"stopped at {with_condition}: rank 1, `layer c0 l1`: 3 NaN"
    table.view.remove(2)
    assert (table.hit(1, note), armed[-1]) == ("", SetBreakpoints((plain.as_dict(),)))
    with pytest.raises(PlanError, match="this run has digests=False"):
        table.add(cuts, None, "digest differs")


# -- events


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with session_on_threads(2, Path("demo")) as made:
        yield made


def test_events_are_merged_without_the_lock_that_lanes_take(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = session.prefill(list(range(1, 13)), chunk_size=4, paused=True)
    run.step("chunk")
    moved = list[bool]()

    def merged(job: Job, by_rank: Sequence[Sequence[Event]], ranks: Sequence[RankState]) -> Trace:
        def lane() -> None:
            moved.append(session.ranks.changed.acquire(timeout=DEADLINE_S))
            session.ranks.changed.release()

        thread = threading.Thread(target=lane)
        thread.start()
        thread.join(2 * DEADLINE_S)
        return merge(job, by_rank, ranks)

    monkeypatch.setattr("dinfer.run.events.merge", merged)
    assert run.trace.events
    assert moved == [True]


# -- a step through the code


def chains(call: Callable[[], object]) -> list[list[FrameType]]:
    """For every command that this call sends, the functions of dinfer that were entered until the ranks took it, but
    for comprehensions, which are functions on Python 3.11 alone."""
    found: list[list[FrameType]] = []
    arrival = LocalRanks.__module__

    def entered(frame: FrameType | None, event: str, _: object) -> None:
        if event != "call" or frame is None or frame.f_globals.get("__name__") != arrival:
            return
        chain = list[FrameType]()
        while frame := frame.f_back:
            name = frame.f_globals.get("__name__", "")
            if name == arrival:  # the ranks have it already
                return
            if name.startswith("dinfer.") and not frame.f_code.co_name.endswith("comp>"):
                chain.append(frame)
        found.append(chain)

    sys.setprofile(entered)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


def test_a_step_passes_at_most_eight_functions_in_four_files(session: Session) -> None:
    """It was 12 in 6 files."""
    run = session.prefill(list(range(1, 13)), chunk_size=4, paused=True)
    run.step("layer")
    found = chains(lambda: run.step("layer"))
    assert len(found) >= 4, "each of two ranks is asked where it stands, and gets a limit"
    for chain in found:
        assert len(chain) <= 8, [frame.f_code.co_qualname for frame in chain]
        assert len({frame.f_code.co_filename for frame in chain}) <= 4
