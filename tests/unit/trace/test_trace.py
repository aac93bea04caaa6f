"""Trace: figures of hand-made runs, with numbers worked by hand."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinfer.trace.events import Event
from dinfer.trace.trace import LinkFigures, RankFigures, Trace

S = 10**9


def compute(rank: int, start: int, end: int, chunk: int = 0, layer: int = 0, kind: str = "layer") -> Event:
    return Event(rank, "compute", kind, start * S, start * S, start * S, end * S, "", chunk, layer)


def transfer(
    rank: int,
    kind: str,
    peer: int,
    times: tuple[int, int, int],
    what: str = "kv",
    layer: int = 0,
    size: int = 100,
) -> Event:
    start, met, end = (time * S for time in times)
    return Event(rank, f"{what}-{kind}", kind, start, start, met, end, what, 0, layer, peer, 8, size)


# Rank 0 computes from 10 to 14 and from 16 to 20. Its block of layer 0 is on the wire from 13 to 17: one second of
# that lies in the first run, two seconds (14 to 16) in none, one in the second. Its block of layer 1 waits from 20 for
# its peer until 21 and is on the wire till 23. Then come 5 seconds of decode.
RANK_0 = [
    compute(0, 10, 14, layer=0),
    transfer(0, "send", 1, (12, 13, 17), layer=0),
    compute(0, 16, 20, layer=1),
    transfer(0, "send", 1, (20, 21, 23), layer=1, size=300),
    Event(0, "decode", "decode", 30 * S, 30 * S, 30 * S, 35 * S),
]
# Rank 1 gets both, and a hidden state that overlaps the second on the wire from 22 to 26.
RANK_1 = [
    transfer(1, "recv", 0, (11, 13, 17), layer=0),
    transfer(1, "recv", 0, (17, 21, 23), layer=1, size=300),
    transfer(1, "recv", 0, (18, 22, 26), "hidden", size=50),
    compute(1, 26, 28, layer=2),
    Event(1, "compute", "recv", 40 * S, 40 * S, 40 * S, 41 * S, "token", peer=0, bytes=8),
]
TRACE = Trace.merge([RANK_0, RANK_1], model="demo")


def test_figures_of_a_rank_that_sends() -> None:
    assert TRACE.rank_figures(0) == RankFigures(
        rank=0,
        prefill_s=13.0,  # 10 to 23
        compute_s=8.0,
        exposed_sync_s=4.0,  # 14 to 16 and 21 to 23
        decode_s=5.0,
        waiting_s=2.0,  # 12 to 13 and 20 to 21
        wire_s=6.0,  # 13 to 17 and 21 to 23
        sent_bytes=400,
        received_bytes=0,
    )


def test_figures_of_a_rank_that_receives() -> None:
    assert TRACE.rank_figures(1) == RankFigures(
        rank=1,
        prefill_s=18.0,  # from 10, when rank 0 began, to 28
        compute_s=2.0,
        exposed_sync_s=6.0,
        decode_s=0.0,
        waiting_s=7.0,  # 11 to 13 and 17 to 22: two lanes that wait at once count once
        wire_s=9.0,  # 13 to 17 and 21 to 26: two messages at once count once
        sent_bytes=0,
        received_bytes=450,
    )


def test_links_as_the_receiver_saw_them() -> None:
    assert TRACE.link_figures() == [
        LinkFigures(
            source=0, target=1, transfers=3, bytes=450, wire_s=9.0, median_transfer_s=4.0, bytes_per_s=50.0
        )
    ]


def test_links_are_ordered_and_have_a_direction() -> None:
    events = [
        transfer(2, "recv", 0, (0, 0, 1)),
        transfer(0, "recv", 2, (0, 0, 2)),
        transfer(1, "recv", 0, (0, 0, 4)),
    ]
    links = [(link.source, link.target, link.bytes_per_s) for link in Trace.merge([events]).link_figures()]
    assert links == [(0, 1, 25.0), (0, 2, 100.0), (2, 0, 50.0)]


def test_a_link_too_fast_to_measure_has_no_rate() -> None:
    (link,) = Trace.merge([[transfer(1, "recv", 0, (3, 3, 3))]]).link_figures()
    assert (link.wire_s, link.bytes_per_s) == (0.0, None)


def test_a_recv_from_nobody_known_makes_no_link() -> None:
    unknown = Event(1, "kv", "recv", 0, 0, 0, S, "kv", bytes=10)
    assert Trace.merge([[unknown]]).link_figures() == []


def test_received_blocks() -> None:
    assert TRACE.received(0) == [[True, True, False]]
    assert TRACE.received(1) == [[True, True, True]]


def test_received_has_a_place_for_every_block_that_any_rank_knows() -> None:
    trace = Trace.merge([[compute(0, 0, 1, chunk=2, layer=1)], [transfer(1, "recv", 0, (0, 0, 1), layer=0)]])
    assert trace.received(0) == [[False, False], [False, False], [False, True]]
    assert trace.received(1) == [[True, False], [False, False], [False, False]]


def test_a_send_is_no_receipt_and_an_unknown_block_no_block() -> None:
    trace = Trace.merge([[transfer(0, "send", 1, (0, 0, 1)), Event(0, "x", "recv", 0, 0, 0, 1, "kv")]])
    assert trace.received(0) == [[False]]


def test_an_empty_trace() -> None:
    trace = Trace(())
    assert (trace.ranks, trace.began, trace.link_figures(), trace.received(0)) == ([], 0, [], [])


def test_a_rank_without_events() -> None:
    with pytest.raises(
        ValueError, match=r"rank 7 has no events in this trace; ranks with events: \[0, 1\]\."
    ):
        TRACE.rank_figures(7)


def test_a_rank_that_only_decodes_spent_no_time_on_prefill() -> None:
    figures = Trace.merge([[Event(0, "decode", "decode", 7 * S, 7 * S, 7 * S, 9 * S)]]).rank_figures(0)
    assert figures == RankFigures(0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0, 0)


def token(rank: int, kind: str, index: int, start: float, end: float) -> Event:
    at, until = int(start * S), int(end * S)
    return Event(rank, "decode", kind, at, at, at, until, what="token", tokens=1, index=index)


def test_time_to_first_token_is_apart_from_prefill() -> None:
    first = Event(0, "compute", "layer", 2 * S, 2 * S, 2 * S, 3 * S, chunk=0, layer=0)
    late = Event(1, "kv-in:0", "recv", 3 * S, 3 * S, 8 * S, 9 * S, "kv", 0, 0, 0, 1, 4)
    zero = [first, token(0, "decode", 0, 3, 4), token(0, "all_gather", 0, 4, 5), token(0, "decode", 1, 5, 6)]
    one = [late, token(1, "decode", 0, 4, 4.5), token(1, "all_gather", 0, 4.5, 5.5)]
    again = [token(1, "decode", 0, 20, 21), token(1, "all_gather", 0, 21, 22)]  # taken back, and made again
    trace = Trace.merge([zero, one + again])
    assert [trace.rank_figures(rank).ttft_s for rank in (0, 1)] == [2.0, 2.5]
    assert trace.ttft_s == 2.5
    assert trace.rank_figures(1).prefill_s == 7.0, "its last block came after the first token"
    assert "ttft s" in str(trace)


def test_without_new_tokens_there_is_no_time_to_the_first() -> None:
    bare = Trace.merge([[Event(0, "compute", "layer", 0, 0, 0, S, chunk=0, layer=0)]])
    assert (bare.ttft_s, bare.rank_figures(0).ttft_s) == (None, None)
    assert "ttft" not in str(bare)


def test_prefill_leaves_out_decode_and_tokens() -> None:
    assert len(TRACE.events) == 10
    assert [e for e in TRACE.events if e not in set(TRACE.prefill())] == [RANK_0[-1], RANK_1[-1]]


def test_merge_orders_by_end_and_keeps_what_describes_the_run() -> None:
    assert [event.end // S for event in TRACE.events] == [14, 17, 17, 20, 23, 23, 26, 28, 35, 41]
    assert TRACE.about == {"model": "demo"}
    assert TRACE.ranks == [0, 1]
    assert TRACE.began == 10 * S


@given(st.randoms(use_true_random=False))
def test_merge_does_not_depend_on_who_comes_first(random: Random) -> None:
    parts = [list(RANK_0), list(RANK_1)]
    random.shuffle(parts)
    for part in parts:
        random.shuffle(part)
    assert Trace.merge(parts, model="demo") == TRACE


def test_figures_use_every_kind_of_compute() -> None:
    kinds = ("embed", "layer", "norm", "send", "recv", "other")
    events = [compute(0, 2 * at, 2 * at + 1, kind=kind) for at, kind in enumerate(kinds)]
    assert Trace.merge([events]).rank_figures(0).compute_s == 3.0


def test_the_check_before_decode_and_what_it_finds_are_no_part_of_prefill() -> None:
    layer = Event(0, "main", "layer", 0, 0, 0, 2 * S, chunk=0, layer=0)
    found = Event(0, "main", "corrupt", 3 * S, 3 * S, 3 * S, 3 * S, "kv", 0, 0, peer=1, bytes=64)
    check = Event(0, "decode", "check", 4 * S, 4 * S, 4 * S, 9 * S, bytes=64)
    figures = Trace.merge([[layer, found, check]]).rank_figures(0)
    assert (figures.prefill_s, figures.exposed_sync_s, figures.check_s) == (2.0, 0.0, 5.0)
    assert figures == Trace.merge([[layer]]).rank_figures(0)._replace(check_s=5.0)
