"""Event: as 64 bytes and back."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinfer.trace.events import KINDS, SIZE, WHATS, Event
from tests.support.made_events import events

LANES = ("compute", "kv-out:1", "kv-in:1")


def packed(event: Event, offset: int = 0) -> Event:
    buffer = bytearray(offset + SIZE)
    event.pack_into(memoryview(buffer), offset, LANES.index(event.lane))
    return Event.unpack_from(buffer, offset, event.rank, LANES)


@given(events(lanes=LANES), st.integers(0, 100))
def test_pack_and_unpack(event: Event, offset: int) -> None:
    assert packed(event, offset) == event


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", WHATS)
def test_every_kind_carries_everything(kind: str, what: str) -> None:
    event = Event(0, "compute", kind, 1, 2, 3, 4, what)
    assert packed(event) == event


@pytest.mark.parametrize("field", ["chunk", "layer", "peer", "index"])
def test_what_is_not_known_stays_unknown_and_zero_stays_zero(field: str) -> None:
    event = Event(0, "compute", "all_reduce", 1, 2, 3, 4, chunk=1, layer=2, peer=3, index=4)
    for value in (None, 0):
        changed = replace(event, **{field: value})  # type: ignore[arg-type]
        assert getattr(packed(changed), field) is value
        assert packed(changed) == changed


def test_packing_touches_its_own_bytes_only() -> None:
    buffer = bytearray(b"\xff" * (3 * SIZE))
    Event(0, "compute", "layer", 1, 2, 3, 4).pack_into(memoryview(buffer), SIZE, 0)
    assert buffer[:SIZE] == buffer[2 * SIZE :] == b"\xff" * SIZE


def test_waiting_and_being_busy() -> None:
    event = Event(0, "compute", "recv", ready=5, start=10, met=17, end=37)
    assert (event.waited, event.busy) == (7, 20)


def test_the_numbers_of_kinds_stay() -> None:
    """Records and traces of before hold them."""
    assert KINDS[:11] == (
        "embed", "layer", "norm", "send", "recv", "decode",
        "all_gather", "broadcast", "all_reduce", "barrier", "other",
    )  # fmt: skip
    assert packed(Event(0, "compute", "permute", 1, 2, 3, 4)).kind == "other"
