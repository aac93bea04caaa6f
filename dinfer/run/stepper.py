"""Stepper: brings a fleet from one consistent cut to another: step, back, run to, pause, resume.

What a step means is decided in plan/cut; how ranks are reached, in the fleet.
"""

import threading
from typing import NamedTuple

from dinfer.errors import DinferError
from dinfer.plan.cut import Cut, Cuts, Unit, is_inside, meet
from dinfer.plan.plan import OpPlace
from dinfer.run.fleet import Fleet, StandList
from dinfer.verdict.where import where_text

LOOK_S = 0.05


class NoProgress(DinferError, RuntimeError):
    """The ranks did not get where they were sent in time; the message says where each stands."""


class Move(NamedTuple):
    """A step's effect. Equal ends mean that there was nothing to do: the run stands at that end already.
    `stopped`: somebody paused the run before it had got where it was sent."""

    before: Cut
    after: Cut
    stopped: bool = False

    @property
    def moved(self) -> bool:
        return self.before != self.after


class Stepper:
    """Steps a run whose plan has been proved.

    Safe to call from several threads; moves happen one after another.
    """

    def __init__(self, fleet: Fleet, timeout: float = 60.0) -> None:
        self._fleet, self._timeout = fleet, timeout
        self._cuts = Cuts(fleet.plan)
        self._last = self._cuts.start
        self._lock = threading.RLock()
        self._order = 0
        """counts the orders that were given to the ranks, so that what they say can be told from older news"""
        self._pausing = threading.Event()
        self._halted = 0
        """under which order a rank has met a breakpoint"""

    @property
    def cuts(self) -> Cuts:
        return self._cuts

    @property
    def at_end(self) -> bool:
        return _positions(self._fleet.stands()) == self._cuts.end

    def step(self, unit: Unit = "layer", n: int = 1) -> Move:
        """Move on by `n` units; does nothing at the end."""
        with self._lock:
            before = target = self._stand()
            for _ in range(n):
                target = self._cuts.next(target, unit)
            return self._go(before, target)

    def step_towards(self, limit: Cut, unit: Unit) -> Move:
        """Move on by one unit, but not past `limit`."""
        with self._lock:
            before = self._stand()
            target = self._cuts.next(before, unit)
            while meet(target, limit) == before != limit:  # what is left of this unit lies past the limit
                target = self._cuts.next(target, unit)
            return self._go(before, meet(target, limit))

    def step_back(self, unit: Unit = "layer", n: int = 1) -> Move:
        """Go back by `n` units; does nothing at the start."""
        with self._lock:
            before = target = self._stand()
            for _ in range(n):
                target = self._cuts.previous(target, unit)
            return self._go(before, target)

    def run_to(self, chunk: int, layer: int) -> Move:
        """Stop just after that block everywhere, going forward or back.

        Raises PlanError if there is no such block.
        """
        with self._lock:
            target = self._cuts.after_block(chunk, layer)
            return self._go(self._stand(), target)

    def resume(self, limit: Cut | None = None) -> None:
        """Let all lanes go to a cut ahead, by default the end; returns at once."""
        with self._lock:
            self._send(limit or self._cuts.end)

    def pause(self, timeout: float | None = None) -> Cut:
        """Stop at the nearest consistent cut, also a move that another thread waits for.

        Raises NoProgress after `timeout` seconds (default: those of this stepper); the ranks stop all the same as soon
        as their ops end.
        """
        self._pausing.set()
        with self._lock:
            self._pausing.clear()
            return self._stand(timeout)

    def pause_order(self, order: int) -> bool:
        """The same, but only ranks that still follow that order; whether they do."""
        if self._order != order:
            return False
        self._halted = order
        while not self._lock.acquire(timeout=LOOK_S):
            if self._order != order:  # whoever moved them has brought them to a stand, or sent them on
                return True
        try:
            if self._order == order:
                self._stand()
        finally:
            self._lock.release()
        return True

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the run has reached its limits. Raises NoProgress after `timeout` seconds."""
        self._arrive(None, timeout)

    def where(self) -> str:
        """Where each rank stands, a line each."""
        return where_text(self._fleet.plan, self._fleet.stands())

    def _stand(self, timeout: float | None = None) -> Cut:
        """Bring the run to a stand; the cut at which it then is.

        The ranks themselves are asked: they may have been moved by others than this stepper.
        """
        stands = self._fleet.freeze()
        cut, void = _positions(stands), list[OpPlace]()
        if _started(stands) or not self._is_consistent(cut):
            cut, void = self._cuts.stop(cut, _started(stands))
            self._send(cut, stopping=True)
            self._fleet.release(void)
        self._arrive(cut, timeout or self._timeout)
        return cut

    def _send(self, cut: Cut, *, stopping: bool = False) -> None:
        self._order += 1  # before: a rank may meet a breakpoint while others are still being told
        self._fleet.set_limits(cut, order=self._order, stopping=stopping)

    def _is_consistent(self, cut: Cut) -> bool:
        """Not so where a stop was given up half-way, say by Ctrl-C: a send may be in, its recv not."""
        return cut == self._last or self._cuts.is_consistent(cut)

    def _go(self, before: Cut, target: Cut) -> Move:
        if not is_inside(before, target):
            self._fleet.rewind(meet(before, target))
        self._send(target)
        if self._arrive(target, self._timeout, may_stop=True):
            return Move(before, target)
        return Move(before, self._stand(), stopped=True)

    def _arrive(self, cut: Cut | None, timeout: float | None, *, may_stop: bool = False) -> bool:
        """Wait until the ranks are there; False if somebody pauses them first."""

        def arrived(stands: StandList) -> bool:
            return _standing(stands) and cut in (None, _positions(stands))

        def over(stands: StandList) -> bool:
            return arrived(stands) or (may_stop and (self._pausing.is_set() or self._halted == self._order))

        if not self._fleet.wait(over, timeout):
            raise NoProgress(f"the ranks have not arrived within {timeout:g} s:\n{self.where()}")
        if not arrived(self._fleet.stands()):
            return False
        self._last = cut or self._last
        return True


def _positions(stands: StandList) -> Cut:
    return tuple(stand.positions for stand in stands)


def _started(stands: StandList) -> set[OpPlace]:
    """The ops that have begun and not ended."""
    return {
        OpPlace(rank, lane, stand.positions[lane])
        for rank, stand in enumerate(stands)
        for lane, begun in enumerate(stand.started)
        if begun
    }


def _standing(stands: StandList) -> bool:
    """Whether no lane moves or may move."""
    return all(stand.at_limits and not any(stand.started) for stand in stands)
