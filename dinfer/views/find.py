"""Find: what a search box of the panel finds in a run. Pure: a query and what is known of the run in, hits out.

A query is words, all of which must hold: places (`layer 5`, `c2`, `rank 1`, `0→1`), ops (`recv kv`), what is wrong
(`differs`, `nan`, `late`), an order (`slowest`), and text of the prompt. Words that cannot all hold are refused.
"""

import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import nlargest
from itertools import islice
from operator import itemgetter
from typing import Any, NamedTuple

from dinfer.errors import DinferError, excerpt
from dinfer.plan.ops import Op
from dinfer.plan.plan import Plan
from dinfer.run.state import Mark, Standing
from dinfer.severity import Severity
from dinfer.trace.events import COMPUTE, Event, block_text
from dinfer.trace.notable import Notable, NotableKind, all_notable, milliseconds
from dinfer.trace.transfers import Transfer, transfers
from dinfer.views.slowest import slowest
from dinfer.views.timeline import Timeline

MOST = 100
"""hits that are listed; the others are counted"""

COUNTED = 10_000
"""hits at most; of more, it is known that there are more"""

AROUND = 24
"""characters of the prompt beside those that were found"""

KINDS = ("embed", "layer", "norm", "send", "recv", "decode", "check")

WHATS = ("kv", "hidden", "final", "token")

MARKS: dict[str, tuple[str, ...]] = {
    "differs": ("differs", "corrupt"),
    "corrupt": ("corrupt",),
    "nan": ("nonfinite", "nonfinite hidden"),
    "inf": ("nonfinite", "nonfinite hidden"),
    "armed": ("armed",),
}
"""kinds of marks on blocks, by word"""

SLOW_LINK = "slow link"

NOTABLE: dict[str, tuple[NotableKind, ...]] = {
    "slow": ("slow op", "slow message"),
    "late": ("late",),
    "bubble": ("bubble",),
    "bubbles": ("bubble",),
}

ALLOWED = (
    "text of the prompt; layer 5, chunk 2 or rank 1 (l5, c2, r1, l5-9); a link, 0→1 or 0>1; ops: "
    f"{', '.join(KINDS)}, {', '.join(WHATS)}; {', '.join(MARKS)}; slowest, slow, slow link, late, bubble, waiting"
)
"""what may be searched for"""

TOGETHER = (
    "layers, chunks and ranks go with everything; a link with ops, slow, slow link, late, slowest and waiting; ops "
    "with slow, late (of messages), slowest and waiting; text in quotes is text, whatever it says"
)
"""what may be searched for at once"""

_PLACE = re.compile(r"(layer|chunk|rank|l|c|r)[=:]?(\d{1,9})(?:[-–](\d{1,9}))?")
_LINK = re.compile(r"(\d{1,9})(?:→|->|>)(\d{1,9})")
_NUMBER = re.compile(r"\d{1,9}(?:[-–]\d{1,9})?")
_NAMES = {"l": "layer", "c": "chunk", "r": "rank"}


class FindError(DinferError, ValueError):
    """A query that says nothing that can be searched for, or names a place that there is not."""


@dataclass
class Query:
    """A query in parts; those not given are None or empty. `places`: by "layer", "chunk" and "rank", the first and the
    last; `words`: other words, in small letters; `text`: of the prompt."""

    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    link: tuple[int, int] | None = None
    words: list[str] = field(default_factory=list)
    text: str = ""

    def has(self, *names: str) -> bool:
        """Whether one of these words is given."""
        return any(name in self.words for name in names)

    def is_inside(self, layer: int | None, chunk: int | None, rank: int | None) -> bool:
        """Whether something that is there lies in the places that are given."""
        if not self.places:  # of many thousands of ops, each is asked
            return True
        here = {"layer": layer, "chunk": chunk, "rank": rank}
        return all(
            (at := here[name]) is not None and first <= at <= last
            for name, (first, last) in self.places.items()
        )

    def fits(self, kind: str, what: str, rank: int, peer: int | None) -> bool:
        """Whether an op is of the kinds, and of the link, that are given."""
        for word in self.words:
            if (word != kind and word in KINDS) or (word != what and word in WHATS):
                return False
        if not self.link:
            return True
        return (peer, rank) == self.link if kind == "recv" else kind == "send" and (rank, peer) == self.link


class FindHit(NamedTuple):
    """Something found: what it is in words, where on the map, and when, in nanoseconds since the trace began; None
    where that is not one place or time."""

    text: str
    layer: int | None = None
    chunk: int | None = None
    rank: int | None = None
    lane: str = ""
    at: int | None = None
    severity: Severity = Severity.NOTE

    def as_dict(self) -> dict[str, Any]:
        return {**self._asdict(), "severity": self.severity.word}


class Searched(NamedTuple):
    """A run in which to search. `labels`: the text of each chunk; `timeline`: None while the run moves."""

    plan: Plan
    labels: Sequence[str]
    standing: Standing
    timeline: Timeline | None


class Found(NamedTuple):
    """The first hits, and how many there are; COUNTED + 1: more than COUNTED."""

    hits: list[FindHit]
    total: int


def parsed(query: str) -> Query:
    """The parts of a query. Text in quotes is text, whatever it says; so is each word that is nothing else."""
    found, texts = Query(), []
    quoted = re.findall(r'"([^"]*)"', query)
    rest = re.sub(r'"[^"]*"?', " ", query) if quoted else query
    words = deque(rest.split())
    while words:
        word = words.popleft()
        small = word.lower()
        name = small.rstrip("s")
        if name in ("layer", "chunk", "rank") and words and _NUMBER.fullmatch(words[0]):
            small = f"{name}{words.popleft()}"
        if small.rstrip("s") == "link" and found.words[-1:] == ["slow"]:
            found.words[-1] = SLOW_LINK
            continue
        if small == "link" and words and _LINK.fullmatch(words[0]):
            continue
        if place := _PLACE.fullmatch(small):
            name, first, last = place.groups()
            ends = sorted((int(first), int(last or first)))
            found.places[_NAMES.get(name, name)] = ends[0], ends[1]
        elif link := _LINK.fullmatch(small):
            found.link = int(link[1]), int(link[2])
        elif small in (*KINDS, *WHATS, *MARKS, *NOTABLE, "slowest", "waiting"):
            found.words.append(small)
        else:
            texts.append(word)
    found.text = " ".join([*quoted, *texts]).strip()
    return found


def find(text: str, run: Searched) -> Found:
    """What a query finds. Raises FindError for one that names nothing, or nothing that there is."""
    query = parsed(text)
    if query == Query():
        raise FindError(f"search for {ALLOWED}.")
    _check(query, run)
    if query.text and not any(True for _ in _texts(Query(text=query.text), run)):
        known = "the prompt's text is not known here" if not any(run.labels) else "it is not in the prompt"
        raise FindError(f"{excerpt(query.text)}: {known}. Search for {ALLOWED}.")
    if apart := _apart(query):
        raise FindError(f"{' and '.join(map(excerpt, apart))} do not hold of one thing: {TOGETHER}.")
    if query.has("slowest"):
        return _slowest(query, run)
    hits = list(islice(_hits(query, run), COUNTED + 1))
    return Found(hits[:MOST], len(hits))


def _apart(query: Query) -> list[str]:
    """Two parts of a query that nothing can be at once; empty if all can hold together."""
    subjects = [query.text] if query.text else []
    for group in (MARKS, NOTABLE):
        named = [word for word in query.words if word in group]
        subjects += named[:1] + [word for word in named if not {*group[word]} & {*group[named[0]]}]
    subjects += [word for word in (SLOW_LINK, "slowest", "waiting") if query.has(word)]
    if len(subjects) > 1:
        return subjects[:2]
    ops = [word for word in query.words if word in (*KINDS, *WHATS)]
    has_ops = not query.text and (not subjects or query.has("slow", "late", "slowest", "waiting"))
    if subjects and ops and not has_ops:
        return [subjects[0], ops[0]]
    if query.link and subjects and not has_ops and not query.has(SLOW_LINK):
        return [subjects[0], "→".join(map(str, query.link))]
    return []


def _check(query: Query, run: Searched) -> None:
    shape = run.plan.shape
    counts = {"layer": shape.layers, "chunk": len(shape.chunks), "rank": run.plan.world_size}
    named = [*query.places.items(), *[("rank", (rank, rank)) for rank in query.link or ()]]
    for name, (_, last) in named:
        if last >= counts[name]:
            raise FindError(f"{name} is {last}; there are {name}s 0–{counts[name] - 1}.")
    needs_trace = [word for word in query.words if word in (*NOTABLE, SLOW_LINK, "slowest")]
    if needs_trace and run.timeline is None:
        raise FindError(f"{needs_trace[0]!r} is read off a trace, and the run moves: pause it, or wait.")


def _hits(query: Query, run: Searched) -> Iterator[FindHit]:
    if query.text:
        yield from _texts(query, run)
    elif query.has(*MARKS):
        yield from _marks(query, run.standing.marks)
    elif query.has(*NOTABLE) and run.timeline:
        yield from _notables(query, run.timeline)
    elif query.has(SLOW_LINK) and run.timeline:
        yield from _slow_links(query, run.timeline)
    elif query.has("waiting"):
        yield from _waiting(query, run)
    else:
        if not query.words and not query.link:
            yield from _places(query, run)
        yield from _ops(query, run)


def _texts(query: Query, run: Searched) -> Iterator[FindHit]:
    """Where the prompt has the text, also across two chunks: with the chunk in which it begins."""
    whole, low, wanted = "".join(run.labels), _small("".join(run.labels)), _small(query.text)
    starts = [0]
    for label in run.labels:
        starts.append(starts[-1] + len(label))
    at, chunk = low.find(wanted), 0
    layer = query.places.get("layer", (0, 0))[0]
    while at >= 0:
        while starts[chunk + 1] <= at:
            chunk += 1
        if query.is_inside(layer, chunk, query.places.get("rank", (0, 0))[0]):
            shown = whole[max(0, at - AROUND) : at + len(wanted) + AROUND].replace("\n", "⏎")
            yield FindHit(f"c{chunk}: …{shown}…", layer, chunk)
        at = low.find(wanted, at + 1)


def _small(text: str) -> str:
    """In small letters, each at its place: "İ" stays, whose small form is two characters."""
    return "".join(low if len(low := letter.lower()) == 1 else letter for letter in text)


def _kinds(query: Query, group: Mapping[str, Iterable[str]]) -> set[str]:
    """What all words of this group name."""
    return set.intersection(*({*group[word]} for word in query.words if word in group))


def _marks(query: Query, marks: Iterable[Mark]) -> Iterator[FindHit]:
    kinds = _kinds(query, MARKS)
    for mark in marks:
        if mark.kind in kinds and query.is_inside(mark.layer, mark.chunk, mark.rank):
            text = f"c{mark.chunk} l{mark.layer}, rank {mark.rank}: {mark.text}"
            yield FindHit(text, mark.layer, mark.chunk, mark.rank, severity=mark.severity)


def _notables(query: Query, timeline: Timeline) -> Iterator[FindHit]:
    kinds = _kinds(query, NOTABLE)
    for one in all_notable(timeline.trace):
        places = (one.layer, one.chunk)
        ranks = (one.rank,) if one.peer is None else (one.rank, one.peer)
        is_inside = any(query.is_inside(*places, rank) for rank in ranks)
        if one.kind in kinds and is_inside and _fits_notable(query, one):
            at = (one.begin + one.end) // 2 - timeline.began
            yield FindHit(one.text, *places, one.rank, one.lane, at, Severity.WARNING)


def _fits_notable(query: Query, one: Notable) -> bool:
    """Whether it is of the kinds of ops, and of the link, that are given. A message is a send, and a recv."""
    if one.link is None:
        return query.fits(one.op, "", one.rank, None)
    source, target = one.link
    return query.fits("recv", one.what, target, source) or query.fits("send", one.what, source, target)


def _slow_links(query: Query, timeline: Timeline) -> Iterator[FindHit]:
    """The links whose messages take longer than those of others, the slowest first, each with its longest message in
    the places that are given."""
    slow = [one for one in slowest(timeline.trace) if one.is_slow]
    for one in sorted(slow, key=lambda one: -one.usual):
        link = one.source, one.target
        if query.link not in (None, link):
            continue
        messages = [
            event
            for event in timeline.trace.prefill(one.target)
            if event.kind == "recv" and event.peer == one.source and event.end
            if any(query.is_inside(event.layer, event.chunk, rank) for rank in link)
        ]
        if messages:
            longest = max(messages, key=lambda event: event.busy)
            text = (
                f"slow link {one.source}→{one.target}: {milliseconds(one.usual)} on the wire in the median; longest"
                f"{' there' * bool(query.places)}, {milliseconds(longest.busy)}: {longest.name}"
            )
            at = (longest.met + longest.end) // 2 - timeline.began
            place = (longest.layer, longest.chunk, longest.rank, longest.lane)
            yield FindHit(text, *place, at, Severity.WARNING)


def _waiting(query: Query, run: Searched) -> Iterator[FindHit]:
    """The ops in which lanes stand now."""
    for rank, stand in enumerate(run.standing.stands):
        for lane, at, begun in zip(run.plan.lanes[rank], stand.positions, stand.started, strict=True):
            if begun and at < len(lane.ops) and _is_wanted(query, rank, lane.ops[at]):
                yield _hit_of_op(rank, lane.name, lane.ops[at], "under way")


def _places(query: Query, run: Searched) -> Iterator[FindHit]:
    """The place that is named itself."""
    (layer, _), (chunk, _) = (query.places.get(name, (None, None)) for name in ("layer", "chunk"))
    rank = query.places.get("rank", (None, None))[0]
    names = [
        f"{name} {at}" for name, at in (("layer", layer), ("chunk", chunk), ("rank", rank)) if at is not None
    ]
    if layer is not None and chunk is not None:
        names[:2] = [f"block c{chunk} l{layer}"]
    label = f": {run.labels[chunk].strip()[: 2 * AROUND]}" if chunk is not None and run.labels[chunk] else ""
    if layer is not None or chunk is not None:
        yield FindHit(f"{', '.join(names)}{label}", layer or 0, chunk or 0, rank)
    elif names:
        yield FindHit(names[0], rank=rank)


def _ops(query: Query, run: Searched) -> Iterator[FindHit]:
    """Ops that have ended, in the order of time, then those that have not, in the order of their lanes."""
    if run.timeline:
        for event in _events(query, run.timeline):
            yield _hit_of_event(event, run.timeline.began)
    for rank, (lanes, stand) in enumerate(zip(run.plan.lanes, run.standing.stands, strict=False)):
        for lane, at, begun in zip(lanes, stand.positions, stand.started, strict=True):
            first = at if run.timeline else 0
            for number, op in enumerate(lane.ops[first:], first):
                if _is_wanted(query, rank, op):
                    state = "under way" if number == at and begun else "done" if number < at else "not yet"
                    yield _hit_of_op(rank, lane.name, op, state)


def _events(query: Query, timeline: Timeline) -> Iterator[Event]:
    return (event for event in timeline.trace.events if event.end and _is_event_wanted(query, event))


def _is_event_wanted(query: Query, event: Event) -> bool:
    return query.fits(event.kind, event.what, event.rank, event.peer) and query.is_inside(
        event.layer, event.chunk, event.rank
    )


def _slowest(query: Query, run: Searched) -> Found:
    """The ops that match, the one that took longest first: of one that computes, how long it did; of a message, how
    long it was under way since it was there to be sent."""
    assert run.timeline is not None
    trace, began = run.timeline.trace, run.timeline.began
    some = [
        (event.busy, _hit_of_event, event) for event in _events(query, run.timeline) if event.kind in COMPUTE
    ]
    moved = [(one.latency, _hit_of_transfer, one) for one in transfers(trace) if _moves(query, one)]
    longest = nlargest(MOST, [*some, *moved], key=itemgetter(0))
    total = min(len(some) + len(moved), COUNTED + 1)
    return Found([made(one, began) for _, made, one in longest], total)  # type: ignore[operator]


def _moves(query: Query, one: Transfer) -> bool:
    """Whether a message is among those that are asked for, at either end."""
    source, target = one.source, one.target
    return (
        query.fits("recv", one.what, target, source) and query.is_inside(one.layer, one.chunk, target)
    ) or (query.fits("send", one.what, source, target) and query.is_inside(one.layer, one.chunk, source))


def _is_wanted(query: Query, rank: int, op: Op) -> bool:
    what, peer = (op.what, op.peer) if op.is_transfer else ("", None)
    layer, chunk = (op.layer if op.layer >= 0 else None), (op.chunk if op.chunk >= 0 else None)
    return query.fits(op.kind, what, rank, peer) and query.is_inside(layer, chunk, rank)


def _hit_of_op(rank: int, lane: str, op: Op, state: str) -> FindHit:
    layer, chunk = (op.layer if op.layer >= 0 else None), (op.chunk if op.chunk >= 0 else None)
    return FindHit(f"{op} on rank {rank}: {state}", layer, chunk, rank, lane)


def _hit_of_event(event: Event, began: int) -> FindHit:
    link = ""
    if event.peer is not None:
        link = f" {event.peer}→{event.rank}" if event.kind == "recv" else f" {event.rank}→{event.peer}"
    waited = f", {milliseconds(event.waited)} of them waiting" if event.waited > event.busy else ""
    took = f"{milliseconds(event.end - event.start)}{waited}, at {_seconds(event.start - began)}"
    at = (event.met + event.end) // 2 - began
    text = f"{event.name}{link} on rank {event.rank}: {took}"
    return FindHit(text, event.layer, event.chunk, event.rank, event.lane, at)


def _hit_of_transfer(one: Transfer, began: int) -> FindHit:
    name = f"{block_text(one.what, one.chunk, one.layer)} {one.source}→{one.target}"
    whom = "its peer" if one.late is None else f"rank {one.late}"
    waited = f", {milliseconds(one.waited)} of them waiting for {whom}" if one.waited > one.wire else ""
    took = f"{milliseconds(one.latency)}{waited}, at {_seconds(one.offered - began)}"
    return FindHit(f"{name}: {took}", one.layer, one.chunk, one.target, at=(one.met + one.end) // 2 - began)


def _seconds(nanoseconds: int) -> str:
    return f"{nanoseconds / 1e9:.3f} s"
