"""The evidence of one moment about other people's code, and what follows from it: verdict, findings, ranks.

`folders` gathers it from folders that watched processes write to, `given` from what a user gives.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from dinfer.trace.events import Event, Group
from dinfer.trace.findings import Findings, RankFinding, with_findings
from dinfer.trace.flight import groups_of
from dinfer.trace.trace import LOOKED, Trace
from dinfer.verdict.completed import OpFinding, findings_of_events
from dinfer.verdict.kept import kept_waits
from dinfer.verdict.op_text import full_text
from dinfer.verdict.recorded import explain_events
from dinfer.verdict.recorded_waits import UNREAD
from dinfer.verdict.signs import Signs
from dinfer.verdict.verdict import Verdict
from dinfer.verdict.where import seconds_text
from dinfer.watch.probe.records import WatchedProcess
from dinfer.watching.kv import WatchedKv
from dinfer.watching.signs import as_plain, stack_text

SIGNS, HOSTS, NOW, JOB = "signs", "hosts", LOOKED, "job"
"""keys of a trace's `about`: what was known of the ranks when it ended, where they ran, when that was, and of which of
several jobs it is"""

STUCK_S = 3.5
"""what should go on by itself, and has not for so long, is stuck: a verdict is to come within 5 s"""


@dataclass(frozen=True)
class Evidence:
    """All that is known of one job at one moment. `processes`: of each rank, where these were watched; `now_ns`: when
    the ranks were looked at, None if the record is all there is; `kv`: what was read of it. `job`: which one, "" where
    there is one only; `key`: the same at each look; `notes`: what could not be read, and what else to know of it."""

    trace: Trace
    signs: Mapping[int, Signs] = field(default_factory=dict)
    now_ns: int | None = None
    processes: Mapping[int, WatchedProcess] = field(default_factory=dict)
    kv: WatchedKv = field(default_factory=WatchedKv)
    job: str = ""
    key: str = ""
    notes: tuple[str, ...] = ()

    @classmethod
    def none(cls) -> "Evidence":
        """Nothing is known yet."""
        return cls(Trace.merge([]))

    def with_older(self, whole: "Evidence") -> "Evidence":
        """This one, with the ops that a look at the last ones has left out, from a look at all."""
        mine = {(event.rank, event.index) for event in self.trace.events}
        last = {event.rank: event.index or 0 for event in sorted(self.trace.events, key=_index)}
        older = [
            event
            for event in whole.trace.events
            if (event.rank, event.index) not in mine and _index(event) < last.get(event.rank, 0)
        ]
        if not older:
            return self
        return replace(self, trace=Trace.merge([(*older, *self.trace.events)], **self.trace.about))

    @cached_property
    def groups(self) -> dict[str, Group]:
        return groups_of(self.trace)

    @cached_property
    def verdict(self) -> Verdict:
        if not self.ranks:
            return Verdict("moving", "no rank has recorded an op yet")
        found = explain_events(self.trace.events, self.signs, self.now_ns, self.groups, STUCK_S)
        if self.job:
            found = replace(found, sentence=f"{self.job}: {found.sentence}")
        stacks = {rank: self.stack(rank) for rank in found.ranks}
        return replace(found, stacks={rank: text for rank, text in stacks.items() if text})

    @cached_property
    def op_findings(self) -> list[OpFinding]:
        ended = [rank for rank, its in self.signs.items() if its.phase == "done"]
        return findings_of_events(self.trace.events, self.groups, ended)

    @cached_property
    def findings(self) -> list[OpFinding]:
        return [*self.op_findings, *self.kv.diff()]

    @property
    def problem(self) -> Verdict | None:
        """The verdict, if the run will not go on by itself or did not come to its end."""
        return self.verdict if self.verdict.is_hung else None

    def stack(self, rank: int) -> str:
        process = self.processes.get(rank)
        return stack_text(process.stacks[-1]) if process and process.stacks else ""

    # -- ranks

    def where(self, rank: int) -> str:
        """What a rank does, in one line."""
        signs = self.signs.get(rank, Signs())
        if signs.raised and not signs.raised.secondary and not signs.raised.handled:
            return f"raised {signs.raised.message}"
        if signs.ended or signs.phase == "done":
            return signs.ended or signs.left
        if signs.is_stopped:
            return "is stopped"
        if signs.phase == UNREAD:
            return "left a record that cannot be read"
        event = self.at(rank)
        if event is not None and not event.end:
            return f"in {full_text(event)}{self._since(event.start)}"
        doing = "computes" if signs.cpu_moves else "is between ops"
        if not signs.cpu_moves and (waits_for := signs.outside or signs.child):
            doing = f"waits for {waits_for}"
        frame = next(iter(signs.frames.values()), None)
        at = f", at {frame}" if frame else ""
        return f"{doing}{self._since(event.end) if event else ''}{at}"

    def _since(self, at: int) -> str:
        return f", for {seconds_text((self.now_ns - at) / 1e9)}" if self.now_ns else ""

    def at(self, rank: int) -> Event | None:
        """The op that a rank waits in, else the last that it has ended."""
        mine = [event for event in self.trace.events if event.rank == rank]
        waiting = (e for e in mine if not e.end and (not e.call or not e.call.is_async or e.call.is_waited))
        return next(waiting, max(mine, key=lambda event: event.end, default=None))

    @property
    def rank_lines(self) -> list[str]:
        """What each rank does, a line each."""
        return [f"rank {rank}: {self.where(rank)}" for rank in self.ranks]

    @property
    def ranks(self) -> list[int]:
        known = {rank for group in self.groups.values() for rank in group.ranks}
        return sorted({*self.signs, *self.trace.ranks, *known})

    def kept(self, verdict: Verdict | None, *, state: str = "") -> Trace:
        """The trace, with what else is known in its `about`, so that it can be explained again and makes a report."""
        about = {**self.trace.about, SIGNS: as_plain(self.signs), NOW: self.now_ns}
        if self.job:
            about[JOB] = self.job
        hosts = {str(rank): process.host for rank, process in self.processes.items()}
        about[HOSTS] = about.get(HOSTS, hosts) or hosts
        made = Findings(
            made=time.strftime("%Y-%m-%d %H:%M:%S"),
            state=state or ("hung" if verdict else "done"),
            failure=str(replace(verdict, stacks={})) if verdict else "",  # stacks are those of the ranks
            ranks=tuple(
                RankFinding(rank, host=about[HOSTS].get(str(rank), ""), log=self.stack(rank))
                for rank in self.ranks
            ),
            warnings=tuple(one.text for one in self.findings),
            waits=kept_waits(verdict) if verdict else None,
        )
        return with_findings(replace(self.trace, about=about), made)


def _index(event: Event) -> int:
    return event.index or 0
