"""How often whoever watches looks."""

import pytest

from dinfer.watching.pace import GLANCE_SHARE, LOOK_S, SELDOM_S, SHARE, Pace


class Clocks:
    """Time, and the CPU time of a thread, that pass when told to."""

    def __init__(self) -> None:
        self.now = self.cpu = 100.0
        self.pace = Pace(lambda: self.now, lambda: self.cpu)

    def look(self, *, cpu: float = 0.0, lasts: float = 0.0) -> None:
        with self.pace.looking():
            self.cpu += cpu
            self.now += lasts

    def waits(self, *, urgent: bool = False) -> float:
        """Seconds until a look is due, in steps of a thousandth."""
        began = self.now
        while not self.pace.is_due(lambda: urgent):
            self.now += 0.001
        return self.now - began


@pytest.mark.parametrize("cpu", [0.0, 0.001, 0.02, 0.5])
def test_looking_takes_a_small_part_of_a_core_but_is_never_put_off_for_long(cpu: float) -> None:
    clocks = Clocks()
    clocks.look(cpu=cpu)
    assert clocks.waits() == pytest.approx(min(SELDOM_S, max(LOOK_S, cpu / SHARE)), abs=0.002)
    clocks.look(cpu=cpu)
    assert clocks.waits(urgent=True) == pytest.approx(min(SELDOM_S, cpu / GLANCE_SHARE), abs=0.002)


def test_a_look_that_lasts_because_others_compute_puts_off_none() -> None:
    clocks = Clocks()
    clocks.look(cpu=0.002, lasts=1.0)
    assert clocks.waits() == pytest.approx(LOOK_S, abs=0.002)


def test_a_look_that_fails_is_followed_by_a_rest_too() -> None:
    clocks = Clocks()
    with pytest.raises(OSError, match="gone"), clocks.pace.looking():
        raise OSError("gone")
    assert not clocks.pace.is_due(lambda: False)
