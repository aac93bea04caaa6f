"""What is chosen: never worse than the default, near the best of a full sweep, and for a reason that is told."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinfer.plan.ops import PlanError
from dinfer.planner.choose import (
    CHOICES,
    SAFE,
    SLACK,
    SMALLEST,
    Candidate,
    Planner,
    even_lengths,
    even_starts,
    quadratic_lengths,
    sized_lengths,
)
from dinfer.planner.costs import LayerCost
from dinfer.planner.machine import Links, LinkSpeed, MeasuredMachine

LAYER = LayerCost(1e-3, 1e-8, 1e-4, 1e-8)
MB = 1e6


def machine(
    ranks: int = 3,
    speed: float = 1000 * MB,
    *,
    slow_rank: int | None = None,
    slow_link: tuple[int, int] | None = None,
    cost: LayerCost = LAYER,
) -> MeasuredMachine:
    """Hosts with one interface each of that many bytes per second; a slow rank takes twice, a slow link ten times as
    long."""
    links = [
        LinkSpeed(*pair, 2e-4, speed / times, speed / (ranks - 1) / times)
        for pair in permutations(range(ranks), 2)
        for times in (10 if pair == slow_link else 1,)
    ]
    costs = (cost.times(2 if rank == slow_rank else 1) for rank in range(ranks))
    return MeasuredMachine(tuple(costs), Links(tuple(links)), 1024, 2048)


def default(layers: int = 6, tokens: int = 256, ranks: int = 3, chunk_size: int = 128) -> Candidate:
    return Candidate(even_starts(layers, ranks), sized_lengths(tokens, chunk_size), "pipelined", "pairwise")


def swept(planner: Planner, tokens: int, ranks: int) -> float:
    """The best of all stages, schedules, strategies, and even chunks."""
    found = [
        Candidate((0, *starts), even_lengths(tokens, chunks), schedule, strategy)  # type: ignore[arg-type]
        for starts in combinations(range(1, planner.layers), ranks - 1)
        for chunks in (1, 2, 4, 8)
        for schedule, strategy in product(SAFE, ("pairwise", "ring"))
    ]
    return min(map(planner.seconds, found))


UNEVEN = {
    "even": machine(),
    "rank 0 is slow": machine(slow_rank=0, speed=50 * MB),
    "a link is slow": machine(slow_link=(0, 1), speed=100 * MB),
}


@pytest.mark.parametrize("name", UNEVEN)
def test_the_choice_is_near_the_best_of_a_full_sweep(name: str) -> None:
    planner = Planner(UNEVEN[name], 6)
    chosen = planner.choose(default(), CHOICES)
    assert chosen.predicted_s <= swept(planner, 256, 3) * 1.05
    assert chosen.predicted_s < chosen.default_s
    assert [line.split()[0] for line in chosen.because] == list(CHOICES)


costs = st.builds(
    LayerCost, st.floats(0, 1e-2), st.floats(0, 1e-6), st.floats(1e-6, 1e-3), st.floats(0, 1e-7)
)


@settings(max_examples=20, deadline=None)
@given(
    cost=costs,
    speed=st.floats(1, 1000),
    ranks=st.integers(1, 3),
    tokens=st.integers(1, 200),
    chunk_size=st.integers(1, 128),
    free=st.sets(st.sampled_from(CHOICES), min_size=1),
    slow=st.none() | st.integers(0, 2),
)
def test_no_choice_is_worse_than_the_default(
    cost: LayerCost, speed: float, ranks: int, tokens: int, chunk_size: int, free: set[str], slow: int | None
) -> None:
    given = default(4, tokens, ranks, max(chunk_size, tokens // 8 + 1))
    planner = Planner(machine(ranks, speed * MB, slow_rank=slow, cost=cost), 4)
    chosen = planner.choose(given, free)
    found = chosen.candidate
    assert chosen.predicted_s <= chosen.default_s == planner.seconds(given)
    assert sum(found.lengths) == tokens
    assert min(found.lengths[:-1], default=SMALLEST) >= min(SMALLEST, *given.lengths)
    for name, attribute in zip(CHOICES, ("schedule", "lengths", "starts", "sync_strategy"), strict=True):
        assert name in free or getattr(found, attribute) == getattr(given, attribute)
    assert len(chosen.because) == len(free)


def test_no_tail_is_tiny() -> None:
    """257 tokens by 128 leave one of a single token."""
    chosen = Planner(machine(), 6).choose(default(tokens=257), ["chunk_size"])
    assert min(chosen.candidate.lengths) >= SMALLEST


def test_a_slow_rank_gets_fewer_layers_and_the_sentence_says_why() -> None:
    chosen = Planner(machine(slow_rank=1), 6).choose(default(), ["layer_split"])
    starts = (*chosen.candidate.starts, 6)
    assert starts[2] - starts[1] == 1
    assert "; for a layer rank 1 takes 2 times as long as the fastest rank." in str(chosen)


def test_a_strategy_that_loses_is_told_with_its_time() -> None:
    chosen = Planner(machine(speed=5 * MB), 6).choose(default(), ["sync_strategy", "schedule"])
    assert chosen.because[0].startswith("schedule pipelined: lockstep cannot beat it here: ")
    assert "ring cannot beat it here: " in chosen.because[1]
    alone = Planner(machine(1), 6).choose(default(ranks=1), ["sync_strategy"])
    assert str(alone) == "sync_strategy pairwise: with one rank nothing is sent."


def test_what_a_sentence_compares_with_is_not_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search improved only one strategy, and with those stages and chunks the other one is faster."""
    monkeypatch.setattr("dinfer.planner.choose.IMPROVED", 1)
    uneven = machine(speed=100 * MB, slow_rank=0, slow_link=(0, 2), cost=LayerCost(5e-3, 0, 1e-5, 0))
    planner, given = Planner(uneven, 4), replace(default(4, 300, 3, 32), sync_strategy="ring")
    chosen = planner.choose(given, CHOICES)
    best = chosen.candidate
    others = [
        *(replace(best, schedule=schedule) for schedule in SAFE),
        *(replace(best, sync_strategy=strategy) for strategy in ("pairwise", "ring")),
        replace(best, starts=given.starts),
        replace(best, lengths=given.lengths),
    ]
    assert min(map(planner.seconds, others)) >= chosen.predicted_s * (1 - SLACK)


def test_attention_that_grows_makes_later_chunks_shorter() -> None:
    """With nothing but attention, chunks of equal time shrink."""
    cost = LayerCost(5e-3, 0, 0, 2e-6)
    chosen = Planner(machine(cost=cost), 6).choose(default(tokens=512), ["chunk_size"])
    lengths = chosen.candidate.lengths
    half = len(lengths) // 2
    assert sum(lengths[:half]) > sum(lengths[-half:])


def test_what_cannot_be_chosen_is_refused() -> None:
    with pytest.raises(PlanError, match="'codec' cannot be chosen"):
        Planner(machine(), 6).choose(default(), ["codec"])
    with pytest.raises(PlanError, match="3 ranks were measured, but the plan has 2"):
        Planner(machine(), 6).choose(default(ranks=2), ["schedule"])


def test_lengths() -> None:
    assert even_lengths(10, 3) == (4, 3, 3)
    assert sized_lengths(10, 4) == (4, 4, 2)
    found = quadratic_lengths(2048, 512)
    assert sum(found) == 2048
    assert list(found) == sorted(found, reverse=True)
    assert quadratic_lengths(2048, 512, 0.0) == (512,) * 4
    assert quadratic_lengths(5, 128) == (5,)
