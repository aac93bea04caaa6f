"""Hidden states go before blocks, for a time; and blocks of slow links come in pieces that both ends know."""

from __future__ import annotations

import threading

import pytest
import torch

from dinfer.plan.graph import Channel
from dinfer.plan.ops import Value
from dinfer.transport import precedence as room
from dinfer.transport.header import VOID_HEADER, Header
from dinfer.transport.precedence import (
    PIECE_S,
    PROBE,
    PROBE_EVERY,
    SMALLEST,
    Precedence,
    cut,
    pieces_in,
    with_pieces,
)
from tests.support.runs import wait_for

KV, HIDDEN, MB = Channel("kv", 0, 1), Channel("hidden", 0, 1), 1 << 20


def test_a_link_is_probed_and_blocks_of_a_slow_one_come_in_pieces() -> None:
    made = Precedence()
    assert made.pieces(KV, MB) == PROBE
    made.sent(KV, MB, PROBE, 0.0005)
    assert [made.pieces(KV, MB) for _ in range(PROBE_EVERY)] == [1] * (PROBE_EVERY - 1) + [PROBE]
    made.sent(KV, MB, 1, 60.0)  # of one piece nothing is learnt
    assert made.pieces(KV, MB) == 1
    made.sent(KV, MB, PROBE, 4 * PIECE_S)  # in which half of it arrived
    assert made.pieces(KV, MB) == 8
    assert made.pieces(HIDDEN, MB) == made.pieces(KV, 1000) == 1
    made.sent(KV, MB, 8, 60.0)
    assert made.pieces(KV, MB) == MB // SMALLEST


def test_pieces_are_all_of_the_payload_and_the_header_says_how_many() -> None:
    header = Header(7, Value("kv", 1, 2), 3, "float32", 24, digests=(5, 6), changed=1).pack()
    told = with_pieces(header, 5)
    assert (pieces_in(header), pieces_in(VOID_HEADER), pieces_in(told)) == (1, 1, 5)
    assert Header.unpack(told) == Header.unpack(header)
    assert Header.unpack(told).digests == (5, 6)
    payload = torch.arange(24, dtype=torch.uint8)
    parts = cut(payload, 5)
    assert torch.equal(torch.cat(parts), payload)
    assert all(part.is_contiguous() for part in parts)
    parts[4].zero_()
    assert not payload[-4:].any(), "a received piece lands in the payload"


def test_blocks_wait_for_a_hidden_state_that_travels_the_same_way() -> None:
    made, passed = Precedence(), threading.Event()

    def block() -> None:
        made.give_way("out")
        passed.set()

    thread = threading.Thread(target=block)
    with made.hidden("out"):
        made.give_way("in")  # at once: nothing travels that way
        thread.start()
        wait_for(lambda: made._changed._waiters, "the block waits")  # type: ignore[attr-defined]
        assert not passed.is_set()
    assert passed.wait(60)
    thread.join()


def test_a_hidden_state_that_stands_still_holds_nobody_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "LONGEST_S", 0.01)
    made = Precedence()
    with made.hidden("in"):
        made.give_way("in")
