"""What `dinfer bench links` makes of what ranks have measured."""

from __future__ import annotations

import os
from itertools import permutations

import pytest

from dinfer.bench.link_rank import RankLinks, TimedPlan
from dinfer.bench.links import cell, check_asked, codecs_of, hidden_figures, machine_of, rate_of, table
from dinfer.config import Config, ConfigError
from dinfer.engine.measure import Measured
from dinfer.plan.partition import partition
from dinfer.plan.plan import Plan
from dinfer.plan.schedule import build
from dinfer.planner.costs import LayerTime
from dinfer.planner.machine import CodecCost, Links, LinkSpeed
from dinfer.trace.simulated import paper_trace
from dinfer.trace.transfers import Transfer, transfers

PLAN = build(partition(layers=3, tokens=32, world_size=3, chunk_size=8), "pipelined", "pairwise")
LINKS = Links(tuple(LinkSpeed(*pair, 1e-4, 1e6, 5e5) for pair in permutations(range(3), 2)))


def ranks(plan: Plan, seconds: float, layer_s: float = 0.01) -> list[RankLinks]:
    """Three ranks whose layers take 10 ms for 8 tokens, and 20 ms in the run."""
    times = [LayerTime(0, 8, layer_s), LayerTime(0, 16, 2 * layer_s)]
    events = paper_trace(plan, machine_of([one(times) for _ in range(3)])).events
    return [
        one(
            times,
            TimedPlan(
                [seconds, seconds + n],
                [(f"layer c{chunk} l{n}", 2 * layer_s) for chunk in range(4)],
                [event for event in events if event.rank == n],
                "same",
            ),
        )
        for n in range(3)
    ]


def one(times: list[LayerTime], *plans: TimedPlan) -> RankLinks:
    found = Measured(times, [], list(LINKS.speeds), 64, 128, [CodecCost("int8", 0.25, 1e-4, 1e-4)])
    return RankLinks(found, list(plans))


def test_a_rate_is_in_bits_per_second() -> None:
    assert [rate_of(text) for text in ("1gbit", "0.1 gbit".replace(" ", ""), "100MBIT")] == [
        10**9,
        10**8,
        10**8,
    ]


def test_without_root_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000, raising=False)
    with pytest.raises(ConfigError) as error:
        check_asked(Config(world_size=3), ["1gbit"])
    assert str(error.value) == (
        "bench links needs hosts of its own, which cannot be made here: only root can make network namespaces. Run it "
        "as root where iproute2 is, or dinfer bench prefill, which needs no hosts."
    )
    monkeypatch.setattr(
        "dinfer.bench.links.why_not", lambda: "network namespaces cannot be used here: no kernel"
    )
    with pytest.raises(
        ConfigError, match="cannot be made here: network namespaces cannot be used here: no kernel"
    ):
        check_asked(Config(world_size=3), ["1gbit"])


def test_a_cell_has_what_was_measured_and_both_simulations() -> None:
    measured = ranks(PLAN, 0.5)
    found = cell(PLAN, "none", measured, 0, machine_of(measured))
    coded = cell(PLAN, "int8", measured, 0, machine_of(measured))
    assert coded["codec"] == "int8"
    assert coded["planned_bytes"] < found["planned_bytes"]
    assert (found["strategy"], found["schedule"], found["codec"]) == ("pairwise", "pipelined", "none")
    assert found["rounds_s"] == [0.5, 2.5], "the slowest rank of each round"
    assert found["measured_s"] == 1.5
    assert found["same_kv"]
    # Three stages, four chunks: six layers one after another, and what the wires add.
    assert 6 * 0.01 < found["predicted_s"] < 6 * 0.01 + 0.03
    assert 6 * 0.02 < found["makespan_s"] < 6 * 0.02 + 0.03
    assert found["over_makespan"] == pytest.approx(1.5 / found["makespan_s"] - 1)
    result = {"tokens": 32, "chunk_size": 8, "layers": 3, "threads": 1, "repeats": 2}
    assert "pairwise  pipelined" in table({**result, "cells": [{"rate": "1gbit", "hosts": 3, **found}]})


def test_hidden_states_that_go_first_take_what_they_take_alone() -> None:
    trace = paper_trace(PLAN, machine_of(ranks(PLAN, 0.5)))
    figures = hidden_figures(transfers(trace), LINKS)
    assert figures["wire_s"] == pytest.approx(figures["alone_s"], rel=0.01)
    assert figures["beside_kv_s"] > 0


def test_a_hidden_state_beside_blocks_is_seen() -> None:
    ms = 1_000_000
    hidden = Transfer(0, 1, "hidden", 0, 1, 1000, 0, 0, 3 * ms, None)
    block = Transfer(0, 2, "kv", 0, 0, 1000, 0, ms, 9 * ms, None)
    other = Transfer(2, 0, "kv", 0, 0, 1000, 0, 0, 9 * ms, None)  # the other way
    figures = hidden_figures([hidden, block, other], LINKS)
    assert figures == pytest.approx({"wire_s": 0.003, "alone_s": 0.0011, "beside_kv_s": 0.002})


def test_codecs_are_named_with_a_plus_for_their_own_comma() -> None:
    assert codecs_of("none,int8,k=int8+v=fp8") == ["none", "int8", "k=int8,v=fp8"]
    with pytest.raises(ConfigError, match="codec is 'int7'; it must be one of none, lossless"):
        codecs_of("none,int7")
