"""Watches a run's ranks through their link, until all have delivered their result or one cannot go on.

If the run does not move, the reason is told long before its timeout ends it.
"""

import time
from collections.abc import Callable, Sequence

from dinfer.cluster.link import Link
from dinfer.cluster.ranks import LOST
from dinfer.job import Job
from dinfer.messages import RunChosen
from dinfer.monitor import watch as hangs
from dinfer.run.failure import SILENT, RankFailed, broken, ending, silence_limit, standstill
from dinfer.run.measurement import chosen_job, measured, run_to_measure
from dinfer.verdict.verdict import Verdict

GRACE_S = 1.0
"""How long to wait for the cause once a rank has failed: what it did to the others may be reported first."""

POLL_S = 0.05


class ProcessWatch:
    """`exits()`: by rank, the exit status of a process that has ended, else None. Who did not start the ranks leaves it
    out, and learns of their end through their watchers. `job`: the run; once what is `auto` is chosen, with that."""

    def __init__(
        self,
        job: Job,
        link: Link,
        exits: Callable[[], Sequence[int | None]] | None = None,
        on_text: Callable[[str], None] | None = None,
        while_looking: Callable[[], None] = lambda: None,
        on_hang: Callable[[Verdict], None] = lambda _: None,
        *,
        auto: Sequence[str] = (),
        on_chosen: Callable[[Job], None] = lambda _: None,
    ) -> None:
        """`on_hang` is called with why the run does not move, once that is known, and again if the reason changes.
        `auto`: the parameters to choose once the ranks have measured; then `on_chosen(job)` is called."""
        self.job, self._link, self._on_text, self._while_looking = job, link, on_text, while_looking
        self._auto, self._on_chosen = tuple(auto), on_chosen
        self._processes_ended = exits or self._lost
        self._hangs, self._on_hang = hangs.HangWatch(job, link), on_hang
        self._told: Verdict | None = None

    def look(self, seconds: float) -> bool:
        """Watch the ranks for that long; True once all have delivered their result.

        Raises RankFailed, with the cause first, when one has failed, died, or made no progress in time.
        """
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            with self._link.changed:
                self._link.changed.wait(min(left, POLL_S))
            self._while_looking()
            self._choose()
            finished = all(state.result for state in self._link.ranks)
            self._show_text()
            if finished:
                return True
            self.check()
            self._look_whether_it_hangs()
        return False

    def _choose(self) -> None:
        """Choose what is `auto`, once all ranks have measured, and tell them."""
        found = {n: state.measured for n, state in enumerate(self._link.ranks) if state.measured}
        if not self._auto or len(found) < len(self._link.ranks):
            return
        auto, self._auto = self._auto, ()
        choice = chosen_job(self.job, measured(found, run_to_measure(self.job).tokens), auto)
        self.job, self._hangs = choice.job, hangs.HangWatch(choice.job, self._link)
        self._on_chosen(self.job)
        for rank in found:
            self._link.send(rank, RunChosen(choice.parameters, choice.plan))

    def _look_whether_it_hangs(self) -> None:
        if any(state.phase == "measuring" for state in self._link.ranks):
            return  # ranks that are timed say nothing, and stand still while another pair's link is
        ended = {
            rank: ending(code, self.job.config) for rank, code in enumerate(self._exits()) if code is not None
        }
        decoding = any(state.phase == "decode" for state in self._link.ranks)
        self._hangs.look(decoding=decoding, ended=ended)
        found, told = self._hangs.found, self._told
        if found and (told is None or found.sentence != told.sentence):
            self._on_hang(found)
        self._told = found

    def check(self) -> None:
        """Raises RankFailed if a rank has failed or died, or nothing has moved for too long."""
        if self._broken():
            with self._link.changed:
                self._link.changed.wait_for(self._all_told, GRACE_S)
        plan, ranks, config = self.job.plan, self._link.ranks, self.job.config
        if failure := broken(plan, ranks, self._exits(), config):
            raise RankFailed(failure.why)
        if standing := standstill(plan, ranks, config, time.monotonic(), self._told):
            raise RankFailed(standing)

    def explain(self) -> None:
        """When the launcher has told all to end: raises RankFailed if that is because a rank has failed."""
        with self._link.changed:
            self._link.changed.wait_for(self._broken, GRACE_S)
        self.check()

    def _show_text(self) -> None:
        """On the caller's thread, so that an output that is closed ends the run like any other error."""
        for piece in self._link.new_texts():
            if self._on_text:
                self._on_text(piece.text)

    def _lost(self) -> list[int | None]:
        now, limit = time.monotonic(), silence_limit(self.job.config.timeout)
        return [
            LOST if state.gone else SILENT if 0 < state.heard < now - limit else None
            for state in self._link.ranks
        ]

    def _broken(self) -> bool:
        """Whether a rank seems to have failed, as one does that has just ended well, while its result is on its way."""
        ended = any(code is not None for code in self._exits())
        return ended or any(state.error for state in self._link.ranks)

    def _all_told(self) -> bool:
        """Whether every rank has reported how it ended, or its watcher that it is gone."""
        return all(s.gone or s.error or s.result or s.told_to_end for s in self._link.ranks)

    def _exits(self) -> list[int | None]:
        """Exit status of each rank that has ended without a result and untold, as far as known; else None."""
        ranks = zip(self._link.ranks, self._processes_ended(), strict=True)
        return [None if state.result or state.told_to_end else code for state, code in ranks]
