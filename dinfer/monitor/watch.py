"""Watch: looks after a run that moves, and says why it does not. All that runs while nothing is wrong is cheap.

A lane that has not moved for a second is looked at with what is known; only if that gives a reason to suspect somebody
are the ranks asked where their threads stand, and only a suspicion that this confirms is told.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from dinfer.cluster.ranks import RankStates
from dinfer.job import Job
from dinfer.monitor.signs import HangEvidence, Track, signs_of, sizes_of
from dinfer.monitor.stacks import Spied, Stacks, gather
from dinfer.plan.graph import Graph
from dinfer.verdict.judge import explain
from dinfer.verdict.signs import Signs
from dinfer.verdict.verdict import Verdict

LOOK_S = 0.1

JUDGE_S = 0.25

ASK_S = 1.0
"""how old stacks may be: CPU time, too, takes so long to tell"""

OPEN_S = 0.9
"""a lane that waits less than this is not looked at"""

SUSPECT_AHEAD_S = 1.5
"""How long before something counts as stuck the ranks are asked for their stacks: CPU time takes a second to tell."""

AHEAD_S, LEAST_AHEAD_S = 0.5, 0.4
"""A verdict is to be out within 5 s, which is just when a lane becomes stuck: it is judged as it will be then; a little
later where py-spy is about to say more."""

QUIET = ("moving", "done", "paused", "held")
"""kinds that are not told unasked; who is slow in a run that moves is not even looked for"""

ASKS = 2
"""So often a mute rank's stacks are asked for before a verdict is told without them."""

SPIED = ("stuck in C", "stopped")
"""kinds of which py-spy knows more than the rank itself: nobody else is stopped for its look"""


class HangWatch:
    """Of one run. `look` is called often; it and `judge` on any thread, also one that holds `line.changed`, but for a
    `judge` of a run that is meant to move."""

    def __init__(self, job: Job, line: RankStates) -> None:
        self._job, self._line, self._plan = job, line, job.plan
        self._sizes = sizes_of(job)
        self._graph: Graph | None = None
        self._track = Track(len(line.ranks))
        self._asked: dict[int, Stacks] = {}
        self._stacks: dict[int, Stacks] = {}
        """what they have said, and what was seen besides"""
        self._spied = Spied(line)
        self._asking = threading.Lock()
        """Held by who asks the ranks, and so waits for `line.changed`: whoever may hold that must not wait for this."""
        self._told_with = frozenset[int]()
        self._looked_at = self._judged_at = self._asked_at = 0.0
        self._asks = 0
        self._decoding_since: float | None = None
        """as far as it was looked; before, no token was to be made, and it was the user who took their time"""
        self.plan_ids: Mapping[int, int] = {}
        self.found: Verdict | None = None
        """what has been told and holds"""

    def look(self, *, decoding: bool, ended: Mapping[int, str]) -> None:
        """See whether there is something to tell; `found` is that."""
        now = time.monotonic()
        if now - self._looked_at < LOOK_S:
            return
        self._looked_at = now
        since = self._decodes_since(now) if decoding else now
        with self._line.changed:
            self._track.look(self._line.ranks, now)
            quiet = [now - max(state.progressed, since) for state in self._line.ranks]
        if max(self._track.longest_s(now), *quiet, 0.0) < OPEN_S:
            self._forget()
        elif now - self._judged_at >= JUDGE_S:
            self._judged_at = now
            self._look_closely(decoding, ended)

    def rest(self, *, decoding: bool) -> None:
        """The run is not meant to move, or cannot."""
        self.found = None
        if not decoding:
            self._decoding_since = None

    def judge(self, *, decoding: bool, ended: Mapping[int, str], is_moving: bool) -> Verdict:
        """The verdict as things are now. `is_moving`: the run is meant to move, so that the ranks are to be asked."""
        if self._asking.acquire(blocking=is_moving):
            try:
                if is_moving:
                    self._ask(ended)
                self._spy(self._explain(decoding, ended, SUSPECT_AHEAD_S))
            finally:
                self._asking.release()
        fresh, told = self._explain(decoding, ended, AHEAD_S, tell_slow=True), self.found
        same = told and (told.kind, told.ranks) == (fresh.kind, fresh.ranks)
        return replace(fresh, sentence=told.sentence) if told and same else fresh

    def evidence(self, *, decoding: bool, ended: Mapping[int, str], told: str) -> HangEvidence:
        """What is known now, to be judged elsewhere; `told`: the sentence that it has led to."""
        return HangEvidence(tuple(self._signs(decoding, ended)), self._sizes, self._texts(), AHEAD_S, told)

    def _look_closely(self, decoding: bool, ended: Mapping[int, str]) -> None:
        suspicion = self._explain(decoding, ended, SUSPECT_AHEAD_S)
        if suspicion.kind in QUIET:
            self._forget()
            return
        if self._asking.acquire(blocking=False):
            try:
                if time.monotonic() - self._asked_at >= ASK_S:
                    self._ask(ended)
                self._spy(suspicion)
            finally:
                self._asking.release()
        is_seen = self._spied.looks_at(suspicion.ranks)
        verdict = self._explain(decoding, ended, LEAST_AHEAD_S if is_seen else AHEAD_S)
        if verdict.kind in QUIET:
            self.found = None
        elif self._is_known(verdict.ranks) and self._is_seen(verdict.ranks) and not self._is_told(verdict):
            self.found, self._told_with = verdict, self._spied.ranks

    def _ask(self, ended: Mapping[int, str]) -> None:
        """Where the threads of all ranks stand that can say so, or be dumped."""
        states = self._line.ranks
        living = [rank for rank, state in enumerate(states) if rank not in ended and state.stopped is None]
        seen = self._spied.looks_at(living)  # they cannot answer meanwhile
        found = gather(self._line, [rank for rank in living if rank not in seen])
        for rank in found.keys() & self._asked.keys():  # a dump that does not come this time has come before
            if found[rank].answers is self._asked[rank].answers is False and not found[rank].text:
                found[rank] = self._asked[rank]
        self._asked = {rank: its for rank, its in self._asked.items() if rank in seen} | found
        self._stacks = self._spied.added_to(self._asked)
        self._asked_at = time.monotonic()
        self._asks += 1
        process_s = time.process_time()
        with self._line.changed:
            for rank, stacks in found.items():
                if stacks.cpu_s is not None and states[rank].cpu_s is None:
                    self._track.note_cpu(rank, self._asked_at, stacks.cpu_s, process_s)

    def _spy(self, suspicion: Verdict) -> None:
        """Have py-spy look at who can be seen by nothing else, and take what it has seen."""
        mute = {rank for rank, its in self._asked.items() if its.answers is False}
        self._spied.begin(rank for rank in suspicion.ranks if suspicion.kind in SPIED or rank in mute)
        if self._spied.collect():
            self._stacks = self._spied.added_to(self._asked)

    def _explain(
        self, decoding: bool, ended: Mapping[int, str], ahead_s: float, *, tell_slow: bool = False
    ) -> Verdict:
        self._graph = self._graph or Graph(self._plan)
        return explain(
            self._plan,
            self._signs(decoding, ended),
            self._sizes,
            self._texts(),
            graph=self._graph,
            ahead_s=ahead_s,
            tell_slow=tell_slow,
        )

    def _signs(self, decoding: bool, ended: Mapping[int, str]) -> Sequence[Signs]:
        with self._line.changed:
            now = time.monotonic()
            self._track.look(self._line.ranks, now)  # what has moved while ranks were asked is not stuck
            signs = signs_of(self._plan, self._line.ranks, ended, self._track, self._stacks, now)
        if decoding:
            longest = now - self._decodes_since(now)
            signs = [replace(its, quiet_s=min(its.quiet_s, longest)) for its in signs]
        else:  # between two calls of decode nobody is to make a token
            signs = [replace(its, phase="done") if its.phase == "decode" else its for its in signs]
        if len(set(self.plan_ids.values())) > 1:
            signs = [replace(its, plan_id=self.plan_ids.get(rank)) for rank, its in enumerate(signs)]
        return signs

    def _decodes_since(self, now: float) -> float:
        if self._decoding_since is None:
            self._decoding_since = now
        return self._decoding_since

    def _texts(self) -> dict[int, str]:
        return {rank: its.text for rank, its in self._stacks.items() if its.text}

    def _is_known(self, ranks: Sequence[int]) -> bool:
        """Whether the CPU time of these has been heard of for long enough to tell whether it moves, if it can be."""
        return not any(
            self._track.cpu_moves(rank) is None
            and (stacks := self._stacks.get(rank))
            and stacks.cpu_s is not None
            for rank in ranks
        )

    def _is_seen(self, ranks: Sequence[int]) -> bool:
        """Whether the line is known at which each of these stands that does not answer, or cannot be found out: a
        verdict waits for stacks that are on their way."""
        unseen = [
            rank
            for rank in ranks
            if (stacks := self._stacks.get(rank)) and stacks.answers is False and not stacks.frames
        ]
        return not unseen or (self._asks >= ASKS and not self._spied.looks_at(unseen))

    def _is_told(self, verdict: Verdict) -> bool:
        """It is told again when py-spy, which may take long, has seen more since."""
        found = self.found
        is_same = found is not None and (found.kind, found.ranks) == (verdict.kind, verdict.ranks)
        return is_same and self._told_with == self._spied.ranks

    def _forget(self) -> None:
        self.found = None
        self._asked = self._stacks = {}
        self._asks = 0
        self._spied.forget()
