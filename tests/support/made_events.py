"""Events for hypothesis, and whole ones that a reader can check. Not a test."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from dinfer.trace.events import KINDS, WHATS, Event

NUMBERS = st.integers(0, 2**31 - 1)
UNKNOWN = st.none() | NUMBERS
NANOSECONDS = st.integers(0, 2**62)


def events(*, lanes: tuple[str, ...] = ("main",), ranks: int = 1) -> st.SearchStrategy[Event]:
    """Any event of these lanes and ranks."""
    return st.builds(
        Event,
        rank=st.integers(0, ranks - 1),
        lane=st.sampled_from(lanes),
        kind=st.sampled_from(KINDS),
        ready=NANOSECONDS,
        start=NANOSECONDS,
        met=NANOSECONDS,
        end=NANOSECONDS,
        what=st.sampled_from(WHATS),
        chunk=UNKNOWN,
        layer=UNKNOWN,
        peer=UNKNOWN,
        tokens=NUMBERS,
        bytes=NANOSECONDS,
        index=UNKNOWN,
    )


def in_order(made: list[Event]) -> list[Event]:
    """With the times of each event in order, as any recorder has them."""
    return [
        replace(event, **dict(zip(("ready", "start", "met", "end"), times, strict=True)))  # type: ignore[arg-type]
        for event in made
        for times in [sorted((event.ready, event.start, event.met, event.end))]
    ]


def plausible(made: list[Event]) -> list[Event]:
    """With numbers that a run can have, so that a reader accepts them."""

    def small(number: int | None) -> int | None:
        return None if number is None else number % 100

    return [
        replace(
            event,
            chunk=small(event.chunk),
            layer=small(event.layer),
            peer=small(event.peer),
            bytes=event.bytes >> 2,
        )
        for event in in_order(made)
    ]


def numbered(number: int, lane: str = "main") -> Event:
    """An event that has its number in every field, so that one put together from two would show."""
    return Event(
        rank=3,
        lane=lane,
        kind="layer",
        ready=number,
        start=number,
        met=number,
        end=number,
        chunk=number,
        layer=number,
        peer=number,
        tokens=number,
        bytes=number,
        index=number,
    )
