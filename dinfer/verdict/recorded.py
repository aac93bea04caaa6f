"""Why a run of other people's code does not move, from its events alone: the verdict, and how it is told.

`recorded_waits` makes the graph of who waits for whom, `judge` judges it. What has ended and is wrong all the same is
in `completed`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from dinfer.display import listed
from dinfer.trace.events import COLLECTIVES, Event, Group
from dinfer.verdict.judge import TERMS, judge
from dinfer.verdict.left_out import left_out
from dinfer.verdict.matching import MAKING, MESSAGES, RecordedOp
from dinfer.verdict.op_text import (
    full_text,
    left_out_text,
    merged_lines,
    ranks_sentences,
)
from dinfer.verdict.recorded_waits import NOBODY, RecordedEvents
from dinfer.verdict.signs import Raised, Signs
from dinfer.verdict.verdict import Verdict
from dinfer.verdict.waits import STUCK_S
from dinfer.verdict.where import ranks_text

MAIN = "MainThread"


def explain_events(
    events: Iterable[Event],
    signs: Mapping[int, Signs] | None = None,
    now: int | None = None,
    groups: Mapping[str, Group] | None = None,
    stuck_s: float = STUCK_S,
) -> Verdict:
    """Why a run with these events, open ones among them, does not move.

    `signs`: by rank, what else is known; what they say of lanes is ignored. `now`: nanoseconds on the events' clock;
    None: the run has not moved since. `groups`: by the key that calls name, the process groups. `stuck_s`: what should
    go on by itself, and has not for so many seconds, counts as stuck.
    """
    made = RecordedEvents(events, signs or {}, now, groups or {}, stuck_s)
    return RecordedVerdict(made).told(judge(made.waits()))


class RecordedVerdict:
    """Tells what was judged of a run's events."""

    def __init__(self, events: RecordedEvents) -> None:
        self._events = events

    def told(self, verdict: Verdict) -> Verdict:
        """The verdict with all ranks of that kind, the one to blame first, and with the line of a rank that waits."""
        verdict = replace(verdict, lines=merged_lines(verdict.lines))
        if not verdict.is_hung:
            return verdict
        if verdict.kind == "cycle" and (missing := next(left_out(self._events.ops), None)) is not None:
            # What was left out earlier is why the last ones wait.
            blocked = tuple(rank for rank in (*verdict.ranks, *verdict.blocked) if rank != missing.rank)
            sentence = f"missing {missing.instead.event.kind}: {left_out_text(*missing)}"
            return replace(verdict, sentence=sentence, ranks=(missing.rank,), blocked=blocked)
        if verdict.kind not in ("exception", "dead") and (handled := self._handled_by(verdict)) is not None:
            return self._not_gone_on(verdict, handled)
        if verdict.kind == "cycle" and (astray := self._misdirected(verdict)) is not None:
            return self._to_another(verdict, *astray)
        if verdict.kind == "cycle":
            # Who is in a collective has left out, or has no more, messages that the others wait for; who makes a group
            # does so alone.
            leader = min((_precedence(self._events.open[w.node].event), w.node.rank) for w in verdict.chain)[
                1
            ]
            others = (rank for rank in verdict.ranks if rank != leader)
            return replace(verdict, ranks=(leader, *others))
        roots: dict[int, str] = {}
        for wait in (*verdict.chain[-1:], *verdict.waits.values()):
            if wait.root and wait.root.kind == verdict.kind:
                roots.setdefault(wait.root.rank, wait.root.text)
        alike = [rank for rank in roots if rank not in verdict.ranks]
        blocked = tuple(
            rank
            for rank in verdict.blocked
            if rank not in alike and not self._events.signs.get(rank, NOBODY).ended  # who died waits no more
        )
        found = replace(verdict, ranks=(*verdict.ranks, *alike), blocked=blocked)
        if verdict.kind == "stalled link":  # its text is a sentence by itself
            texts = [verdict.sentence, *dict.fromkeys(roots[rank] for rank in alike)]
            return replace(found, sentence=listed(list(dict.fromkeys(texts))))
        first, *more = ranks_sentences({rank: roots[rank] for rank in found.ranks})
        term = f"{TERMS[verdict.kind]}: " if verdict.kind in TERMS else ""
        sentence = f"{term}{first}"
        if blocked:
            sentence += (
                f"; {ranks_text(blocked)} wait{'s' * (len(blocked) == 1)} for {'it' if not alike else 'them'}"
            )
        if len(verdict.chain) > 1 and (waiting := self._events.open.get(verdict.chain[-2].node)):
            rank = waiting.event.rank
            if waiting.event.call and rank in blocked and full_text(waiting.event) not in sentence:
                sentence += f": rank {rank} is in {full_text(waiting.event)}"
        return replace(found, sentence=listed([sentence, *more]))

    def _misdirected(self, verdict: Verdict) -> tuple[RecordedOp, RecordedOp] | None:
        """Of a cycle, the message with a rank that has gone on to a collective, the first on that link, while a third
        rank waits for just such a message: that rank is meant. The op and that of the third rank. A rank that sends to
        one after the other, of which one has left out its recv, looks the same: so others have to show who is meant."""
        of_cycle = [self._events.open[wait.node] for wait in verdict.chain]
        in_collective = {op.event.rank for op in of_cycle if op.event.kind in COLLECTIVES}
        for op in of_cycle:
            event, call = op.event, op.event.call
            if event.kind not in MESSAGES or event.peer not in in_collective or not call or op.number:
                continue
            if not self._events.ops.is_missing(op, event.peer, receives=event.kind == "send"):
                continue
            for other in self._events.open.values():
                wants = other.event
                is_end = {wants.kind, event.kind} == MESSAGES and wants.peer == event.rank
                is_like = wants.call and wants.call.group == call.group and wants.bytes == event.bytes
                if not is_end or not is_like or wants.rank == event.peer or self._events.ops.other_end(other):
                    continue
                if self._is_shown(op, wants.rank):
                    return op, other
        return None

    def _is_shown(self, op: RecordedOp, third: int) -> bool:
        """Whether messages since the last collective show that one with that third rank was meant: the rank beside has
        had its part, both ways and as many ranks further as the third one is, and the op is its rank's first of the
        kind."""
        event, ranks = op.event, self._events.ops.ranks_of(op)
        if event.peer not in ranks or not {event.rank, third} <= {*ranks}:
            return False
        beside, step = ranks.index(event.peer), ranks.index(third) - ranks.index(event.rank)
        to, source = ranks[(beside + step) % len(ranks)], ranks[(beside - step) % len(ranks)]
        kind, opposite = (event.kind, "recv" if event.kind == "send" else "send")
        had = self._since_collective(event.peer)
        mine = {what for what, _ in self._since_collective(event.rank)}
        return {(kind, to), (opposite, source)} <= had and kind not in mine

    def _since_collective(self, rank: int) -> set[tuple[str, int | None]]:
        """Kind and peer of the messages that a rank has ended since its last collective that has ended."""
        found: set[tuple[str, int | None]] = set()
        for op in self._events.ops.by_rank[rank]:
            if op.is_open:
                continue
            if op.event.kind in COLLECTIVES:
                found.clear()
            elif op.event.kind in MESSAGES:
                found.add((op.event.kind, op.event.peer))
        return found

    def _to_another(self, verdict: Verdict, op: RecordedOp, wants: RecordedOp) -> Verdict:
        """The cycle, told by the message that goes to, or is to come from, another rank than the one that waits."""
        rank, third, beside = op.event.rank, wants.event.rank, op.event.peer
        verbs = ("received from it", "sent") if op.event.kind == "send" else ("sent to it", "received")
        sentence = (
            f"{TERMS['wrong peer']}: rank {rank} is in {full_text(op.event)}, and rank {beside} has not {verbs[0]}; "
            f"rank {third} is in {full_text(wants.event)}, which rank {rank} has not {verbs[1]}"
        )
        now = next((self._events.open[node].event for node in self._events.mine(beside or 0)), None)
        if now is not None:
            sentence += f"; rank {beside} is in {full_text(now)}"
        blocked = tuple(sorted({*verdict.ranks, *verdict.blocked, third} - {rank}))
        return replace(
            verdict, kind="wrong peer", sentence=sentence, ranks=(rank,), peer=beside, blocked=blocked
        )

    def _handled_by(self, verdict: Verdict) -> int | None:
        """Of the ranks of a hang, the first that has caught an exception and has not gone on since."""
        of_hang = (*verdict.ranks, *verdict.blocked)
        return next((rank for rank in of_hang if self._caught(rank)), None)

    def _caught(self, rank: int) -> Raised | None:
        raised = self._events.signs.get(rank, NOBODY).raised
        return raised if raised and raised.handled and not raised.secondary else None

    def _not_gone_on(self, verdict: Verdict, rank: int) -> Verdict:
        """The hang, told by the exception that led to it."""
        raised = self._caught(rank)
        assert raised
        where = f" at {raised.op}" if raised.op else ""
        thread = f" in thread {raised.lane}" if raised.lane not in ("", MAIN) else ""
        mine = self._events.mine(rank)
        now = (
            f"it now waits in {full_text(self._events.open[mine[0]].event)}"
            if mine
            else "it has not gone on since"
        )
        blocked = tuple(sorted({*verdict.ranks, *verdict.blocked} - {rank}))
        sentence = f"rank {rank} raised {raised.message}{where}{thread} and handled it; {now}"
        if blocked:
            sentence += f"; {ranks_text(blocked)} wait{'s' * (len(blocked) == 1)} for it"
            others = (self._events.open[node] for other in blocked for node in self._events.mine(other))
            if waiting := next(others, None):
                sentence += f": rank {waiting.event.rank} is in {full_text(waiting.event)}"
        return replace(
            verdict, kind="exception", sentence=sentence, ranks=(rank,), peer=None, blocked=blocked
        )


def _precedence(event: Event) -> int:
    """Of the ranks in a cycle, whose op is to be looked at first."""
    return 0 if event.kind in MAKING else 1 if event.kind in COLLECTIVES else 2
