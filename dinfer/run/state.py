"""What a run is doing, why, and what is known of it: one state with its reason, decided in one place under one lock."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from itertools import zip_longest
from typing import NamedTuple

from dinfer.cluster.lease import RankLease
from dinfer.display import listed
from dinfer.engine.board import DeviceMemory, Stand
from dinfer.engine.corruption import Corruption
from dinfer.engine.finite import NonFinite
from dinfer.job import Job
from dinfer.kv.difference import Diff
from dinfer.kv.ledger import BlockKey
from dinfer.kv.source import Selection
from dinfer.plan.cut import Cut
from dinfer.plan.plan import Lane, Plan
from dinfer.results import Where
from dinfer.run.failure import Breakage, Broken
from dinfer.run.log import CallLog, LoggedCall
from dinfer.run.nonfinite import NonFiniteBlocks
from dinfer.severity import Severity
from dinfer.trace.events import Event
from dinfer.trace.findings import MarkKind
from dinfer.verdict.verdict import Verdict
from dinfer.verdict.waits import HangKind
from dinfer.verdict.where import where_text

_RECENT = 500
"""events of a rank among which that of its last op is looked for"""


class State(StrEnum):
    """What the run as a whole is doing."""

    PREPARING = "preparing"
    """not all ranks have reported a position yet"""
    PAUSED = "paused"
    RUNNING = "running"
    DECODING = "decoding"
    DONE = "done"
    """prefill is complete"""
    HUNG = "hung"
    """it is meant to move, and will not go on by itself"""
    FAILED = "failed"
    """a rank has raised"""
    LOST = "lost"
    """a rank is gone or does not answer"""
    TAKEN_OVER = "taken over"
    """another session has joined the engines"""
    CLOSED = "closed"
    """another run or checkpoint has taken its place, or the session is closed"""

    def __repr__(self) -> str:
        """As of the plain word, which is what `run.standing().state` was and is for a user."""
        return repr(str(self))

    @property
    def severity(self) -> Severity:
        """How grave it is that a run is in this state."""
        if self in CANNOT_GO_ON:
            return Severity.ERROR
        return Severity.WARNING if self == State.TAKEN_OVER else Severity.NOTE


MOVING = (State.PREPARING, State.RUNNING, State.DECODING)
"""what lanes that move are doing"""

STANDING = (State.PAUSED, State.DONE)

CANNOT_GO_ON = (State.HUNG, State.FAILED, State.LOST)

IN_OPS = (State.RUNNING, State.DECODING)

AS_STATES: dict[HangKind, State] = {
    "dead": State.LOST,
    "stopped": State.LOST,
    "exception": State.FAILED,
}
"""what a run that hangs will be found to be once the ranks have told their end; others are HUNG"""

RESTART = "run.restart()"

RECOVER = f"session.recover(); {RESTART}"

RECOVERING = "session.recover() has begun: this run ends here"

RECOVERED = "the session has recovered since"

TAKE_BACK = "session = dinfer.connect(…, take=True)"
"""after which the other session is the one that has lost the engines; or go on with that one"""


class Mark(NamedTuple):
    """Something to show on one block of the map; `text` explains it."""

    rank: int
    chunk: int
    layer: int
    kind: MarkKind
    text: str

    @property
    def severity(self) -> Severity:
        return Severity.ERROR if self.kind in ("differs", "corrupt") else Severity.WARNING


class Marks:
    """What is known of single blocks of one run. A mark stays until the block is compared again, or until the run goes
    back before it."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int, int], Mark] = {}  # by rank, chunk and layer

    def __iter__(self) -> Iterator[Mark]:
        return iter(list(self._known.values()))

    def note_corrupt(self, found: Corruption) -> None:
        """A rank has found changed bytes in a block."""
        block = (found.rank, found.chunk, found.layer)
        self._known[block] = Mark(*block, "corrupt", str(found))

    def note_diff(self, found: Diff, chosen: Selection) -> None:
        """The ranks were compared: replace the marks of all blocks in `chosen` by what was found."""
        known = {
            (rank, chunk, layer): mark
            for (rank, chunk, layer), mark in self._known.items()
            if not (rank in chosen.ranks and chunk in chosen.spans and layer in chosen.layers)
        }
        for one in reversed(found.differences):  # the first difference of a block gives the text
            if one.chunk is not None:
                block = (one.rank, one.chunk, one.layer)
                known[block] = Mark(*block, "differs", str(one))
        self._known = known

    def went(self, plan: Plan, before: Cut, after: Cut) -> None:
        """The run went from one cut to another: forget the marks of blocks that no longer exist."""
        for rank, lanes in enumerate(plan.lanes):
            for lane, was, now in zip(lanes, before[rank], after[rank], strict=True):
                for op in lane.ops[now:was]:
                    if op.kind == "layer" or (op.kind == "recv" and op.what == "kv"):
                        self._known.pop((rank, op.chunk, op.layer), None)


def nonfinite_marks(blocks: Mapping[BlockKey, tuple[int, str]]) -> list[Mark]:
    """A mark for each of `NonFiniteBlocks.blocks`, on the rank that computed it; who holds the block holds them too."""
    found = []
    for (chunk, layer), (rank, what) in blocks.items():
        if what == "kv":
            text = f"NaN or Inf in K or V of c{chunk} l{layer}, computed by rank {rank}"
            found.append(Mark(rank, chunk, layer, "nonfinite", text))
        else:
            text = f"NaN or Inf in the hidden state after c{chunk} l{layer}, computed by rank {rank}"
            found.append(Mark(rank, chunk, layer, "nonfinite hidden", text))
    return found


class Standing(NamedTuple):
    """A run at one moment. `stands` are by rank, empty until all ranks have reported; `message`: why the run stopped or
    failed."""

    stands: tuple[Stand, ...]
    state: State
    message: str
    decoded: int
    text: str
    devices: Sequence[str]
    alive: tuple[bool, ...]
    last_call: str
    faults: tuple[str, ...] = ()
    """one line for each armed fault"""
    marks: tuple[Mark, ...] = ()
    memory: tuple[int | None, ...] = ()
    """bytes of host memory of each rank's process; None where the rank has no process of its own"""
    tokens: tuple[int, ...] = ()
    """number of new tokens on each rank"""
    verdict: str = ""
    """the full text of the verdict, while the run hangs"""
    device_memory: tuple[DeviceMemory | None, ...] = ()
    """GPU memory of each rank's process; None where the rank has no process of its own"""
    took: tuple[str, ...] = ()
    """of each rank that stands, the time of its last op that computed, as `last_op_text`"""
    nonfinite: str = ""
    """the first NaN or Inf, and how many blocks followed; empty while all values are finite"""
    over: str = ""
    """why the run is over, and what to do; empty while it can go on"""
    playing: str = ""
    """the call of `play` that steps the run; the run stands between two steps"""
    remedy: str = ""
    """the call after which the run can go on; empty where none is needed, or the run is over"""
    severity: Severity = Severity.NOTE
    """how grave `message` is"""
    begun: int = 0
    """how often the run has begun"""


def state_of_lanes(plan: Plan, stands: Sequence[Stand]) -> State:
    """The state that follows from the lanes' positions and limits; `stands` may lack ranks at the start."""
    if len(stands) < len(plan.lanes):
        return State.PREPARING
    if not all(stand.at_limits and not any(stand.started) for stand in stands):
        return State.RUNNING
    ended = all(
        stand.positions == tuple(len(lane.ops) for lane in lanes)
        for stand, lanes in zip(stands, plan.lanes, strict=True)
    )
    return State.DONE if ended else State.PAUSED


class RunState:
    """One run: its job, its ranks and their devices, and what is known of it. Every change and every decision takes the
    ranks' lock, `ranks.changed`."""

    def __init__(self, job: Job, ranks: RankLease, devices: Sequence[str]) -> None:
        self.job, self.plan, self.ranks, self.devices = job, job.plan, ranks, devices
        self.last_call = ""  # the text of the last call, whoever made it
        self.calls = CallLog()
        self.calls.standing = self.cut_now
        self.closed = ""  # why the run is over
        self.ending = ""  # why the run is about to be over, while `close()` waits for others to finish
        self.said: list[str] = []  # messages that the session has not logged yet
        self.story: list[str] = []  # all messages
        self.begun = 0  # how often
        self.arrived: Callable[[Cut], str] = lambda _: ""
        """the message for a run that stands at that cut, if it has come to a breakpoint there; asked for once"""
        self.begin()

    def begin(self) -> None:
        """The run begins, or begins again: forget everything known of it."""
        with self.ranks.changed:
            self.begun += 1
            self.message = ""  # why the last action stopped
            self.playing = ""  # the call of `play` that steps the run
            self.severity = Severity.NOTE  # of that message
            self.failure = ""  # why the run cannot go on until it is restarted
            self.breakage: Breakage = "failed"  # which state that is
            self.is_outdated = False  # whether the weights must be loaded again before any run can go on
            self.cause = ""  # the failure, without what was done about it
            self.recovered = False  # whether the session has recovered since it failed
            self.silence = ""  # which ranks do not answer, while that is so
            self.hang: Verdict | None = None  # why the run does not move, while that is so
            self.tokens: list[int] = []  # the new tokens that all ranks have
            self.by_rank: dict[int, list[int]] = {}  # those that each rank has reported after the last decode
            self.text = ""  # the text of the new tokens, in whole characters
            self.counted = 0  # how many of its characters count: those of an early first token do not yet
            self.is_frozen = False
            """the user has paused a run whose plan has no cuts: it stands as it is, also in transfers"""
            self.is_decoding = False
            self.is_token_pending = False
            """a call of decode is under way or ended with an error: ranks may wait for each other's token"""
            self.edited: list[str] = []  # what the user has changed by hand on the ranks
            self.corrupt: list[Corruption] = []  # blocks whose bytes have changed, in the order of discovery
            self.nonfinite = NonFiniteBlocks()
            self.marks = Marks()

    @property
    def now(self) -> State:
        """The state at this moment."""
        with self.ranks.changed:
            if self.failure or self.closed:
                return State(self.breakage) if self.failure else State.CLOSED
            if self.silence:
                return State.LOST
            if (hang := self.hang_now) and hang.is_hung:
                return AS_STATES.get(hang.kind, State.HUNG)
            return self.activity

    def note_call(self, text: str) -> LoggedCall:
        """A call begins."""
        self.last_call = text
        return self.calls.add(text)

    def cut_now(self) -> Cut | None:
        """The cut at which the run stands; None while it moves or is played, and where it cannot go on."""
        with self.ranks.changed:
            if self.failure or self.closed or self.playing or self.activity not in STANDING:
                return None
            stands = self.stands()
            return None if any(any(stand.started) for stand in stands) else tuple(s.positions for s in stands)

    @property
    def hang_now(self) -> Verdict | None:
        """Why the run does not move; None as soon as no op is under way, though the monitor has yet to look again."""
        with self.ranks.changed:
            return self.hang if self.activity in IN_OPS else None

    @property
    def activity(self) -> State:
        """What the lanes are doing, whatever is wrong with the run: one of MOVING or STANDING."""
        with self.ranks.changed:
            if self.is_decoding:
                return State.DECODING
            stands = self.stands()
            found = state_of_lanes(self.plan, stands)
            is_frozen = self.is_frozen and found == State.RUNNING and not self._computes(stands)
            return State.PAUSED if is_frozen else found

    @property
    def is_prefilled(self) -> bool:
        """Whether all lanes are at their end."""
        with self.ranks.changed:
            return state_of_lanes(self.plan, self.stands()) == State.DONE

    def _computes(self, stands: Sequence[Stand]) -> bool:
        """Whether a lane is in an op that is no transfer, and so will end."""
        return any(
            started and not lane.ops[position].is_transfer
            for stand, lanes in zip(stands, self.plan.lanes, strict=True)
            for lane, position, started in zip(lanes, stand.positions, stand.started, strict=True)
        )

    def is_doing(self, activities: Sequence[State], wait_s: float = 0.0) -> bool:
        """Whether the run is doing one of these; also while it hangs or a rank does not answer, since it goes on by
        itself if that ends. If so, waits for news of the ranks, at most so many seconds."""
        with self.ranks.changed:
            found = not self.failure and not self.closed and self.activity in activities
            if found and wait_s:
                self.ranks.changed.wait(wait_s)
            return found

    @property
    def remedy(self) -> str:
        """The call after which a run can go on that cannot by itself; empty for others, and for a run that is over:
        `closed` says what to do then."""
        with self.ranks.changed:
            now = self.now
            if self.closed or now.severity < Severity.WARNING:
                return ""
            if now == State.TAKEN_OVER:
                return TAKE_BACK
            if self.is_outdated:
                return self.job.load_call
            return RESTART if self.recovered else RECOVER

    def note_arrival(self) -> None:
        """If the run has come to stand at a breakpoint, say so: whoever sees it stand there first, before it is seen by
        others."""
        with self.ranks.changed:
            if self.failure or self.closed or self.activity not in STANDING:
                return
            if why := self.arrived(tuple(stand.positions for stand in self.stands())):
                self.say(why)

    def decide(self) -> tuple[State, str]:
        """The state at this moment, and its reason in words."""
        with self.ranks.changed:
            self.note_arrival()
            hang = found.sentence if (found := self.hang_now) else ""
            return self.now, self.failure or self.closed or self.silence or hang or self.message

    def gravity(self) -> Severity:
        """How grave the reason is."""
        with self.ranks.changed:
            if self.closed:
                return Severity.NOTE  # whatever was wrong with it is no trouble any more
            now = self.now
            if now.severity > Severity.NOTE:
                return now.severity
            return hang.severity if (hang := self.hang_now) else self.severity

    def stands(self) -> tuple[Stand, ...]:
        """The position of each rank; empty until all ranks have reported in this run, as one that was started again has
        not: it has no lanes yet."""
        with self.ranks.changed:
            found = tuple(
                state.stand
                for state, lanes in zip(self.ranks.ranks, self.plan.lanes, strict=True)
                if state.stand and len(state.stand.positions) == len(lanes)
            )
        return found if len(found) == len(self.plan.lanes) else ()

    def say(self, message: str, severity: Severity = Severity.NOTE) -> None:
        """Note why the last action stopped, also for the log."""
        with self.ranks.changed:
            self.message, self.severity = message, severity
            self.said.append(severity.marked(message))
            self.story.append(message)

    def replace_message(self, message: str = "", severity: Severity = Severity.NOTE) -> tuple[str, Severity]:
        """Set the message, but not for the log; the message until now, and how grave it was."""
        with self.ranks.changed:
            before = self.message, self.severity
            self.message, self.severity = message, severity
            return before

    def fail(self, why: Broken) -> None:
        """The run cannot go on until it is restarted. The first failure stays."""
        with self.ranks.changed:
            if not self.failure:
                self.breakage, self.failure, self.is_outdated = why
                self.cause = self.failure

    def note_recovery(self, *, ended: bool) -> None:
        """`session.recover()` has begun to free the ranks, or has ended: the run can be restarted then."""
        with self.ranks.changed:
            self.recovered = ended
            if self.closed:  # what is known of it stays as it was
                return
            self.failure = "\n".join(filter(None, [self.cause, RECOVERED if ended else RECOVERING]))

    def close(self, why: str) -> None:
        """The run is over."""
        with self.ranks.changed:
            self.closed = self.closed or why

    def note_playing(self, call: str) -> None:
        """This call of `play` steps the run from now on; empty: none does."""
        with self.ranks.changed:
            self.playing = call

    def note_silence(self, silence: str) -> None:
        """These ranks do not answer; empty: all do."""
        with self.ranks.changed:
            self.silence = silence

    def note_hang(self, hang: Verdict | None) -> None:
        """Why the run does not move; None: it moves, or is not meant to."""
        with self.ranks.changed:
            self.hang = hang

    def note_frozen(self, *, is_frozen: bool) -> None:
        """A run whose plan has no cuts is paused, or let go again. One that hangs goes on hanging."""
        with self.ranks.changed:
            hangs = (hang := self.hang_now) is not None and hang.is_hung
            self.is_frozen = is_frozen and not hangs

    def note_decoding(self, *, is_decoding: bool) -> None:
        """A call of decode has begun or ended."""
        with self.ranks.changed:
            self.is_decoding = is_decoding
            self.is_token_pending |= is_decoding

    def note_tokens(self, by_rank: dict[int, list[int]]) -> None:
        """All ranks have reported their tokens after a call of decode."""
        with self.ranks.changed:
            self.by_rank, self.is_token_pending = by_rank, False

    def note_edited(self, what: Iterable[str]) -> None:
        """The user has changed this by hand."""
        with self.ranks.changed:
            self.edited.extend(what)

    def forget_edited(self, what: str) -> None:
        """The last change of this by hand has been undone."""
        with self.ranks.changed:
            for at in [n for n, one in enumerate(self.edited) if one == what][-1:]:
                del self.edited[at]

    def note_corrupt(self, found: Corruption) -> None:
        """A rank has found changed bytes."""
        with self.ranks.changed:
            self.corrupt.append(found)
            self.marks.note_corrupt(found)

    def note_nonfinite(self, rank: int, found: NonFinite) -> None:
        """A rank has found NaN or Inf; for the log if it is the first of all."""
        with self.ranks.changed:
            if self.nonfinite.note(rank, found):
                text = f"not finite: first {found}"
                self.said.append(Severity.WARNING.marked(text))
                self.story.append(text)


def last_op_text(lanes: Sequence[Lane], stand: Stand, events: Sequence[Event]) -> str:
    """Of a rank that stands: how long its last op that computed took, for example "`layer c1 l3` took 0.14 ms".

    Empty while it moves, before such an op, and until the op's event is among `events`, those of the rank so far.
    """
    if not stand.at_limits or any(stand.started):
        return ""
    # No slices of the lanes: each update of a panel comes here, and a lane may have 100,000 ops.
    known = {lane.name: (lane.ops, at) for lane, at in zip(lanes, stand.positions, strict=True)}
    for event in reversed(events[-_RECENT:]):
        ops, position = known.get(event.lane, ((), 0))
        if event.index is None or event.index >= position or ops[event.index].is_transfer or not event.end:
            continue  # of decode, undone, or none that computes
        is_last = all(ops[number].is_transfer for number in range(event.index + 1, position))
        return f"`{event.name}` took {event.busy / 1e6:.3g} ms" if is_last else ""
    return ""


def with_remedy(text: str, remedy: str) -> str:
    """A reason, and the call after which the run can go on. Who has taken the ranks over is said with what to do."""
    return f"{text}\nto go on: {remedy}" if remedy and remedy != TAKE_BACK else text


def where_of(plan: Plan, standing: Standing, state: RunState) -> Where:
    """The position of each rank, one line each, and whatever else a user should know."""
    lines = "not all ranks have reported yet"
    if standing.stands:
        ranks = where_text(plan, standing.stands).splitlines()
        lines = "\n".join("; ".join(filter(None, parts)) for parts in zip_longest(ranks, standing.took))
    notes = [f"played by {standing.playing}"] * bool(standing.playing)
    notes += [with_remedy(standing.message, standing.remedy)] * bool(standing.message)
    notes += [f"{standing.decoded} new tokens: {standing.text!r}"] * bool(standing.decoded)
    notes += [f"edited by hand: {', '.join(state.edited)}"] * bool(state.edited)
    notes += [f"not finite: {standing.nonfinite}"] * bool(standing.nonfinite)
    unsaid = [text for text in map(str, state.corrupt) if text not in standing.message]
    notes += [f"changed bytes: {listed(unsaid)}"] * bool(unsaid)
    text = "\n".join([lines, *notes, *standing.faults])
    is_played = standing.playing and standing.state == State.PAUSED
    now = State.RUNNING if is_played else standing.state
    odd = Severity.WARNING if standing.nonfinite else Severity.NOTE
    return Where(str(now), text, max(standing.severity, standing.state.severity, odd))
