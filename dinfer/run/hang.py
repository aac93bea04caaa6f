"""Whether a run can go on: failed ranks, silent ranks, hangs; and the verdict, which says why it does not move."""

import time
from collections.abc import Mapping
from dataclasses import replace

from dinfer.cluster.ranks import LOST
from dinfer.display import few
from dinfer.errors import ModelError
from dinfer.model.checkpoint import check_unchanged
from dinfer.monitor.signs import HangEvidence
from dinfer.monitor.watch import HangWatch
from dinfer.run.failure import RankFailed, broken, ending, is_final, silent_text
from dinfer.run.state import IN_OPS, RunState, with_remedy
from dinfer.run.stepper import NoProgress
from dinfer.verdict.verdict import Verdict
from dinfer.verdict.waits import HangKind

GRACE_S = 0.5
"""how long to wait for the cause of a failure, and for the last report of dead ranks"""

ABOUT_MESSAGES: tuple[HangKind, ...] = (
    "another plan", "other size", "wrong peer", "sent twice", "out of order", "never sent", "never received",
)  # fmt: skip
"""where an exception comes from a wrong message: the rank that raised it is not to blame"""

STUCK: tuple[HangKind, ...] = ("stuck in Python", "stuck in C", "stuck")
"""where a rank is in an op that does not end"""


class Hung(NoProgress):
    """The run cannot go on by itself. `verdict` says why, `remedy` is the call after which it can."""

    def __init__(self, verdict: Verdict, remedy: str = "") -> None:
        super().__init__(with_remedy(str(verdict), remedy))
        self.verdict = verdict


class Health:
    """The health of one run. `look` is called often, on the session's thread."""

    def __init__(self, state: RunState) -> None:
        self._state, self._ranks = state, state.ranks
        self.begin({})

    def begin(self, plan_ids: Mapping[int, int]) -> None:
        """The run begins, or begins again, with these ids of each rank's plan."""
        self._watch = HangWatch(self._state.job, self._ranks)
        self._watch.plan_ids = plan_ids
        self._broken_at: float | None = None

    def check(self) -> None:
        """Raises RankFailed where a rank has failed or does not answer, and Hung where the run hangs."""
        state, ranks = self._state, self._ranks
        if not state.failure and not state.closed:
            self._look_for_failure()
        if state.failure:
            raise RankFailed(with_remedy(state.failure, state.remedy))
        silent = [silent_text(state.plan, rank, ranks.ranks[rank]) for rank in ranks.silent()]
        state.note_silence("\n".join(few(silent)))
        if state.silence:
            raise RankFailed(with_remedy(state.silence, state.remedy))
        if (hang := state.hang) and hang.is_hung and self._is_moving():
            raise Hung(hang, state.remedy)

    def look(self) -> None:
        """See whether the run has stopped moving; `RunState.hang` is the verdict then."""
        if self._state.failure or self._state.silence or not self._is_moving():
            self._watch.rest(decoding=self._is_decoding())
        else:
            self._watch.look(decoding=self._is_decoding(), ended=self._ended())
        self._state.note_hang(self._watch.found)

    def verdict(self) -> Verdict:
        """Why the run does not move."""
        state = self._state
        found = self.judge(is_moving=not state.failure and self._is_moving())
        if state.closed and state.hang:  # as it was: of ranks that are another's nobody can judge anew
            found = state.hang
        known = (self._state.failure or self._state.silence).partition("\n")[0]
        return replace(found, sentence=known) if known else found

    def judge(self, *, is_moving: bool) -> Verdict:
        """The verdict by what is known; `is_moving`: the run is meant to move, so first ask the ranks for their
        stacks."""
        return self._watch.judge(decoding=self._is_decoding(), ended=self._ended(), is_moving=is_moving)

    def evidence(self) -> HangEvidence:
        """The evidence of which the verdict is made."""
        sentence = self.verdict().sentence
        return self._watch.evidence(decoding=self._is_decoding(), ended=self._ended(), sentence=sentence)

    def stuck_ranks(self) -> tuple[int, ...]:
        """Ranks in an op that does not end, according to the verdict."""
        hang = self._state.hang
        return hang.ranks if hang and hang.kind in STUCK else ()

    def left_blocked(self) -> bool:
        """Whether the run has left lanes blocked in transfers, or decode waiting, which no next run gets past: it
        has failed, it hangs, or it could not be paused. Not where a rank still computes: freeing lanes is not
        enough."""
        state = self._state
        if state.recovered or self.stuck_ranks():
            return False
        is_hung = state.hang is not None and state.hang.is_hung
        if state.failure or is_hung or any(rank.error for rank in state.ranks.ranks):
            return True
        stands = state.stands()
        begun = [
            lane.ops[position]
            for lanes, stand in zip(state.plan.lanes, stands, strict=False)
            for lane, position, started in zip(lanes, stand.positions, stand.started, strict=True)
            if started
        ]
        return bool(begun) and all(op.is_transfer for op in begun)

    def _is_moving(self) -> bool:
        return self._state.is_doing(IN_OPS)

    def _is_decoding(self) -> bool:
        """Whether the ranks make tokens, or did when the run failed: some may still wait for one."""
        return self._state.is_decoding or bool(self._state.failure and self._state.is_token_pending)

    def _look_for_failure(self) -> None:
        ranks, exits, now = self._ranks.ranks, self._ranks.exits(), time.monotonic()
        found = broken(self._state.plan, ranks, exits, self._state.job.config)
        self._broken_at = (self._broken_at or now) if found else None
        grace = 0.0 if is_final(ranks, exits) else GRACE_S
        if found and self._broken_at and now - self._broken_at >= grace:
            verdict = self.judge(is_moving=False)
            is_about = verdict.kind in ABOUT_MESSAGES
            why = f"{verdict.sentence}\n{found.why}" if is_about else found.why
            if LOST in exits:
                why += self._of_changed_files()
            self._state.fail(found._replace(why=why))

    def _of_changed_files(self) -> str:
        """Why ranks may have ended, as the end of a message, where the checkpoint's folder has changed; else ""."""
        job = self._state.job
        if not job.config.gpu_ids:
            try:
                check_unchanged(job.spec)
            except ModelError as error:
                return f"\n{error} (a file that becomes shorter while a rank computes with it ends that rank)"
        return ""

    def _ended(self) -> dict[int, str]:
        """How the processes of ranks have ended, or seem to have."""
        config = self._state.job.config
        found = {
            rank: ending(code, config) for rank, code in enumerate(self._ranks.exits()) if code is not None
        }
        for rank in self._ranks.silent():
            if self._ranks.ranks[rank].stopped is None:
                found.setdefault(rank, "does not answer: its host or the network to it may be down")
        return found
