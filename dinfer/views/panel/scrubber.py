"""Scrubber: the run at any moment of its trace, and the totals of a stretch of it, for browsers that ask.

The trace is that of a run that stands or is over; of one that moves there is only now. As with the figures, a browser
asks, and has one answer for each question; the newest question counts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from dinfer.plan.plan import Plan
from dinfer.trace.moment import LaneMoment, Moment, moment
from dinfer.trace.notable import notable
from dinfer.trace.shares import percentages
from dinfer.trace.stretch import ABOUT_STRETCH, Stretch, stretch
from dinfer.views.bins import packed
from dinfer.views.cells import cut_line, marked
from dinfer.views.panel.desk import Painter, Wants
from dinfer.views.protocol import InspectableRun, Json
from dinfer.views.recorded import Recorded, RecordedRun
from dinfer.views.slowest import slowest
from dinfer.views.timeline import PARTS

PERIOD_S = 0.03

MOST_BINS = 2000
"""of a strip: more than a window is wide"""

MOST_LANES = 200
"""that are told of at one moment: those that are in an op"""

ABOUT_PARTS = {
    **ABOUT_STRETCH,
    "data": "a lane waits for what another lane of its rank makes",
}

T = TypeVar("T", int, float)


class TimeQuestion(NamedTuple):
    """What a browser asks. Times are nanoseconds since the trace began; None: now. `begin`, `end`: what of the trace is
    seen, in so many `bins`; `rank`: the one whose lanes are seen, too; `stretch`: of which totals are wanted. `have`:
    the strip that the browser has, by key; `number`: of the question."""

    view: str
    number: int
    at: int | None
    begin: int | None
    end: int | None
    bins: int
    rank: int | None
    stretch: tuple[int, int] | None
    have: str

    @classmethod
    def of(cls, message: Json) -> "TimeQuestion":
        """From a browser's message, whatever it holds."""

        def number(name: str) -> int | None:
            value = message.get(name)
            return round(value) if isinstance(value, int | float) else None

        ends = message.get("stretch")
        is_stretch = (
            isinstance(ends, list) and len(ends) == 2 and all(isinstance(n, int | float) for n in ends)
        )
        return cls(
            view=str(message.get("view")),
            number=number("number") or 0,
            at=number("at"),
            begin=number("begin"),
            end=number("end"),
            bins=within(number("bins") or 1, 1, MOST_BINS),
            rank=number("rank"),
            stretch=(round(min(ends)), round(max(ends))) if isinstance(ends, list) and is_stretch else None,
            have=str(message.get("have", "")),
        )


def within(value: T, least: T, most: T) -> T:
    """The nearest value in that range."""
    return max(least, min(value, most))


class Scrubber:
    """The scrubber of one panel. `send(content, buffers)` sends to all its browsers."""

    def __init__(self, run: InspectableRun, recorded: RecordedRun, send: Callable[..., object]) -> None:
        self._run, self._recorded, self._send = run, recorded, send
        self._painter = Painter(self._serve, "scrubber", period=PERIOD_S, longest=0.2)
        self._wants = Wants[TimeQuestion]()

    def ask(self, message: Json) -> None:
        """A browser asks. Returns at once."""
        question = TimeQuestion.of(message)
        self._wants[question.view] = question
        self._painter.touch()

    def close(self) -> None:
        """Answer no more."""
        self._painter.close()

    def _serve(self) -> None:
        for question in self._wants.taken(None):
            about: Json = {"view": question.view, "number": question.number}
            buffers: list[bytes] = []
            try:
                found = self._recorded.now()
                if found is None:
                    about |= {"moving": True}
                else:
                    content, buffers = answer(question, found, self._run.plan)
                    about |= content
            except Exception as error:  # nothing else would report it
                about |= {"error": f"{type(error).__name__}: {error}"}
            self._send({"time": about}, buffers)


def answer(question: TimeQuestion, recorded: Recorded, plan: Plan) -> tuple[Json, list[bytes]]:
    """The answer as JSON, and its buffers: the strip's codes, unless the browser has them, and the map's cells, unless
    that moment is now. Pure."""
    timeline = recorded.timeline
    span = timeline.span
    if not span:
        return {"span": 0, "events": 0}, []
    found, buffers = _strip(question, recorded)
    found |= {
        "span": span,
        "paused": timeline.paused,
        "events": len(timeline.trace.events),
        "parts": ABOUT_PARTS,
    }
    is_now = question.at is None or question.at >= span
    at = span if question.at is None else within(question.at, 0, span)
    then = moment(timeline.trace, timeline.began + at)
    found["moment"] = {
        "at": at,
        "now": is_now,
        "lanes": _open_ops(recorded, plan) if is_now else _lanes(then),
        "links": [list(link) for link in then.links],
    }
    if not is_now:
        states = timeline.states(at)
        totals = [sum(len(lane.ops) for lane in lanes) for lanes in plan.lanes]
        found["moment"] |= {"cut": cut_line(states), "ranks": _ranks(then, timeline.done(at), totals)}
        found["cells"] = len(buffers)
        buffers.append(packed(marked(states, recorded.standing.marks)))
    if question.stretch:
        begin, end = (within(edge, 0, span) for edge in question.stretch)
        found["stretch"] = _totals(
            stretch(timeline.trace, timeline.began + begin, timeline.began + end), begin, end
        )
    return found, buffers


def _totals(found: Stretch, begin: int, end: int) -> Json:
    """Nanoseconds by part, and their shares as text, which add up to 100 %."""
    links = [link for link in found.links if link.transfers or link.moving or link.waiting]
    rows: list[dict[str, Any]] = [
        {"name": f"rank {rank.rank}", "parts": list(rank[1:])} for rank in found.ranks
    ]
    rows.append({"name": "all", "parts": list(found.parts.values())})
    for row in rows:
        whole = sum(row["parts"]) or 1
        row["shares"] = percentages([part / whole for part in row["parts"]])
    return {"begin": begin, "end": end, "rows": rows, "links": [list(link) for link in links]}


def _strip(question: TimeQuestion, recorded: Recorded) -> tuple[Json, list[bytes]]:
    """The rows of the strip and what is notable; nothing if the browser has them."""
    timeline = recorded.timeline
    begin = within(question.begin or 0, 0, timeline.span - 1)
    end = within(timeline.span if question.end is None else question.end, begin + 1, timeline.span)
    key = f"{recorded.key} {begin} {end} {question.bins} {question.rank}"
    if key == question.have:
        return {"key": key, "begin": begin, "end": end}, []
    lanes = [lane for lane in timeline.lanes if lane[0] == question.rank]
    codes = timeline.rank_rows(begin, end, question.bins).tobytes()
    codes += timeline.lane_rows(lanes, begin, end, question.bins).tobytes()
    began = timeline.began
    return {
        "key": key,
        "begin": begin,
        "end": end,
        "bins": question.bins,
        "rank": question.rank,
        "lanes": [name for _, name in lanes],
        "codes": list(PARTS),
        "strip": 0,
        "notable": [
            {**one._asdict(), "begin": one.begin - began, "end": one.end - began}
            for one in notable(timeline.trace)
        ],
        "slowest": [{**one._asdict(), "at": one.at - began} for one in slowest(timeline.trace)],
    }, [codes]


def _lanes(then: Moment) -> list[Json]:
    """The lanes that are in an op, those that compute first."""
    under_way = [lane for lane in then.lanes if lane.event]
    under_way.sort(key=lambda lane: (lane.phase != "computes", lane.rank, lane.lane))
    return [_lane(lane, then.at) for lane in under_way[:MOST_LANES]]


def _lane(lane: LaneMoment, at: int) -> Json:
    event = lane.event
    assert event is not None
    since = {"computes": event.met, "on the wire": event.met, "waits for its peer": event.start}
    return {
        "rank": lane.rank,
        "lane": lane.lane,
        "op": event.name,
        "phase": lane.phase,
        "peer": event.peer,
        "layer": event.layer,
        "chunk": event.chunk,
        "since": at - since.get(lane.phase, event.ready),
    }


def _open_ops(recorded: Recorded, plan: Plan) -> list[Json]:
    """Now: the ops in which lanes stand, which have no events yet."""
    found = []
    for rank, stand in enumerate(recorded.standing.stands):
        for lane, at, begun in zip(plan.lanes[rank], stand.positions, stand.started, strict=True):
            if not begun or at >= len(lane.ops):
                continue
            op = lane.ops[at]
            found.append(
                {
                    **{"rank": rank, "lane": lane.name, "op": str(op), "phase": "not ended", "since": None},
                    "peer": op.peer if op.is_transfer else None,
                    "layer": op.layer if op.layer >= 0 else None,
                    "chunk": op.chunk if op.chunk >= 0 else None,
                }
            )
    return found[:MOST_LANES]


def _ranks(then: Moment, done: list[int], totals: list[int]) -> list[Json]:
    """What each rank did, in the panel's words."""
    found = []
    for rank, total in enumerate(totals):
        mine = [lane for lane in then.lanes if lane.rank == rank]
        under_way = [lane for lane in mine if lane.event]
        where = "; ".join(f"{lane.lane} in `{lane.event.name}`" for lane in under_way if lane.event)
        has = min(done[rank], total)
        found.append(
            {
                "state": _word(under_way, is_done=has == total),
                "done": has,
                "total": total,
                "where": f"{has} of {total} ops done" + (f"; {where}" if where else ""),
            }
        )
    return found


def _word(under_way: list[LaneMoment], *, is_done: bool) -> str:
    phases = {lane.phase for lane in under_way}
    if "computes" in phases:
        return "computing"
    waiting = sorted({lane.event.peer for lane in under_way if lane.event and lane.event.peer is not None})
    if waiting:
        return f"waiting for rank{'s' * (len(waiting) > 1)} {', '.join(map(str, waiting))}"
    return "done" if is_done else "idle"
