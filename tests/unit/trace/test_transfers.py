"""Transfers and percentiles, with numbers worked by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinfer.trace.events import Event
from dinfer.trace.trace import Trace
from dinfer.trace.transfers import Transfer, by_link, by_link_and_layer, percentile, spread, transfers

S = 10**9


def end_of_one(
    rank: int, kind: str, peer: int | None, times: tuple[int, int, int], layer: int | None = 0
) -> Event:
    """One end of a message: when its rank was there, when both were, when it was over."""
    start, met, end = times
    return Event(rank, f"kv-{kind}", kind, start, start, met, end, "kv", 0, layer, peer, 8, 100)


def test_a_send_and_its_recv_are_one_transfer() -> None:
    """The wait is the sender's, the wire the receiver's: no time of one clock is taken from one of another."""
    send, recv = end_of_one(0, "send", 1, (3, 5, 9)), end_of_one(1, "recv", 0, (1, 6, 10))
    (one,) = transfers(Trace.merge([[send], [recv]]))
    assert one == Transfer(0, 1, "kv", 0, 0, 100, offered=4, met=6, end=10, late=0)
    assert (one.link, one.waited, one.wire, one.latency) == ((0, 1), 2, 4, 6)


def test_late_is_who_came_last() -> None:
    send, recv = end_of_one(0, "send", 1, (1, 6, 9)), end_of_one(1, "recv", 0, (5, 6, 9))
    (one,) = transfers(Trace.merge([[send], [recv]]))
    assert (one.late, one.waited) == (1, 5)


@pytest.mark.parametrize(
    "seen", [end_of_one(0, "send", 1, (1, 3, 7)), end_of_one(1, "recv", 0, (1, 3, 7))], ids=["send", "recv"]
)
def test_one_end_stands_for_both(seen: Event) -> None:
    (one,) = transfers(Trace.merge([[seen]]))
    assert (one.link, one.waited, one.wire, one.late) == ((0, 1), 2, 4, None)


def test_a_block_that_travels_twice_is_two_transfers() -> None:
    sends = [end_of_one(0, "send", 1, (t, t, t + 1)) for t in (1, 21)]
    recvs = [end_of_one(1, "recv", 0, (t, t + 1, t + 3)) for t in (1, 21)]
    assert [one.end for one in transfers(Trace.merge([sends, recvs]))] == [4, 24]


def test_without_a_peer_or_after_prefill_there_is_no_transfer() -> None:
    token = Event(1, "decode", "recv", 0, 0, 0, 1, "token", peer=0)
    assert transfers(Trace.merge([[end_of_one(1, "recv", None, (0, 0, 1)), token]])) == []


def test_links_and_layers_are_in_order() -> None:
    events = [
        end_of_one(2, "recv", 0, (0, 0, 1), layer=3),
        end_of_one(1, "recv", 0, (0, 0, 2), layer=None),
        end_of_one(1, "recv", 0, (0, 0, 3), layer=1),
    ]
    found = transfers(Trace.merge([events]))
    assert {link: len(some) for link, some in by_link(found).items()} == {(0, 1): 2, (0, 2): 1}
    assert list(by_link_and_layer(found)) == [((0, 1), 1), ((0, 2), 3)]


def test_percentiles_are_values_that_were_measured() -> None:
    found = spread(n * S for n in range(1, 101))
    assert found == (100, 50.0, 90.0, 99.0, 100.0)
    assert spread([7 * S]) == (1, 7.0, 7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="no durations"):
        spread([])


@given(st.lists(st.integers(0, 50), min_size=1), st.floats(0.01, 1.0))
def test_a_percentile_is_the_smallest_that_enough_do_not_exceed(values: list[int], share: float) -> None:
    found = percentile(sorted(values), share)
    assert sum(value <= found for value in values) >= share * len(values) - 1e-9
    assert sum(value < found for value in values) < share * len(values) + 1e-9
