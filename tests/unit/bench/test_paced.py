"""A link that is slowed down without root: when payloads arrive, and what goes first."""

from __future__ import annotations

import threading
from time import perf_counter

import pytest
import torch

from dinfer.bench import paced
from dinfer.bench.paced import PacedComm
from dinfer.plan.graph import Channel
from dinfer.plan.ops import Value
from dinfer.transport.gate import Gate
from dinfer.transport.header import Header
from dinfer.transport.in_process import Exchange
from tests.support.runs import wait_for

NBYTES = 64 * 1024


class Pair:
    """Two ranks, of which the second receives at `bytes_per_s`."""

    def __init__(self, bytes_per_s: float) -> None:
        exchange = Exchange(2, Gate())
        self.source = exchange.comm(0)
        self.target = PacedComm(exchange.comm(1), {(0, 1): bytes_per_s})

    def send(self, what: str, number: int) -> threading.Thread:
        channel = Channel(what, 0, 1)
        payload = torch.full((NBYTES,), number, dtype=torch.uint8)
        header = Header(0, Value(what, 0, 0), 0, "float32", NBYTES).pack()  # type: ignore[arg-type]
        thread = threading.Thread(target=self.source.send, args=(channel, header, payload))
        thread.start()
        return thread

    def receive(self, what: str) -> torch.Tensor:
        channel = Channel(what, 0, 1)
        self.target.recv_header(channel)
        out = torch.empty(NBYTES, dtype=torch.uint8)
        self.target.recv_payload(channel, out)
        return out


def test_a_payload_arrives_whole_when_the_link_would_have_carried_it() -> None:
    pair = Pair(NBYTES / 0.02)
    sender, began = pair.send("kv", 7), perf_counter()
    assert bool((pair.receive("kv") == 7).all())
    assert perf_counter() - began >= 0.02
    sender.join()


def test_a_hidden_state_goes_before_the_rest_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """The block has just begun when the hidden state comes."""
    order, begun = list[str](), threading.Event()

    def sleep(_: float) -> None:
        begun.set()
        assert came.wait(60)

    came = threading.Event()
    monkeypatch.setattr(paced, "sleep", sleep)
    pair = Pair(NBYTES)  # a second each, were time not made up
    pair.send("kv", 1)
    pair.send("hidden", 2)

    def take(what: str) -> None:
        pair.receive(what)
        order.append(what)

    block = threading.Thread(target=take, args=("kv",), daemon=True)
    block.start()
    assert begun.wait(60)
    hidden = threading.Thread(target=take, args=("hidden",), daemon=True)
    hidden.start()
    wait_for(lambda: pair.target._hidden[0], "the hidden state waits for the link")
    came.set()
    hidden.join(60)
    block.join(60)
    assert order == ["hidden", "kv"]


def test_other_links_are_as_fast_as_ever() -> None:
    pair = Pair(1.0)
    pair.target._speeds = {(2, 1): 1.0}
    pair.send("kv", 3)
    assert bool((pair.receive("kv") == 3).all())
