"""What is made of the times of a link."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinfer.engine.measure import quiet_link

seconds = st.floats(1e-6, 10)


def test_a_link_is_told_by_a_small_and_a_large_message() -> None:
    # 1 MB in a second, of which the last quarter was in buffers when its send had ended.
    assert quiet_link(0.01, 0.01 + 0.75, 1.02, 1_000_000) == pytest.approx((0.01, 1e6, 250_000))


@given(seconds, seconds, seconds)
def test_no_noise_makes_a_speed_negative(latency: float, sent: float, back: float) -> None:
    """Seen on a busy machine: a small message took longer than a large one."""
    _, speed, ahead = quiet_link(latency, sent, back, 8192)
    assert 0 < speed <= 8192 / back * 10 * 1.001
    assert 0 <= ahead <= 8192
