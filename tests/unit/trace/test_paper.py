"""A trace on paper: every op of the plan once, in an order that the plan allows."""

from __future__ import annotations

import pytest

from dinfer.plan.graph import NONE, Graph
from dinfer.plan.partition import partition
from dinfer.plan.plan import OpPlace, Plan
from dinfer.plan.schedule import build
from dinfer.trace.simulated import Machine, paper_trace
from dinfer.trace.transfers import by_link, spread, transfers


def plan(schedule: str = "pipelined", strategy: str = "pairwise") -> Plan:
    return build(partition(layers=6, tokens=40, world_size=3, chunk_size=8), schedule, strategy)  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", ["pipelined", "lockstep"])
@pytest.mark.parametrize("strategy", ["pairwise", "ring"])
def test_each_op_begins_once_what_it_needs_is_there(schedule: str, strategy: str) -> None:
    made = plan(schedule, strategy)
    trace, graph = paper_trace(made), Graph(made)
    lanes = [[lane.name for lane in rank] for rank in made.lanes]
    at = {OpPlace(e.rank, lanes[e.rank].index(e.lane), e.index or 0): e for e in trace.events}
    assert len(at) == len(trace.events) == len(graph.ops)
    for number in range(len(graph.ops)):
        event = at[graph.place(number)]
        assert event.ready <= event.start <= event.met < event.end
        for earlier in (*graph.deps[number], graph.before[number]):
            assert earlier == NONE or at[graph.place(earlier)].end <= event.start
        if (peer := graph.partner[number]) != NONE:
            other = at[graph.place(peer)]
            assert (other.met, other.end, other.bytes) == (event.met, event.end, event.bytes)


def test_a_slow_link_is_slow_and_a_seed_repeats() -> None:
    machine = Machine(slow={(0, 1): 10}, jitter=0.1)
    trace = paper_trace(plan(), machine)
    medians = {
        link: spread(one.wire for one in found).p50 for link, found in by_link(transfers(trace)).items()
    }
    assert medians[0, 1] > 8 * medians[0, 2]
    assert paper_trace(plan(), machine) == trace
    assert paper_trace(plan(), Machine(slow={(0, 1): 10}, jitter=0.1, seed=1)) != trace
