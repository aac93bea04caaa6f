"""What messages get of links that others use at the same time."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinfer.plan.graph import Channel, Graph
from dinfer.plan.lower import by_stream, lower
from dinfer.plan.ops import parse_op
from dinfer.plan.partition import partition
from dinfer.plan.schedule import build
from dinfer.plan.timing import timed
from dinfer.planner.choose import Candidate, Planner, even_lengths, even_starts
from dinfer.planner.costs import LayerCost
from dinfer.planner.machine import CodecCost, Links, LinkSpeed, MeasuredMachine

PAIRS = list(permutations(range(3), 2))


def links(alone: float = 100.0, together: float = 50.0) -> Links:
    """Three hosts with one interface each, which two links fill."""
    return Links(tuple(LinkSpeed(*pair, 1e-4, alone, together) for pair in PAIRS))


def kv(source: int, target: int) -> Channel:
    return Channel("kv", source, target)


def test_two_messages_share_an_interface_and_a_third_goes_beside_them() -> None:
    assert links().rates([kv(0, 1)]) == [100]
    assert links().rates([kv(0, 1), kv(0, 2)]) == [50, 50]
    assert links().rates([kv(0, 2), kv(1, 2)]) == [50, 50]
    assert links().rates([kv(0, 1), kv(1, 2), kv(2, 0)]) == [100, 100, 100]
    # 0 sends to 1 and 2, which gets from 1 as well: nobody is slowed by a bound that another has reached.
    assert links().rates([kv(0, 1), kv(0, 2), kv(1, 2)]) == [50, 50, 50]


def test_what_one_message_cannot_use_is_left_to_the_others() -> None:
    slow = tuple(one._replace(alone=10, together=10) if one[:2] == (0, 1) else one for one in links().speeds)
    assert Links(slow).rates([kv(0, 1), kv(0, 2)]) == [10, 90]


def test_wires_of_their_own_are_not_shared() -> None:
    assert links(100, 100).rates([kv(0, 1), kv(0, 2)]) == [100, 100]


def test_a_hidden_state_goes_first() -> None:
    hidden = Channel("hidden", 0, 1)
    assert links().rates([hidden, kv(0, 2)]) == [100, 0]
    assert links().rates([kv(0, 2), kv(2, 1), kv(2, 0), hidden]) == [0, 0, 100, 100]
    assert links(100, 100).rates([hidden, kv(0, 2), kv(0, 1)]) == [100, 100, 0]


def test_on_streams_a_hidden_state_shares_with_blocks() -> None:
    assert replace(links(), hidden_first=False).rates([Channel("hidden", 0, 1), kv(0, 2)]) == [50, 50]


def test_a_network_that_carries_less_than_its_links_is_shared_by_all() -> None:
    assert links(100, 20).rates([kv(0, 1), kv(1, 2), kv(2, 0)]) == [40, 40, 40]


@given(
    st.lists(st.tuples(st.floats(1, 1e3), st.floats(1, 1e3)), min_size=6, max_size=6),
    st.lists(st.sampled_from(PAIRS), min_size=1, max_size=12),
)
def test_no_bound_is_passed_and_nobody_waits(
    speeds: list[tuple[float, float]], used: list[tuple[int, int]]
) -> None:
    made = Links(tuple(LinkSpeed(*pair, 0.0, *speed) for pair, speed in zip(PAIRS, speeds, strict=True)))
    rates = made.rates([kv(*pair) for pair in used])
    assert all(rate > 0 for rate in rates)
    assert made.rates([*(kv(*pair) for pair in used), Channel("hidden", *used[0])])[-1] > 0
    for pair in set(used):
        both = sum(rate for one, rate in zip(used, rates, strict=True) if one == pair)
        assert both <= made.by_link[pair].alone * (1 + 1e-9)


def test_a_codec_sends_fewer_bytes_and_takes_time_for_each_token() -> None:
    codecs = CodecCost("int8", 0.25, 1e-6, 2e-6), CodecCost("fp8", 0.35, 3e-6, 4e-6)
    machine = MeasuredMachine((LayerCost(1.0),) * 3, links(), 4, 800, codecs=codecs)
    block, hidden = parse_op("send kv c0 l0 -> 1, 4 tokens"), parse_op("send hidden c0 l1 -> 1, 4 tokens")
    assert (machine.message(block), machine.coding(block)) == (3200, (0.0, 0.0))
    machine = replace(machine, codec="int8")
    assert (machine.message(block), machine.message(hidden)) == (800, 16)
    assert machine.coding(block) == pytest.approx((4e-6, 8e-6))
    assert machine.coding(hidden) == (0.0, 0.0)
    assert replace(machine, codec="k=int8,v=fp8").message(block) == pytest.approx(3200 * 0.3)
    assert 1600 < replace(machine, codec="k=int4,v=none").message(block) < 3200 * 0.7  # int4 was not measured
    assert MeasuredMachine.of(json.loads(json.dumps(machine.as_dict()))) == machine


def test_a_measured_op_counts_in_place_of_the_cost_and_json_keeps_the_machine() -> None:
    shape = partition(layers=3, tokens=8, world_size=3, chunk_size=4)
    layer = parse_op("layer c1 l0")
    machine = MeasuredMachine((LayerCost(1.0),) * 3, links(), 4, 8, {(1, layer): 5.0})
    assert (machine.compute(0, layer, shape), machine.compute(1, layer, shape)) == (1.0, 5.0)
    assert machine.compute(0, parse_op("embed c0"), shape) == 0
    assert machine.message(parse_op("send kv c0 l0 -> 1, 4 tokens")) == 32
    again = MeasuredMachine.of(json.loads(json.dumps(machine.as_dict())))
    assert (again.layers, again.links.speeds) == (machine.layers, machine.links.speeds)
    assert again.latency(kv(2, 0)) == pytest.approx(1e-4)


PLAN = build(partition(layers=6, tokens=64, world_size=3, chunk_size=16), "pipelined", "pairwise")
LAYER = LayerCost(1e-3, 0, 1e-4, 0)


def machine(*, padded: bool = False, streams: bool = False, speed: float = 1e9) -> MeasuredMachine:
    alike = Links(tuple(LinkSpeed(*pair, 1e-5, speed, speed) for pair in PAIRS), hidden_first=not streams)
    return MeasuredMachine((LAYER, LAYER, LAYER), alike, 64, 128, padded=padded, streams=streams)


def test_on_streams_ops_run_beside_one_another_though_one_lane_issues_them() -> None:
    issued, one_lane, lanes = lower(PLAN), machine(speed=3e6), machine(streams=True, speed=3e6)
    split = by_stream(issued)
    assert {lane.name for lane in split.lanes[1]} == {"compute", "hidden:0", "hidden:2", "kv:0", "kv:2"}
    assert {lane.name for lane in split.lanes[0]} >= {"entry", "compute"}
    assert sorted(str(op) for lane in split.lanes[1] for op in lane.ops) == sorted(
        str(op) for op in issued.lanes[1][0].ops
    )
    serial, beside = timed(Graph(issued), one_lane), timed(Graph(lanes.as_run(PLAN)), lanes)
    assert beside.makespan < 0.9 * serial.makespan
    assert beside.makespan == pytest.approx(timed(Graph(PLAN), one_lane).makespan, rel=0.1)
    assert lanes.as_run(issued) == split, "also of a plan that is lowered"
    assert machine().as_run(PLAN) == PLAN


def test_by_graphs_a_chunk_takes_as_long_as_the_longest_of_its_plan() -> None:
    """So the planner takes equal ones: a shorter chunk saves nothing."""
    shape = partition(layers=6, tokens=64, world_size=3, chunk_size=48)
    last = parse_op("layer c1 l0")
    assert machine().compute(0, last, shape) == pytest.approx(LAYER.seconds(48, 16))
    assert machine(padded=True).compute(0, last, shape) == pytest.approx(LAYER.seconds(48, 48))
    default = Candidate(even_starts(6, 3), even_lengths(64, 1), "pipelined", "pairwise")
    chosen = Planner(machine(padded=True, streams=True), 6).choose(default, ["chunk_size"]).candidate
    assert max(chosen.lengths) - min(chosen.lengths) <= 1


def test_how_ops_run_is_kept_as_json() -> None:
    found = machine(padded=True, streams=True)
    assert MeasuredMachine.of(json.loads(json.dumps(found.as_dict()))) == found
