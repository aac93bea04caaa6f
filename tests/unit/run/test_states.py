"""The states of a run are true, and each that needs it has a remedy: by what is known of the ranks, and in sessions."""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from dinfer.cluster.lease import RankLease
from dinfer.cluster.ranks import LOST
from dinfer.config import Config
from dinfer.engine.board import Stand
from dinfer.errors import NotPossible
from dinfer.job import Job
from dinfer.messages import Failed
from dinfer.model.checkpoint import check
from dinfer.model.decoder import Decoder
from dinfer.model.mapped import WeightsChanged
from dinfer.plan.partition import partition
from dinfer.plan.schedule import build
from dinfer.plan.verify import verify
from dinfer.run.failure import Broken, RankFailed
from dinfer.run.hang import Health, Hung
from dinfer.run.state import RECOVER, RESTART, TAKE_BACK, RunState, State
from dinfer.session.session import Session
from dinfer.severity import Severity
from dinfer.verdict.verdict import Verdict
from dinfer.verdict.waits import HangKind
from tests.support.bare_ranks import BareRanks
from tests.support.fixtures import fresh_session
from tests.support.runs import wait_for
from tests.support.twin import prompt

PLAN = build(partition(layers=2, tokens=8, world_size=2, chunk_size=4), "lockstep", "pairwise")
ENDS = [tuple(len(lane.ops) for lane in lanes) for lanes in PLAN.lanes]
IDS = prompt(10)
DEADLOCK = Verdict("cycle", "deadlock: ranks 0 and 1 wait for each other", (0, 1))

session = fresh_session


class KnownRanks(BareRanks):
    """Two ranks of which a test says what is known."""

    def __init__(self) -> None:
        super().__init__(2)
        self.ended: list[int | None] = [None, None]
        self.mute: list[int] = []

    def exits(self) -> list[int | None]:
        return self.ended

    def silent(self) -> list[int]:
        return self.mute

    def stand(self, *, at: int = 0, limit: int = 0) -> None:
        """Both ranks have reported their position: `at` of the ops of a lane, -1 for all."""
        for rank, ends in zip(self.ranks, ENDS, strict=True):
            positions, limits = (tuple(end if n < 0 else n for end in ends) for n in (at, limit))
            rank.stand = Stand(positions, (False,) * len(ends), limits)


class Scene:
    """The state and health of a run on such ranks, which moves."""

    def __init__(self) -> None:
        self.ranks = KnownRanks()
        job = Job(Config(world_size=2, log_dir=""), check("demo"), tuple(range(8)), PLAN, verify(PLAN))
        self.state = RunState(job, RankLease(self.ranks), ["cpu", "cpu"])
        self.health = Health(self.state)
        self.ranks.stand(limit=-1)

    def seen(self) -> tuple[State, str]:
        """The state and its remedy, once the ranks have been looked at."""
        with suppress(RankFailed, Hung):
            self.health.check()
        return self.state.now, self.state.remedy


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_states_that_need_nothing_have_no_remedy(scene: Scene) -> None:
    assert scene.seen() == (State.RUNNING, "")
    scene.ranks.stand()
    assert scene.seen() == (State.PAUSED, "")
    scene.ranks.stand(at=-1, limit=-1)
    assert scene.seen() == (State.DONE, "")
    scene.state.note_decoding(is_decoding=True)
    assert scene.seen() == (State.DECODING, "")
    scene.ranks.ranks[1].stand = None
    scene.state.note_decoding(is_decoding=False)
    assert scene.seen() == (State.PREPARING, "")
    assert scene.state.gravity() == Severity.NOTE


def test_a_hang_is_a_state_until_it_ends(scene: Scene) -> None:
    scene.state.note_hang(DEADLOCK)
    assert scene.seen() == (State.HUNG, RECOVER)
    assert scene.state.decide() == (State.HUNG, DEADLOCK.sentence)
    assert scene.state.gravity() == Severity.ERROR
    with pytest.raises(Hung, match=r"session\.recover"):
        scene.health.check()
    scene.state.note_hang(None)
    assert scene.seen() == (State.RUNNING, "")
    assert scene.state.gravity() == Severity.NOTE


@pytest.mark.parametrize(("kind", "state"), [("dead", State.LOST), ("exception", State.FAILED)])
def test_a_verdict_on_a_rank_that_has_ended_is_its_end_s_state(
    scene: Scene, kind: HangKind, state: State
) -> None:
    """Or the run would be hung for a moment, before the rank's end is told."""
    scene.state.note_hang(Verdict(kind, "rank 1 …", (1,)))
    assert scene.seen() == (state, RECOVER)


def test_a_slow_rank_is_a_warning_and_no_hang(scene: Scene) -> None:
    scene.state.note_hang(Verdict("computing", "rank 1 is still computing", (1,)))
    assert scene.seen() == (State.RUNNING, "")
    assert scene.state.gravity() == Severity.WARNING


def test_a_verdict_on_a_run_that_stands_by_now_is_no_hang(scene: Scene) -> None:
    scene.state.note_hang(DEADLOCK)
    scene.ranks.stand()
    assert scene.seen() == (State.PAUSED, "")


@pytest.mark.parametrize("limit", [0, -1], ids=["paused", "running"])
def test_a_silent_rank_is_lost_until_it_answers(scene: Scene, limit: int) -> None:
    scene.ranks.stand(limit=limit)
    scene.ranks.mute = [1]
    assert scene.seen() == (State.LOST, RECOVER)
    assert "rank 1 does not answer" in scene.state.decide()[1]
    scene.ranks.mute = []
    assert scene.seen() == (State.RUNNING if limit else State.PAUSED, "")


def test_a_dead_rank_is_lost_and_what_it_did_to_others_is_not_the_cause(scene: Scene) -> None:
    scene.ranks.ended = [None, LOST]
    scene.ranks.ranks[1].gone = True
    scene.ranks.ranks[0].error = Failed("rank 0: connection closed by peer", secondary=True)
    assert scene.seen() == (State.LOST, RECOVER)


def test_a_rank_that_raised_has_failed_the_run(scene: Scene) -> None:
    scene.ranks.ranks[1].error = Failed("ValueError: the cause")
    assert scene.seen() == (State.FAILED, RECOVER)
    scene.state.note_hang(DEADLOCK)
    assert scene.seen()[0] == State.FAILED, "the cause of the failure, not what came of it"


@pytest.mark.parametrize("ranks", [(1,), (0, 1)])
def test_weights_that_were_overwritten_are_loaded_again_not_recovered(
    scene: Scene, ranks: tuple[int, ...]
) -> None:
    for rank in ranks:
        scene.ranks.ranks[rank].error = Failed("the weight files were overwritten", WeightsChanged.__name__)
    load = "session.load('demo', threads=2)"
    scene.state.job = replace(scene.state.job, config=scene.state.job.config.with_(threads=2))
    assert scene.seen() == (State.FAILED, load)
    scene.state.note_recovery(ended=True)
    assert scene.seen() == (State.FAILED, load), "what frees lanes has not loaded anything"
    with pytest.raises(RankFailed, match=r"to go on: session\.load\('demo', threads=2\)"):
        scene.health.check()
    for state in scene.ranks.ranks:
        state.error = None
    scene.state.begin()
    assert scene.seen() == (State.RUNNING, ""), "a run that begins again knows nothing of it"


def test_engines_that_were_taken_over_are_not_recovered(scene: Scene) -> None:
    scene.ranks.ranks[0].handed_on = "notebook b.ipynb"
    wait_for(lambda: scene.seen()[0] == State.TAKEN_OVER, "it is known")
    assert scene.state.remedy == TAKE_BACK
    assert "recover" not in scene.state.remedy
    assert "notebook b.ipynb" in scene.state.decide()[1]
    assert "recover" not in scene.state.decide()[1]
    assert scene.state.gravity() == Severity.WARNING


def test_after_a_recovery_restarting_is_enough(scene: Scene) -> None:
    scene.state.fail(Broken("lost", "rank 1 is gone"))
    scene.state.note_recovery(ended=False)
    assert scene.seen() == (State.LOST, RECOVER)
    scene.state.note_recovery(ended=True)
    assert scene.seen() == (State.LOST, RESTART)
    assert scene.state.failure.startswith("rank 1 is gone\n")
    assert "has begun" not in scene.state.failure
    scene.state.begin()
    assert scene.seen() == (State.RUNNING, "")


def test_a_run_that_is_over_has_no_trouble_any_more(scene: Scene) -> None:
    scene.state.fail(Broken("failed", "rank 1 raised"))
    scene.state.close("another run has begun")
    assert (scene.state.now, scene.state.remedy) == (State.FAILED, "")
    assert scene.state.gravity() == Severity.NOTE


def test_what_was_said_has_its_own_level(scene: Scene) -> None:
    scene.ranks.stand()
    scene.state.say("stopped: rank 1's bytes have changed", Severity.ERROR)
    assert scene.state.gravity() == Severity.ERROR
    assert scene.state.said == ["✖ error: stopped: rank 1's bytes have changed"]
    scene.state.say("stopped at #1")
    assert scene.state.gravity() == Severity.NOTE


# -- in a session


def test_a_hang_that_ends_by_itself_leaves_the_state(session: Session, door: threading.Event) -> None:
    run = session.prefill(IDS, chunk_size=4)
    wait_for(lambda: run.standing().state == "hung", "it hangs")
    standing = run.standing()
    assert (standing.remedy, standing.severity) == (RECOVER, Severity.ERROR)
    assert f"to go on: {RECOVER}" in str(run.where())
    assert run.where().severity == Severity.ERROR
    wait_for(lambda: any("✖ error: hung: rank 1" in line for line in session.log), "the log says so")
    door.set()
    wait_for(lambda: run.standing().state == "done", "it has gone on")
    standing = run.standing()
    assert (standing.message, standing.remedy, standing.severity) == ("", "", Severity.NOTE)


def test_a_hang_does_not_flicker(session: Session, door: threading.Event) -> None:
    """While the ranks are asked for their stacks, again and again, the state stays."""
    run = session.prefill(IDS, chunk_size=4)
    wait_for(lambda: run.standing().state == "hung", "it hangs")
    seen, asked = set[State](), 0
    stop = run.on_change(lambda: seen.add(run.standing().state))
    while asked < 4:  # each time takes the news of a second
        assert run.verdict().is_hung
        seen.add(run.standing().state)
        asked += 1
    stop()
    door.set()
    assert seen == {State.HUNG}


def test_mending_a_hang_begins_the_run_again_without_a_word_of_it(session: Session) -> None:
    run = session.prefill(IDS, chunk_size=4, schedule="batched", unsafe=True)
    wait_for(lambda: run.standing().state == "hung", "it hangs")
    begun = run.standing().begun
    where = run.mend()
    standing = run.standing()
    assert (standing.state, standing.message, standing.remedy, standing.verdict) == ("paused", "", "", "")
    assert (standing.last_call, standing.begun) == (RECOVER, begun + 1)
    assert str(where).startswith("paused\n")
    assert "deadlock" not in str(where)


def test_a_run_whose_plan_has_no_cuts_is_paused_in_the_transfers_that_it_is_in(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 waits for what rank 0, which was told to stop, has not sent: nothing moves, and no hang is told."""
    feed, go_on = Decoder.embed, threading.Event()

    def late(decoder: Decoder, *given: Any) -> Any:
        assert go_on.wait(60)
        return feed(decoder, *given)

    monkeypatch.setattr(Decoder, "embed", late)
    run = session.prefill(IDS, chunk_size=4, schedule="batched", unsafe=True)
    wait_for(lambda: any(any(stand.started) for stand in run.standing().stands), "a rank is in an op")
    run.pause()
    go_on.set()
    wait_for(lambda: run.standing().state == "paused", "it stands")
    assert any(any(stand.started) for stand in run.standing().stands), "in a transfer"
    assert run.wait(60).state == "paused"
    run.resume()
    with pytest.raises(Hung, match="deadlock"):
        run.wait(60)
    with pytest.raises(Hung, match="deadlock"):
        run.pause()
    assert run.standing().state == "hung", "a pause mends no deadlock"


def test_decode_of_a_plan_without_cuts_runs_prefill_first_or_says_why_it_hangs(session: Session) -> None:
    run = session.prefill(IDS, chunk_size=4, schedule="batched", unsafe=True, paused=True)
    with pytest.raises(Hung, match="deadlock"):
        run.decode(2)
    assert (run.standing().state, run.tokens) == ("hung", [])


def test_what_needs_no_mending_is_refused(session: Session) -> None:
    run = session.prefill(IDS, chunk_size=4, paused=True)
    with pytest.raises(NotPossible, match="paused"):
        run.mend()


def test_a_new_run_has_nothing_of_the_old_one_s_trouble(session: Session) -> None:
    old = session.prefill(IDS, chunk_size=4, schedule="batched", unsafe=True)
    wait_for(lambda: old.standing().state == "hung", "it hangs")
    session.recover()
    assert (old.standing().state, old.standing().remedy) == ("failed", RESTART)
    new = session.prefill(IDS, chunk_size=4, paused=True)
    assert (new.standing().state, new.standing().message, new.standing().remedy) == ("paused", "", "")
    assert (old.standing().remedy, old.standing().severity) == ("", Severity.NOTE)
