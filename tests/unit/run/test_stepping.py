"""However a run is stepped and stopped, it stands at consistent cuts and ends as if nothing had been.

A hypothesis state machine drives a Stepper over all schedules, strategies, numbers of ranks, gates and kinds
of sends.
"""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from dinfer.config import Config
from dinfer.model.decoder import Decoder
from dinfer.plan.cut import UNITS, Cut, Unit, is_inside
from dinfer.run.stepper import Move, Stepper
from dinfer.transport.gate import Gate
from tests.support.expected import NEW_TOKENS, differing_blocks, expected, is_complete, lane_threads
from tests.support.seeded_gate import SeededGate
from tests.support.twin import Twin, prompt

IDS = list(prompt(10))
UNIT = st.sampled_from(UNITS)
COUNT = st.integers(1, 3)


class Stepping(RuleBasedStateMachine):
    """One run under the hands of a restless user.

    What is drawn must not depend on where a pause happened to end: with an ordinary gate that differs from time to
    time.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder
        self.twin: Twin | None = None

    @initialize(
        schedule=st.sampled_from(("pipelined", "lockstep")),
        strategy=st.sampled_from(("pairwise", "ring")),
        world_size=st.integers(1, 3),
        chunk_size=st.sampled_from((3, 4, 16)),
        seed=st.none() | st.integers(0, 999),
        rendezvous=st.booleans(),
        backend=st.sampled_from(("gloo", "nccl")),
    )
    def prepare(
        self,
        schedule: str,
        strategy: str,
        world_size: int,
        chunk_size: int,
        seed: int | None,
        rendezvous: bool,
        backend: str,
    ) -> None:
        config = Config.of(
            {
                "schedule": schedule,
                "sync_strategy": strategy,
                "world_size": world_size,
                "chunk_size": chunk_size,
                "max_new_tokens": NEW_TOKENS,
                "backend": backend,
            }
        )
        self.gate = Gate() if seed is None else SeededGate(seed)
        self.twin = Twin(self.decoder, config, gate=self.gate, rendezvous=rendezvous)
        self.wanted = expected(self.decoder, IDS, chunk_size)
        self.fleet = self.twin.prepare(IDS)
        self.stepper = Stepper(self.fleet, timeout=60)
        self.cuts = self.stepper.cuts
        self.cut: Cut = self.cuts.start

    def moved(self, move: Move, target: Cut) -> None:
        assert (move.before, move.after) == (self.cut, target)
        assert move.moved is (self.cut != target)
        self.cut = target

    @rule(unit=UNIT, n=COUNT)
    def step(self, unit: Unit, n: int) -> None:
        target = self.cut
        for _ in range(n):
            target = self.cuts.next(target, unit)
        self.moved(self.stepper.step(unit, n), target)
        assert is_inside(self.cut, target)

    @rule(unit=UNIT, n=COUNT)
    def step_back(self, unit: Unit, n: int) -> None:
        target = self.cut
        for _ in range(n):
            target = self.cuts.previous(target, unit)
        self.moved(self.stepper.step_back(unit, n), target)

    @rule(data=st.data())
    def run_to(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.cuts.blocks))
        self.moved(self.stepper.run_to(*block), self.cuts.after_block(*block))

    @rule(ops=st.integers(1, 30))
    def resume_and_pause_after(self, ops: int) -> None:
        """Stop a free run at the moment at which so many ops have ended, from inside it."""
        assert self.twin is not None
        left = [ops]

        def stop(*_: object) -> None:
            with self.gate.change():
                left[0] -= 1
                if left[0] == 0:
                    self.fleet.freeze()

        for engine in self.twin.engines:
            engine.executor.on_op = stop
        self.stepper.resume()
        assert self.fleet.wait(lambda _: left[0] <= 0 or self.stepper.at_end, 30)
        self.paused()
        for engine in self.twin.engines:
            engine.executor.on_op = lambda *_: None

    @rule()
    def resume_and_pause_at_once(self) -> None:
        self.stepper.resume()
        self.paused()

    def paused(self) -> None:
        before, self.cut = self.cut, self.stepper.pause()
        assert is_inside(before, self.cut)

    @rule(unit=UNIT)
    def step_out_of_a_free_run(self, unit: Unit) -> None:
        self.stepper.resume()
        move = self.stepper.step(unit)
        assert self.cuts.is_consistent(move.before)
        assert move.after == self.cuts.next(move.before, unit)
        self.cut = move.after

    @rule()
    def resume_to_the_end(self) -> None:
        self.stepper.resume()
        self.stepper.wait(60)
        self.cut = self.cuts.end

    @rule(unit=UNIT)
    def step_past_the_end(self, unit: Unit) -> None:
        self.resume_to_the_end()
        assert self.stepper.at_end
        assert not self.stepper.step(unit).moved

    @rule(unit=UNIT)
    def step_back_past_the_start(self, unit: Unit) -> None:
        self.moved(self.stepper.step_back("chunk", 9), self.cuts.start)
        assert not self.stepper.step_back(unit).moved

    @invariant()
    def stands_at_a_consistent_cut_with_the_references_blocks(self) -> None:
        if self.twin is None:
            return
        stands = self.fleet.stands()
        assert tuple(stand.positions for stand in stands) == self.cut
        assert all(stand.at_limits and not any(stand.started) for stand in stands)
        assert self.cuts.is_consistent(self.cut)
        for engine in self.twin.engines:
            assert differing_blocks(engine, self.wanted.kv) == []
        assert not any(self.twin.exchange.queues.values())

    def teardown(self) -> None:
        if self.twin is None:
            return
        try:
            self.resume_to_the_end()
            assert is_complete(self.twin, self.wanted)
            tokens = self.twin.all(lambda engine: engine.decode_phase())
            assert tokens == [self.wanted.tokens] * len(self.twin.engines)
        finally:
            assert self.twin.close()
            assert lane_threads() == []


QUIET = [HealthCheck.too_slow]


def test_a_run_may_be_stepped_in_any_way(decoders: dict[str, Decoder]) -> None:
    run_state_machine_as_test(
        partial(Stepping, decoders["small"]),  # type: ignore[arg-type]  # any callable will do
        settings=settings(max_examples=25, stateful_step_count=12, suppress_health_check=QUIET),
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("name", "examples"), [("small", 400), ("llama", 100)])  # an example costs by layers
def test_a_run_may_be_stepped_in_any_way_for_long(
    decoders: dict[str, Decoder], name: str, examples: int
) -> None:
    run_state_machine_as_test(
        partial(Stepping, decoders[name]),  # type: ignore[arg-type]  # any callable will do
        settings=settings(max_examples=examples, stateful_step_count=40, suppress_health_check=QUIET),
    )
