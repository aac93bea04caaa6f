"""Pairs each send of a trace with its recv. Pure."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from dinfer.trace.events import Event, prefill_events


def pairs(events: Iterable[Event]) -> list[tuple[Event | None, Event | None]]:
    """The send and the recv of each of these messages, as far as they are there.

    The nth send of a block on a link belongs to its nth recv: after going back, a block travels again.
    """
    sends: dict[tuple[object, ...], list[Event]] = defaultdict(list)
    recvs: dict[tuple[object, ...], list[Event]] = defaultdict(list)
    for event in prefill_events(events):
        if event.peer is None:
            continue
        if event.kind == "send":
            sends[event.rank, event.peer, event.what, event.chunk, event.layer].append(event)
        elif event.kind == "recv":
            recvs[event.peer, event.rank, event.what, event.chunk, event.layer].append(event)
    return [
        (_at(sends[key], n), _at(recvs[key], n))
        for key in {**sends, **recvs}
        for n in range(max(len(sends[key]), len(recvs[key])))
    ]


def _at(events: Sequence[Event], number: int) -> Event | None:
    return events[number] if number < len(events) else None
