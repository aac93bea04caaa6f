"""However a session's run is stepped, stopped, undone and decoded, it ends as if nothing had been.

A hypothesis state machine is the restless user, through the session's own calls, with ranks as threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from dinfer.plan.cut import UNITS, Cut, Cuts
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
Place = tuple[Cut, int, int]
"""the cut, and how many new tokens and breakpoints there are"""


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
        self.cuts = Cuts(self.run.plan)
        self.before: list[Place] = []
        """where the run stood before each action that can be undone"""

    def place(self) -> Place:
        cut = tuple(tuple(stand.positions) for stand in self.run.standing().stands)
        return cut, len(self.run.tokens), len(self.run.breakpoints)

    def do(self, call: Callable[[], object], *, lets_go: bool = False) -> None:
        """An action; `lets_go`: it counts though nothing may have moved, unless prefill is done."""
        before = self.place()
        call()
        if self.place() != before or (lets_go and before[0] != self.cuts.end):
            self.before.append(before)

    @rule(unit=UNIT, n=st.integers(1, 3))
    def step(self, unit: str, n: int) -> None:
        self.do(lambda: self.run.step(unit, n))

    @rule(unit=UNIT, n=st.integers(1, 3))
    def step_back(self, unit: str, n: int) -> None:
        self.do(lambda: self.run.step_back(unit, n))

    @rule(data=st.data(), layer=st.integers(0, LAYERS - 1))
    def run_to(self, data: st.DataObject, layer: int) -> None:
        chunk = data.draw(st.integers(0, self.chunks - 1))
        self.do(lambda: self.run.run_to(chunk=chunk, layer=layer))

    @rule(layer=st.none() | st.integers(0, LAYERS - 1), when=WHEN)
    def break_at(self, layer: int | None, when: str | None) -> None:
        if when != "digest differs" or self.run.world_size > 1:
            self.do(lambda: self.run.break_at(layer=layer, when=when))

    @rule()
    def clear(self) -> None:
        self.do(self.run.breakpoints.clear)

    @rule()
    def resume_and_wait(self) -> None:
        self.do(lambda: (self.run.resume(), self.run.wait(DEADLINE_S)), lets_go=True)

    @rule()
    def resume_and_pause(self) -> None:
        self.do(lambda: (self.run.resume(), self.run.pause()), lets_go=True)

    @rule(unit=UNIT)
    def play_and_wait(self, unit: str) -> None:
        self.do(lambda: (self.run.play(unit, 100.0), self.run.wait(DEADLINE_S)), lets_go=True)

    @rule(unit=UNIT)
    def play_and_pause(self, unit: str) -> None:
        self.do(lambda: (self.run.play(unit, 100.0), self.run.pause()), lets_go=True)

    @rule()
    def undo(self) -> None:
        before = self.before.pop() if self.before else self.place()
        said = self.run.undo()
        assert self.place() == before, said

    @rule(n=st.integers(1, 3))
    def decode(self, n: int) -> None:
        more = min(n, max(1, NEW_TOKENS - len(self.run.tokens)))
        self.do(lambda: self.run.decode(more), lets_go=True)

    @rule(n=st.integers(1, 3))
    def take_tokens_back(self, n: int) -> None:
        self.do(lambda: self.run.step_back("token", n))

    @rule()
    def restart(self) -> None:
        self.do(self.run.restart)

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
