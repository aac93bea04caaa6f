"""Simulated time: small plans whose times can be told by hand, and what must hold for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinfer.plan.graph import NONE, Channel, Graph
from dinfer.plan.ops import Op, PlanError
from dinfer.plan.partition import Shape, partition
from dinfer.plan.schedule import build
from dinfer.plan.timing import timed


@dataclass(frozen=True)
class Even:
    """A layer takes a second; `speed` bytes a second are shared by all messages; a token has one byte."""

    speed: float = 1.0
    delay: float = 0.0
    buffer: float = 0.0
    encode: float = 0.0
    decode: float = 0.0

    def compute(self, _: int, op: Op, __: Shape) -> float:
        return 1.0 if op.kind == "layer" else 0.0

    def message(self, op: Op) -> int:
        return op.tokens

    def coding(self, op: Op) -> tuple[float, float]:
        return (self.encode, self.decode) if op.what == "kv" else (0.0, 0.0)

    def latency(self, _: Channel) -> float:
        return self.delay

    def ahead(self, _: Channel) -> float:
        return self.buffer

    def rates(self, moving: Sequence[Channel]) -> Sequence[float]:
        return [self.speed / len(moving)] * len(moving)


def graph(schedule: str = "pipelined", strategy: str = "pairwise", chunks: int = 1, ranks: int = 2) -> Graph:
    shape = partition(layers=ranks, tokens=4 * chunks, world_size=ranks, chunk_size=4)
    return Graph(build(shape, schedule, strategy))  # type: ignore[arg-type]


def test_a_hidden_state_and_a_block_share_the_wire() -> None:
    made = timed(graph(), Even())
    ends = {str(op): round(made.times[n].end, 9) for n, op in enumerate(graph().ops)}
    assert ends["layer c0 l0"] == 1
    assert ends["recv hidden c0 l1 <- 0, 4 tokens"] == ends["recv kv c0 l0 <- 0, 4 tokens"] == 1 + 8
    assert ends["layer c0 l1"] == 10
    # The last block's four bytes beside the final state's one: two seconds for two bytes, three for the rest.
    assert ends["recv final <- 1, 1 token"] == 12
    assert made.makespan == ends["recv kv c0 l1 <- 1, 4 tokens"] == 15


def test_a_codec_takes_its_time_before_and_after_the_wire_and_none_of_the_layers() -> None:
    made = timed(graph(), Even(1e9, encode=3.0, decode=0.5))
    ends = {str(op): round(made.times[n].end, 6) for n, op in enumerate(graph().ops)}
    assert ends["layer c0 l1"] == 2
    assert ends["send kv c0 l0 -> 1, 4 tokens"] == 1 + 3
    assert ends["recv kv c0 l0 <- 0, 4 tokens"] == 1 + 3.5


def test_what_waits_for_the_wire_is_encoded_meanwhile() -> None:
    slow = graph(chunks=2)
    without = timed(slow, Even(0.1)).makespan
    assert timed(slow, Even(0.1, encode=3.0)).makespan < without + 2 * 3.0


def test_what_is_passed_on_is_not_encoded_again() -> None:
    made = timed(graph(strategy="ring", ranks=3), Even(1e9, encode=3.0))
    ops = graph(strategy="ring", ranks=3)
    ends = {f"{ops.ranks[n]} {op}": round(made.times[n].end, 6) for n, op in enumerate(ops.ops)}
    assert ends["1 send kv c0 l0 -> 2, 4 tokens"] == 1 + 3


def test_latency_comes_before_bytes_and_takes_nothing_of_the_wire() -> None:
    assert timed(graph(), Even(1e9, delay=2.0)).makespan == pytest.approx(1 + 2 + 1 + 2, abs=1e-6)


def test_a_send_ends_before_its_recv_by_what_buffers_hold() -> None:
    buffered = Even(buffer=3.0)
    times = dict(zip(map(str, graph("lockstep").ops), timed(graph("lockstep"), buffered).times, strict=True))
    sent, came = times["send kv c0 l0 -> 1, 4 tokens"], times["recv kv c0 l0 <- 0, 4 tokens"]
    assert (sent.end, came.end) == (2, 5)
    assert sent.met == came.met == 1
    # The next message of the lane shares the wire with what is still on its way.
    assert times["send hidden c0 l1 -> 1, 4 tokens"].start == 2
    assert timed(graph("lockstep"), Even(buffer=1e9)).times[0].end == 0


def test_a_pipeline_fills_and_lockstep_does_not() -> None:
    fast = Even(1e9)
    assert timed(graph(chunks=8), fast).makespan == pytest.approx(9, abs=1e-6)
    assert timed(graph("lockstep", chunks=8), fast).makespan == pytest.approx(16, abs=1e-6)


def test_a_plan_that_hangs_takes_no_time_that_could_be_told() -> None:
    with pytest.raises(PlanError, match="can hang"):
        timed(graph("batched"), Even())


@settings(max_examples=60, deadline=None)
@given(
    ranks=st.integers(1, 4),
    chunks=st.integers(1, 5),
    schedule=st.sampled_from(["pipelined", "lockstep"]),
    strategy=st.sampled_from(["pairwise", "ring"]),
    speed=st.floats(0.1, 100),
    buffer=st.sampled_from([0.0, 1.5, 100.0]),
)
def test_order_and_work_are_kept(
    ranks: int, chunks: int, schedule: str, strategy: str, speed: float, buffer: float
) -> None:
    made = graph(schedule, strategy, chunks, ranks)
    found = timed(made, Even(speed, buffer=buffer))
    for n, (ready, start, met, end) in enumerate(found.times):
        assert ready <= start <= met <= end <= found.makespan
        for earlier in (*made.deps[n], made.before[n]):
            assert earlier == NONE or found.times[earlier].end <= start
        if made.partner[n] != NONE and made.ops[n].kind == "send":
            came = found.times[made.partner[n]]
            assert came.met == met
            assert end <= came.end if buffer else end == came.end
    sent = sum(op.tokens for op in made.ops if op.kind == "send")
    assert found.makespan >= max(sent / speed * (1 - 1e-9), chunks)
