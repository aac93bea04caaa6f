"""`verify` is right about faulty plans: those that it accepts run to the end, those that it refutes do not.

The judge is the engine itself, run without asking verify: a plan runs through if, with sends that wait and
with buffered ones, every lane of every rank ends and every rank has the reference's KV and final state, bit
for bit.
"""

import pytest
from hypothesis import HealthCheck, Phase, event, given, note, settings
from hypothesis import strategies as st

from dinfer.model.decoder import Decoder
from dinfer.plan.ops import PlanError
from dinfer.plan.plan import Plan
from dinfer.plan.verify import verify
from tests.support.expected import expected, is_complete
from tests.support.plan_strategies import mutated_plans, plans, shapes_of
from tests.support.seeded_gate import SeededGate
from tests.support.twin import prompt, twin

LAYERS, TOKENS, CHUNK = 3, 5, 2
SHAPES = st.integers(1, 3).flatmap(
    lambda world_size: shapes_of(world_size, layers=LAYERS, tokens=TOKENS, chunk_size=CHUNK)
)
IDS = list(prompt(TOKENS))
QUICK = settings(max_examples=80, suppress_health_check=[HealthCheck.too_slow])
LONG = settings(max_examples=2000, suppress_health_check=[HealthCheck.too_slow])


def runs_through(decoder: Decoder, plan: Plan, *, rendezvous: bool, seed: int) -> bool:
    gate = SeededGate(seed)
    config = {"world_size": plan.world_size, "chunk_size": CHUNK, "unsafe": True}
    with twin(decoder, gate=gate, rendezvous=rendezvous, **config) as made:
        try:
            fleet = made.prepare(IDS, plan)
        except PlanError as error:  # lanes that share a channel: the executor takes no such plan
            note(str(error))
            return False
        made.go(fleet)
        assert gate.wait(lambda: gate.stuck() or None, 60), "a lane neither ended nor waits"
        for engine in made.engines:
            note(str(engine.executor.failure or engine.executor.stand()))
        return is_complete(made, expected(decoder, IDS, CHUNK))


def check(decoder: Decoder, plan: Plan, seed: int) -> None:
    verdict = verify(plan)
    note(f"{verdict}\n{plan.text()}")
    event(verdict.flaw if not verdict.proved else "proved")
    ways = [runs_through(decoder, plan, rendezvous=way, seed=seed) for way in (True, False)]
    assert all(ways) == verdict.proved


@QUICK
@given(plan=mutated_plans(SHAPES), seed=st.integers(0, 99))
def test_verify_accepts_a_plan_if_and_only_if_it_runs_through(
    decoders: dict[str, Decoder], plan: Plan, seed: int
) -> None:
    check(decoders["small"], plan, seed)


@settings(max_examples=15, phases=[Phase.generate])
@given(plan=plans(SHAPES), seed=st.integers(0, 99))
def test_plans_as_they_are_built(decoders: dict[str, Decoder], plan: Plan, seed: int) -> None:
    check(decoders["small"], plan, seed)
    assert verify(plan).proved is (plan.schedule != "batched" or plan.world_size == 1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@LONG
@given(plan=mutated_plans(SHAPES, most=3), seed=st.integers(0, 99))
def test_verify_accepts_a_plan_if_and_only_if_it_runs_through_often(
    decoders: dict[str, Decoder], plan: Plan, seed: int
) -> None:
    check(decoders["small"], plan, seed)
