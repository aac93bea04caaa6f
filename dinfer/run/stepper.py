"""Bring all ranks from one consistent cut to another: step, step back, run to a block, pause, resume.

`dinfer.plan.cut` decides what a step means; a Fleet reaches the ranks. Start at `Stepper`.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from dinfer.cluster.ranks import AskableRanks
from dinfer.engine.board import Stand
from dinfer.errors import DinferError
from dinfer.messages import Freeze, Release, Rewind, SetLimits
from dinfer.plan.cut import Cut, Cuts, Unit, is_inside, meet
from dinfer.plan.graph import channel_of
from dinfer.plan.plan import OpPlace, Plan
from dinfer.run.failure import RankFailed
from dinfer.verdict.where import where_text

POLL_S = 0.05

ANSWER_S = 30.0
"""time in which a rank must answer a command"""

StandList = list[Stand]
"""the position of each rank, by rank"""


class NoProgress(DinferError, RuntimeError):
    """The ranks did not reach their target in time; the message gives the position of each."""


class Fleet:
    """All ranks, as stepping reaches them. `check()` is called while waiting; it raises RankFailed where the run cannot
    go on."""

    def __init__(self, plan: Plan, ranks: AskableRanks, check: Callable[[], None]) -> None:
        self.plan, self._ranks, self._check = plan, ranks, check

    def stands(self) -> StandList:
        with self._ranks.changed:
            found = [state.stand for state in self._ranks.ranks]
        stands = [stand for stand in found if stand is not None]
        if len(stands) < len(found):
            raise RankFailed("not all ranks have reported a position yet: wait until they are ready.")
        return stands

    def freeze(self) -> StandList:
        """Let no rank start another op; the position of each rank when it froze."""
        ranks = range(self.plan.world_size)
        answers = self._ranks.ask(dict.fromkeys(ranks, Freeze()), ANSWER_S, self._check)
        return [answers[rank] for rank in ranks]

    def set_limits(self, limits: Cut, *, order: int = 0, stopping: bool = False) -> None:
        """Let lanes go that far. Ranks repeat `order` in their notes; `stopping`: this brings the run to a stand, so no
        breakpoint condition may stop lanes earlier."""
        command = SetLimits(limits, order, stopping)
        self._ranks.ask(dict.fromkeys(range(len(limits)), command), ANSWER_S, self._check)

    def release(self, recvs: Sequence[OpPlace]) -> None:
        """Have the peers of these posted recvs release them with a void header."""
        for place in recvs:
            op = self.plan.op(place)
            request = Release((channel_of(place.rank, op),))
            self._ranks.ask({op.peer: request}, ANSWER_S, self._check)

    def rewind(self, cut: Cut) -> None:
        """Go back to a cut that all lanes have passed."""
        self._ranks.ask(dict.fromkeys(range(len(cut)), Rewind(cut)), ANSWER_S, self._check)

    def wait(self, until: Callable[[StandList], bool], timeout: float | None) -> bool:
        """Wait until `until(stands)`; False after `timeout` seconds. Raises RankFailed."""
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        while True:
            with self._ranks.changed:  # held while looking, so that no news between look and wait is missed
                if self._ranks.changed.wait_for(lambda: until(self.stands()), POLL_S):
                    return True
            if time.monotonic() > deadline:
                return False
            self._check()


class Move(NamedTuple):
    """The cuts before and after a move; equal where there was nothing to do, at either end of the run.
    `stopped`: somebody paused the run before it reached its target."""

    before: Cut
    after: Cut
    stopped: bool = False

    @property
    def moved(self) -> bool:
        return self.before != self.after


class Stepper:
    """Steps a run whose plan has been proved. Calls from several threads are served one after another."""

    def __init__(self, fleet: Fleet, timeout: float = 60.0) -> None:
        self._fleet, self._timeout = fleet, timeout
        self.cuts = Cuts(fleet.plan)
        self._last = self.cuts.start
        self._lock = threading.RLock()
        self._order = 0
        """counts the limits sent to the ranks, so that a note about an earlier order can be ignored"""
        self._pausing = threading.Event()
        self._halted = 0  # the order under which a rank has met a breakpoint
        self.heading: tuple[Cut, Cut] | None = None
        """the cut from which the last move went, and the one to which it was to go"""

    @property
    def at_end(self) -> bool:
        return _positions(self._fleet.stands()) == self.cuts.end

    @property
    def heads_for_end(self) -> bool:
        """Whether the last move was to go to the end."""
        return self.heading is not None and self.heading[1] == self.cuts.end

    def step(self, unit: Unit = "layer", n: int = 1) -> Move:
        """Move on by `n` units; does nothing at the end."""
        with self._lock:
            before = target = self._stand()
            for _ in range(n):
                target, last = self.cuts.next(target, unit), target
                if target == last:  # the end: `n` may be a number to be sure of it
                    break
            return self._go(before, target)

    def step_towards(self, limit: Cut, unit: Unit) -> Move:
        """Move on by one unit, but not past `limit`."""
        with self._lock:
            before = self._stand()
            target = self.cuts.next(before, unit)
            while meet(target, limit) == before != limit:  # what is left of this unit lies past the limit
                target = self.cuts.next(target, unit)
            return self._go(before, meet(target, limit))

    def step_back(self, unit: Unit = "layer", n: int = 1) -> Move:
        """Go back by `n` units; does nothing at the start."""
        with self._lock:
            before = target = self._stand()
            for _ in range(n):
                target, last = self.cuts.previous(target, unit), target
                if target == last:
                    break
            return self._go(before, target)

    def run_to(self, chunk: int, layer: int) -> Move:
        """Stop just after that block on every rank, forward or back. Raises PlanError for an unknown block."""
        with self._lock:
            target = self.cuts.after_block(chunk, layer)
            return self._go(self._stand(), target)

    def go_to(self, cut: Cut) -> Move:
        """Go to that cut, forward or back; no breakpoint's condition stops it on the way."""
        with self._lock:
            return self._go(self._stand(), cut, stopping=True)

    def resume(self, limit: Cut | None = None) -> None:
        """Let all lanes go to a cut ahead, by default the end; returns at once."""
        with self._lock:
            self.heading = self._last, limit or self.cuts.end
            self._send(limit or self.cuts.end)

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
        """Pause, but only if the ranks still follow that order; whether they do."""
        if self._order != order:
            return False
        self._halted = order
        while not self._lock.acquire(timeout=POLL_S):
            if self._order != order:  # another thread has stopped the ranks, or sent them on
                return True
        try:
            if self._order == order:
                self._stand()
        finally:
            self._lock.release()
        return True

    def wait(self, timeout: float | None = None) -> None:
        """Wait until all lanes are at their limits. Raises NoProgress after `timeout` seconds."""
        self._arrive(None, timeout)

    def where(self) -> str:
        """The position of each rank, one line each."""
        return where_text(self._fleet.plan, self._fleet.stands())

    def _stand(self, timeout: float | None = None) -> Cut:
        """Stop the run; the cut at which it then stands. The ranks are asked, since a `%%px` cell may have moved
        them."""
        stands = self._fleet.freeze()
        cut, started, void = _positions(stands), _started(stands), list[OpPlace]()
        # A stop that was interrupted, for example by Ctrl-C, leaves no cut: a send may be done and its recv not.
        if started or not (cut == self._last or self.cuts.is_consistent(cut)):
            cut, void = self.cuts.stop(cut, started)
            self._send(cut, stopping=True)
            self._fleet.release(void)
        self._arrive(cut, timeout or self._timeout)
        return cut

    def _send(self, cut: Cut, *, stopping: bool = False) -> None:
        self._order += 1  # first: a rank may meet a breakpoint while others have not heard of this order
        self._fleet.set_limits(cut, order=self._order, stopping=stopping)

    def _go(self, before: Cut, target: Cut, *, stopping: bool = False) -> Move:
        self.heading = before, target
        if not is_inside(before, target):
            self._fleet.rewind(meet(before, target))
        self._send(target, stopping=stopping)
        if self._arrive(target, self._timeout, may_stop=True):
            return Move(before, target)
        return Move(before, self._stand(), stopped=True)

    def _arrive(self, cut: Cut | None, timeout: float | None, *, may_stop: bool = False) -> bool:
        """Wait until the ranks are at that cut; False if somebody pauses them first."""

        def arrived(stands: StandList) -> bool:
            is_standing = all(stand.at_limits and not any(stand.started) for stand in stands)
            return is_standing and cut in (None, _positions(stands))

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
