"""Values as bytes: read back they are near, and nothing that matters is hidden."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from dinfer.views.panel.quantise import (
    FAINTEST,
    MINUS_INF,
    NAN,
    PLUS_INF,
    STEPS,
    ZERO,
    figures,
    quantise,
    scale_of,
)

SHAPE = (2, 3, 4)
FLOATS = st.floats(width=32, allow_subnormal=False)


@given(arrays(np.float32, SHAPE, elements=st.floats(-1e6, 1e6, width=32)))
def test_read_back_they_are_within_half_a_step(values: NDArray[np.float32]) -> None:
    made = quantise(values, "full")
    back = (made.codes.astype(np.float64) - ZERO) / STEPS * made.scale
    assert np.all(np.abs(back - values) <= made.scale / STEPS * 0.501)
    assert (made.nan, made.inf, made.special) == (0, 0, [])


@given(arrays(np.float32, SHAPE, elements=FLOATS))
def test_nan_and_inf_are_counted_listed_and_never_a_colour(values: NDArray[np.float32]) -> None:
    made = quantise(values)
    assert np.array_equal(made.codes == NAN, np.isnan(values))
    assert np.array_equal(made.codes == PLUS_INF, values == np.inf)
    assert np.array_equal(made.codes == MINUS_INF, values == -np.inf)
    assert made.nan == np.isnan(values).sum()
    assert made.inf == np.isinf(values).sum()
    assert made.special == np.argwhere(~np.isfinite(values)).tolist()


@given(arrays(np.float32, SHAPE, elements=st.floats(-1e3, 1e3, width=32)))
def test_whatever_differs_is_seen_to_differ(difference: NDArray[np.float32]) -> None:
    codes = quantise(difference, "full", difference=True).codes.astype(int) - ZERO
    assert np.array_equal(codes == 0, difference == 0)
    assert np.all(np.abs(codes[difference != 0]) >= FAINTEST)
    assert np.array_equal(np.sign(codes), np.sign(difference))


def test_a_robust_scale_leaves_out_the_few_largest() -> None:
    values = np.linspace(-1, 1, 10_000, dtype=np.float32).reshape(1, 100, 100)
    values[0, 0, 0] = 1e30
    assert scale_of(values, "robust") == pytest.approx(0.995, abs=0.01)
    assert scale_of(values, "full") == pytest.approx(1e30)
    assert scale_of(values, 2.5) == 2.5


@pytest.mark.parametrize("scale", ["robust", "full", 0.0, float("nan"), -1.0])
def test_nothing_but_zeros_has_a_scale_too(scale: str | float) -> None:
    assert scale_of(np.zeros(SHAPE, np.float32), scale) == 1.0  # type: ignore[arg-type]
    assert scale_of(np.zeros((2, 0, 4), np.float32), scale) == 1.0  # type: ignore[arg-type]


def test_one_difference_among_many_zeros_sets_the_scale() -> None:
    values = np.zeros((1, 100, 100), np.float32)
    values[0, 50, 50] = 1e-4
    assert scale_of(values, "robust") == pytest.approx(1e-4)


def test_figures_leave_out_what_is_no_number() -> None:
    values = np.array([[[1.0, -3.0, np.nan, 0.0]], [[np.inf, np.inf, np.inf, np.inf]]], np.float32)
    first, second = figures(values)
    assert first == [-3.0, 1.0, pytest.approx(-2 / 3), 0.25, 0.25]
    assert np.isnan(second[:3]).all()
    assert second[3:] == [1.0, 0.0]
