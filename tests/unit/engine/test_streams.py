"""Ranks that issue to streams: lowered plans run to the end, and plans that break a pair's order hang, as on NCCL."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dinfer.engine.board import Board
from dinfer.engine.lanes import Execution
from dinfer.engine.streams import StreamExecutor
from dinfer.model.decoder import Decoder
from dinfer.plan.lower import lower
from dinfer.plan.ops import PlanError
from dinfer.plan.partition import partition
from dinfer.plan.plan import Lane, Plan
from dinfer.plan.schedule import build
from dinfer.plan.verify import verify
from dinfer.run.failure import RankFailed
from dinfer.run.stepper import Stepper
from dinfer.transport.in_process import StreamOrder
from tests.support.expected import differing_blocks, expected, is_complete
from tests.support.plan_strategies import SAFE_SCHEDULES, plans, shapes_of
from tests.support.seeded_gate import SeededGate
from tests.support.twin import prompt, twin

LAYERS, TOKENS, CHUNK = 3, 5, 2
IDS = list(prompt(TOKENS))
SHAPES = st.integers(1, 3).flatmap(
    lambda world_size: shapes_of(world_size, layers=LAYERS, tokens=TOKENS, chunk_size=CHUNK)
)
ORDERS = st.sampled_from(("pairs", "serial"))
QUICK = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], phases=[Phase.generate])


def ends_well(
    decoder: Decoder, plan: Plan, order: StreamOrder, seed: int, *, rendezvous: bool = True
) -> bool:
    """Whether it runs through on streams: False where it stands still for ever."""
    gate = SeededGate(seed)
    config = {"world_size": plan.world_size, "chunk_size": CHUNK, "unsafe": True, "backend": "nccl"}
    with twin(decoder, gate=gate, rendezvous=rendezvous, streams=order, **config) as made:
        made.go(made.prepare(IDS, plan))
        assert gate.wait(lambda: gate.stuck() or None, 60), "a stream neither ended nor waits"
        return is_complete(made, expected(decoder, IDS, CHUNK))


@QUICK
@given(
    plan=plans(SHAPES, schedules=SAFE_SCHEDULES),
    order=ORDERS,
    seed=st.integers(0, 99),
    rendezvous=st.booleans(),
)
def test_lowered_plans_run_through_bit_equal_to_the_reference(
    decoders: dict[str, Decoder], plan: Plan, order: StreamOrder, seed: int, rendezvous: bool
) -> None:
    assert ends_well(decoders["small"], lower(plan), order, seed, rendezvous=rendezvous)


def swapped(plan: Plan, rank: int) -> Plan:
    """The lowered plan with a send and the recv that follows it on one communicator and peer in the other order."""
    ops = list(plan.lanes[rank][0].ops)
    pair = next(
        n
        for n, (a, b) in enumerate(pairwise(ops))
        if {a.kind, b.kind} == {"send", "recv"} and a.what == b.what == "kv" and a.peer == b.peer
    )
    ops[pair], ops[pair + 1] = ops[pair + 1], ops[pair]
    lanes = [*plan.lanes]
    lanes[rank] = (Lane(lanes[rank][0].name, tuple(ops)),)
    return replace(plan, lanes=tuple(lanes))


@pytest.fixture
def broken() -> Plan:
    """Two ranks that issue one pair of block transfers in different orders."""
    shape = partition(layers=LAYERS, tokens=TOKENS, world_size=2, chunk_size=CHUNK)
    return swapped(lower(build(shape, "pipelined", "pairwise")), 0)


@pytest.mark.parametrize("order", ["pairs", "serial"])
def test_an_order_that_differs_between_the_ranks_of_a_pair_hangs(
    small: Decoder, broken: Plan, order: StreamOrder
) -> None:
    verdict = verify(broken)
    assert not verdict.proved
    assert verdict.flaw == "pair order"
    assert not ends_well(small, broken, order, seed=1)


def test_what_threads_can_run_may_hang_on_streams(small: Decoder) -> None:
    """Of lanes laid one after another the first waits for what a later one would make: verify says so."""
    shape = partition(layers=LAYERS, tokens=TOKENS, world_size=2, chunk_size=CHUNK)
    plan = build(shape, "pipelined", "pairwise")
    joined = tuple(
        (Lane("issue", tuple(op for lane in reversed(rank) for op in lane.ops)),) for rank in plan.lanes
    )
    unlowered = replace(plan, lanes=joined)
    assert verify(plan).proved
    assert not verify(unlowered).proved
    assert not ends_well(small, unlowered, "pairs", seed=1)


def test_issuing_takes_one_lane_a_rank(small: Decoder) -> None:
    with twin(small, world_size=2, chunk_size=CHUNK) as made:
        engine = made.engines[0]
        made.prepare(IDS)
        executor = engine.executor
        given = Execution(
            executor.state, engine.comm, engine.gate, executor.recorder, Board(), lambda *_: None
        )
        with pytest.raises(PlanError, match="rank 0 can issue one lane only"):
            StreamExecutor(given, made.exchange.comm(0).open_streams(small.device, 0))


def test_two_engines_agree_whether_lanes_are_threads_or_streams(small: Decoder) -> None:
    caches = []
    for backend in ("gloo", "nccl"):
        with twin(small, world_size=3, chunk_size=CHUNK, backend=backend) as made:
            made.all(lambda engine: engine.prefill_phase(IDS))
            assert made.all(lambda engine: engine.decode_phase())
            caches.append([engine.kv_caches(TOKENS) for engine in made.engines])
    for threads, streams in zip(*caches, strict=True):
        for (k, v), (other_k, other_v) in zip(threads, streams, strict=True):
            assert torch.equal(k, other_k)
            assert torch.equal(v, other_v)


def test_a_wrong_message_is_told_with_what_was_expected(small: Decoder, broken: Plan) -> None:
    """Here a block is sent in another's place, as a broken rank would."""
    lowered = swapped(broken, 0)
    ops = list(lowered.lanes[0][0].ops)
    first, second = [n for n, op in enumerate(ops) if op.kind == "send" and op.what == "kv"][:2]
    ops[first], ops[second] = ops[second], ops[first]
    wrong = replace(lowered, lanes=((Lane("issue", tuple(ops)),), *lowered.lanes[1:]))
    gate = SeededGate(3)
    config = {"world_size": 2, "chunk_size": CHUNK, "unsafe": True, "backend": "nccl"}
    with twin(small, gate=gate, rendezvous=True, **config) as made:
        fleet = made.prepare(IDS, wrong)
        made.go(fleet)
        with pytest.raises(
            RankFailed, match=r"rank 1 failed at `recv kv .*the plan expects block .*sent block"
        ):
            fleet.wait(lambda _: gate.stuck(), 30)


@pytest.mark.parametrize("order", ["pairs", "serial"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_an_issued_run_is_paused_stepped_and_taken_back(
    small: Decoder, order: StreamOrder, seed: int
) -> None:
    wanted = expected(small, IDS, CHUNK)
    with twin(
        small, gate=SeededGate(seed), streams=order, world_size=3, chunk_size=CHUNK, backend="nccl"
    ) as made:
        stepper = Stepper(made.prepare(IDS), timeout=60)
        stepper.step("layer", 2)
        stepper.resume()
        cut = stepper.pause()
        assert stepper.cuts.is_consistent(cut)
        assert stepper.step_back("layer", 3).after != cut
        assert all(differing_blocks(engine, wanted.kv) == [] for engine in made.engines)
        stepper.step("op")
        stepper.run_to(0, 1)
        stepper.resume()
        stepper.wait(60)
        assert is_complete(made, wanted)
