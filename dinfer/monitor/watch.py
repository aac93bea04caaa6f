"""HangWatch: notices that a run does not move, and says why. What it does while nothing is wrong is cheap.

When a lane has not moved for a second, it judges by what is known already. Only if that raises a suspicion does it ask
the ranks where their threads stand, and only a suspicion that their answers confirm becomes a verdict.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from dinfer.cluster.ranks import AskableRanks
from dinfer.job import Job
from dinfer.monitor.signs import HangEvidence, Track, signs_of
from dinfer.monitor.stacks import Spied, Stacks, gather
from dinfer.plan.graph import Graph
from dinfer.verdict.judge import explain
from dinfer.verdict.signs import KvBytes, Signs
from dinfer.verdict.verdict import Verdict

LOOK_S = 0.1
JUDGE_S = 0.25

ASK_S = 1.0
"""How old stacks may be. Whether CPU time moves takes as long to tell."""

OPEN_S = 0.9
"""A lane that has waited less than this is not judged."""

SUSPECT_AHEAD_S = 1.5
"""So long before a lane counts as stuck, ranks are asked for their stacks: whether CPU time moves takes a second."""

AHEAD_S, LEAST_AHEAD_S = 0.5, 0.4
"""A lane counts as stuck after 5 s, by when the verdict is due. So it is judged as it will be this much later; a little
less where py-spy is about to say more."""

QUIET = ("moving", "done", "paused", "held")
"""Kinds that are reported only when asked for."""

ASKS = 2
"""So often a mute rank's stacks are asked for before a verdict is reported without them."""

SPIED = ("stuck in C", "stopped")
"""Kinds about which py-spy knows more than the rank itself. It stops the process that it reads, so no other is read."""


class HangWatch:
    """Of one run. `look` is called often. `look` and `judge` may be called on any thread, also on one that holds
    `ranks.changed`; but not `judge(is_moving=True)`, which waits for answers."""

    def __init__(self, job: Job, ranks: AskableRanks) -> None:
        self._ranks, self._plan = ranks, job.plan
        spec, dtype = job.spec, job.config.dtype
        itemsize = {"float32": 4, "float64": 8}.get(spec.dtype if dtype == "auto" else dtype, 2)
        self._sizes = KvBytes(2 * spec.kv_heads * spec.head_dim * itemsize, spec.hidden_size * itemsize)
        self._graph: Graph | None = None
        self._track = Track(len(ranks.ranks))
        self._asked: dict[int, Stacks] = {}
        self._stacks: dict[int, Stacks] = {}
        """what they have answered, and what py-spy has seen"""
        self._spied = Spied(ranks)
        self._asking = threading.Lock()
        """Held by whoever asks the ranks, and so waits for `ranks.changed`. Who may hold that must not wait here."""
        self._spied_then = frozenset[int]()
        """whom py-spy had seen when `found` was reported"""
        self._looked_at = self._judged_at = self._asked_at = 0.0
        self._asks = 0
        self._decoding_since: float | None = None
        """Since when tokens are to be made. Before, the run waited for its user."""
        self.plan_ids: Mapping[int, int] = {}
        self.found: Verdict | None = None
        """The verdict that was reported and still holds."""

    def look(self, *, decoding: bool, ended: Mapping[int, str]) -> None:
        """Judge the run if it does not move; sets `found`. `ended`: how processes have ended, by rank."""
        now = time.monotonic()
        if now - self._looked_at < LOOK_S:
            return
        self._looked_at = now
        since = self._decodes_since(now) if decoding else now
        with self._ranks.changed:
            self._track.look(self._ranks.ranks, now)
            quiet = [now - max(state.progressed, since) for state in self._ranks.ranks]
        if max(self._track.longest_s(now), *quiet, 0.0) < OPEN_S:
            self._forget()
        elif now - self._judged_at >= JUDGE_S:
            self._judged_at = now
            self._look_closely(decoding, ended)

    def rest(self, *, decoding: bool) -> None:
        """Call this instead of `look` while the run is not meant to move, or cannot."""
        self.found = None
        if not decoding:
            self._decoding_since = None

    def judge(self, *, decoding: bool, ended: Mapping[int, str], is_moving: bool) -> Verdict:
        """The verdict at this moment. `is_moving`: the run is meant to move, so ask the ranks."""
        if self._asking.acquire(blocking=is_moving):
            try:
                if is_moving:
                    self._ask(ended)
                self._spy(self._explain(decoding, ended, SUSPECT_AHEAD_S))
            finally:
                self._asking.release()
        fresh, found = self._explain(decoding, ended, AHEAD_S, tell_slow=True), self.found
        is_same = found and (found.kind, found.ranks) == (fresh.kind, fresh.ranks)
        return replace(fresh, sentence=found.sentence) if found and is_same else fresh

    def evidence(self, *, decoding: bool, ended: Mapping[int, str], sentence: str) -> HangEvidence:
        """What is known now, to be judged again later; `sentence`: that of the verdict that it has led to."""
        return HangEvidence(
            tuple(self._signs(decoding, ended)), self._sizes, self._texts(), AHEAD_S, sentence
        )

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
        is_read = self._spied.looks_at(suspicion.ranks)
        verdict, found = self._explain(decoding, ended, LEAST_AHEAD_S if is_read else AHEAD_S), self.found
        if verdict.kind in QUIET:
            self.found = None
        elif self._is_known(verdict.ranks):
            is_same = found and (found.kind, found.ranks) == (verdict.kind, verdict.ranks)
            if not is_same or self._spied_then != self._spied.ranks:  # or py-spy has seen more at last
                self.found, self._spied_then = verdict, self._spied.ranks

    def _ask(self, ended: Mapping[int, str]) -> None:
        """Ask all living ranks where their threads stand."""
        states = self._ranks.ranks
        living = [rank for rank, state in enumerate(states) if rank not in ended and state.stopped is None]
        seen = self._spied.looks_at(living)  # they cannot answer meanwhile
        found = gather(self._ranks, [rank for rank in living if rank not in seen])
        for rank in found.keys() & self._asked.keys():  # a dump that does not come this time has come before
            if found[rank].answers is self._asked[rank].answers is False and not found[rank].text:
                found[rank] = self._asked[rank]
        self._asked = {rank: its for rank, its in self._asked.items() if rank in seen} | found
        self._stacks = self._spied.added_to(self._asked)
        self._asked_at = time.monotonic()
        self._asks += 1
        process_s = time.process_time()
        with self._ranks.changed:
            for rank, stacks in found.items():
                if stacks.cpu_s is not None and states[rank].cpu_s is None:
                    self._track.add_cpu(rank, self._asked_at, stacks.cpu_s, process_s)

    def _spy(self, suspicion: Verdict) -> None:
        """Have py-spy read the suspects that nothing else can see into, and take what it has seen."""
        mute = {rank for rank, its in self._asked.items() if its.answers is False}
        self._spied.begin(rank for rank in suspicion.ranks if suspicion.kind in SPIED or rank in mute)
        if self._spied.collect():
            self._stacks = self._spied.added_to(self._asked)

    def _explain(
        self, decoding: bool, ended: Mapping[int, str], ahead_s: float, *, tell_slow: bool = False
    ) -> Verdict:
        self._graph = self._graph or Graph(self._plan)
        signs, texts = self._signs(decoding, ended), self._texts()
        return explain(
            self._plan, signs, self._sizes, texts, graph=self._graph, ahead_s=ahead_s, tell_slow=tell_slow
        )

    def _signs(self, decoding: bool, ended: Mapping[int, str]) -> Sequence[Signs]:
        with self._ranks.changed:
            now = time.monotonic()
            self._track.look(self._ranks.ranks, now)  # what has moved since the ranks were asked is not stuck
            signs = []
            for rank, state in enumerate(self._ranks.ranks):
                end, stacks = ended.get(rank, ""), self._stacks.get(rank, Stacks())
                signs.append(signs_of(self._plan, rank, state, end, self._track, stacks, now))
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
        """Whether enough is known of these ranks to report a verdict: whether their CPU time moves, where they tell it;
        and the line at which each stands that does not answer, unless that cannot be found out."""
        unseen = []
        for rank in ranks:
            stacks = self._stacks.get(rank, Stacks())
            if stacks.cpu_s is not None and self._track.cpu_moves(rank) is None:
                return False
            if stacks.answers is False and not stacks.frames:
                unseen.append(rank)
        return not unseen or (self._asks >= ASKS and not self._spied.looks_at(unseen))

    def _forget(self) -> None:
        self.found = None
        self._asked = self._stacks = {}
        self._asks = 0
        self._spied.forget()
