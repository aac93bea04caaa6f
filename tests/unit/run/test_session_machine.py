"""However a session's run is stepped, stopped, taken back and decoded, it ends as if nothing had been.

A hypothesis state machine is the restless user, through the session's own calls, with ranks as threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from dinfer.plan.cut import UNITS
from dinfer.session.session import Session
from tests.support.expected_tokens import Expected, expected
from tests.support.threads import session_on_threads, stands_at_a_cut
from tests.support.twin import prompt

IDS = tuple(prompt(10))
NEW_TOKENS = 5
LAYERS = 3
UNIT = st.sampled_from(UNITS)
WHEN = st.sampled_from(
    (None, "absmax > 0.001", "nan", "slower than 0 ms", "slower than 100000 ms", "digest differs")
)
DEADLINE_S = 120.0


MODEL = {"layers": LAYERS}


@pytest.fixture
def sessions(model: Path) -> Iterator[dict[int, Session]]:
    """One of each number of ranks: used by many runs."""
    with (
        session_on_threads(1, model) as one,
        session_on_threads(2, model) as two,
        session_on_threads(3, model) as three,
    ):
        yield {1: one, 2: two, 3: three}


class Using(RuleBasedStateMachine):
    """One run under the hands of a restless user."""

    def __init__(self, sessions: dict[int, Session], model: Path) -> None:
        super().__init__()
        self.sessions, self.model = sessions, model

    @initialize(
        schedule=st.sampled_from(("pipelined", "lockstep")),
        strategy=st.sampled_from(("pairwise", "ring")),
        world_size=st.integers(1, LAYERS),
        chunk_size=st.sampled_from((3, 4, 16)),
    )
    def begin(self, schedule: str, strategy: str, world_size: int, chunk_size: int) -> None:
        self.run = self.sessions[world_size].prefill(
            IDS,
            paused=True,
            schedule=schedule,
            sync_strategy=strategy,
            chunk_size=chunk_size,
            max_new_tokens=NEW_TOKENS,
        )
        self.wanted: Expected = expected(self.model, IDS, chunk_size, NEW_TOKENS)
        self.chunks = len(self.run.plan.shape.chunks)

    @rule(unit=UNIT, n=st.integers(1, 3))
    def step(self, unit: str, n: int) -> None:
        self.run.step(unit, n)

    @rule(unit=UNIT, n=st.integers(1, 3))
    def step_back(self, unit: str, n: int) -> None:
        self.run.step_back(unit, n)

    @rule(data=st.data(), layer=st.integers(0, LAYERS - 1))
    def run_to(self, data: st.DataObject, layer: int) -> None:
        self.run.run_to(chunk=data.draw(st.integers(0, self.chunks - 1)), layer=layer)

    @rule(layer=st.none() | st.integers(0, LAYERS - 1), when=WHEN)
    def break_at(self, layer: int | None, when: str | None) -> None:
        if when != "digest differs" or self.run.world_size > 1:
            self.run.break_at(layer=layer, when=when)

    @rule()
    def clear(self) -> None:
        self.run.breakpoints.clear()

    @rule()
    def resume_and_wait(self) -> None:
        self.run.resume()
        self.run.wait(DEADLINE_S)

    @rule()
    def resume_and_pause(self) -> None:
        self.run.resume()
        self.run.pause()

    @rule(n=st.integers(1, 3))
    def decode(self, n: int) -> None:
        self.run.decode(min(n, max(1, NEW_TOKENS - len(self.run.tokens))))

    @rule(n=st.integers(1, 3))
    def take_tokens_back(self, n: int) -> None:
        self.run.step_back("token", n)

    @rule()
    def restart(self) -> None:
        self.run.restart()

    @invariant()
    def stands_with_the_right_tokens(self) -> None:
        if not hasattr(self, "run"):
            return
        assert stands_at_a_cut(self.run)
        tokens = self.run.tokens[:NEW_TOKENS]
        assert tokens == self.wanted.tokens[: len(tokens)]
        assert self.run.edited == []

    def teardown(self) -> None:
        if not hasattr(self, "run"):
            return
        self.run.breakpoints.clear()
        if self.run.tokens:
            self.run.step_back("token", len(self.run.tokens))
        decoded = self.run.decode(NEW_TOKENS)
        assert list(decoded.tokens) == self.wanted.tokens, f"{decoded}\n{self.run.where()}"
        assert self.run.sha256() == [self.wanted.kv_sha256] * self.run.world_size


def machine(sessions: dict[int, Session], model: Path, examples: int, steps: int) -> None:
    run_state_machine_as_test(
        partial(Using, sessions, model),  # type: ignore[arg-type]  # any callable will do
        settings=settings(
            max_examples=examples, stateful_step_count=steps, suppress_health_check=[HealthCheck.too_slow]
        ),
    )


def test_a_session_may_be_used_in_any_way(sessions: dict[int, Session], model: Path) -> None:
    machine(sessions, model, 20, 12)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_session_may_be_used_in_any_way_for_long(sessions: dict[int, Session], model: Path) -> None:
    machine(sessions, model, 400, 40)
