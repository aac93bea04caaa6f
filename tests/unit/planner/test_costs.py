"""The cost of a layer: what made the times is found again, noise moves it little, and nothing is negative."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinfer.plan.ops import PlanError
from dinfer.planner.costs import LayerCost, LayerTime, as_in_run, fit

POINTS = [(0, 32), (960, 32), (1984, 32), (0, 64), (0, 128), (896, 128), (1920, 128), (0, 256), (1792, 256)]

parts = st.floats(1e-3, 1e3)


def times(cost: LayerCost, noise: float = 0.0, seed: int = 0) -> list[LayerTime]:
    draw = Random(seed)
    return [LayerTime(*at, cost.seconds(*at) * (1 + draw.uniform(-noise, noise))) for at in POINTS]


def test_each_part_counts_as_it_says() -> None:
    assert LayerCost(1, 10, 100, 1000).seconds(2, 3) == 1 + 20 + 300 + 1000 * (2 * 2 * 3 + 9)
    assert LayerCost(1, 10, 100, 1000).times(2).seconds(2, 3) == 2 * LayerCost(1, 10, 100, 1000).seconds(2, 3)


@settings(max_examples=60, deadline=None)
@given(parts, parts, parts, parts)
def test_what_made_the_times_is_found_again(fixed: float, cached: float, token: float, pair: float) -> None:
    cost = LayerCost(fixed * 1e-3, cached * 1e-7, token * 1e-5, pair * 1e-9)
    found = fit(times(cost))
    for at in ((0, 16), (500, 100), (4096, 128), (0, 1024)):
        assert found.seconds(*at) == pytest.approx(cost.seconds(*at), rel=1e-3)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_noise_moves_it_by_no_more_than_the_noise(seed: int) -> None:
    cost = LayerCost(2e-3, 1e-7, 3e-4, 2e-9)
    found = fit(times(cost, 0.05, seed))
    assert min(vars(found).values()) >= 0
    for at in POINTS:
        assert found.seconds(*at) == pytest.approx(cost.seconds(*at), rel=0.06)


def test_one_time_is_enough_for_its_own_shape() -> None:
    assert fit([LayerTime(0, 128, 0.05)]).seconds(0, 128) == pytest.approx(0.05)


def test_times_that_grow_smaller_with_length_give_no_negative_part() -> None:
    found = fit([LayerTime(0, 32, 0.2), LayerTime(0, 64, 0.19), LayerTime(0, 128, 0.18)])
    assert min(vars(found).values()) >= 0
    assert found.seconds(0, 64) == pytest.approx(0.19, rel=0.06)


@pytest.mark.parametrize("given", [[], [LayerTime(0, 8, 0.0)]])
def test_what_cannot_be_fitted_is_refused(given: list[LayerTime]) -> None:
    with pytest.raises(PlanError, match=r"measure at least one|above 0"):
        fit(given)


def test_among_other_ops_a_layer_takes_so_many_times_as_much_and_so_much_more() -> None:
    alone = LayerCost(1e-3, 1e-7, 1e-4, 1e-9)
    there = [
        LayerTime(*at, 1.2 * alone.seconds(*at) + 3e-4) for at in ((0, 32), (32, 32), (0, 128), (128, 128))
    ]
    found = as_in_run(alone, there)
    for at in ((0, 64), (1024, 256)):
        assert found.seconds(*at) == pytest.approx(1.2 * alone.seconds(*at) + 3e-4, rel=1e-3)


def test_times_of_one_length_tell_one_number() -> None:
    alone = LayerCost(0, 0, 1e-4, 0)
    found = as_in_run(alone, [LayerTime(0, 32, 1.5 * alone.seconds(0, 32))] * 2)
    assert found.seconds(0, 128) == pytest.approx(1.5 * alone.seconds(0, 128))


def test_without_times_of_a_run_the_cost_is_that_of_a_layer_alone() -> None:
    alone = LayerCost(1e-3, 0, 1e-4, 0)
    assert as_in_run(alone, []) == alone


def test_no_op_costs_less_than_nothing_among_others() -> None:
    """Noise that would make an op's own cost negative."""
    alone = LayerCost(0, 0, 1e-4, 0)
    found = as_in_run(alone, [LayerTime(0, 32, 2e-3), LayerTime(0, 128, 2e-2)])
    assert min(vars(found).values()) >= 0
