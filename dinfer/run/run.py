"""Run: one distributed prefill, and the decode after it, as its user holds it: step, go back, stop, ask where it is.

What a step means is the plan's; how ranks are reached, the fleet's. Every action may be called from any thread, a cell
or a panel's; they happen one after another, but for `pause`, which stops the one that is under way.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from dinfer.cluster.ranks import Ranks
from dinfer.engine.corruption import Corruption
from dinfer.errors import NotPossible
from dinfer.job import Job
from dinfer.messages import BlockCorrupt, BreakpointHit, Edited, FaultStruck, Note, SetBreakpoints
from dinfer.plan.breakpoints import Breakpoint
from dinfer.plan.cut import Unit, count_of, unit_of
from dinfer.plan.ops import OpKind, PlanError
from dinfer.results import Breakpoints, Decoded, Moved, Where
from dinfer.run.action import action
from dinfer.run.breakpoints import Stops, check_digests, pace_of, play_on
from dinfer.run.failure import broken, is_about_a_message, is_certain, silent_text
from dinfer.run.fleet import RankFailed, RemoteFleet
from dinfer.run.inject import Breaking
from dinfer.run.inspect import Comparing
from dinfer.run.save import Replaying, Saving
from dinfer.run.stepper import Move, NoProgress, Stepper
from dinfer.verdict.where import moved_lines

INTERRUPT_S = 1.5
"""how long an interrupted call waits for the ranks to stand"""

GRACE_S = 0.5
"""how long to listen for the cause of a failure, and for the last word of who is gone"""

POLL_S = 0.05

TOKEN = "token"


class Run(Breaking, Comparing, Replaying, Saving):
    """Made by `session.prefill`. `devices` are the ranks'; `prepare` has them make the prompt ready, all lanes at
    limit 0, and gives the id of each one's plan. Nothing moves before the first action."""

    def __init__(
        self,
        job: Job,
        line: Ranks,
        devices: list[str],
        tokenizer: Any | None,
        prepare: Callable[[], dict[int, int]],
    ) -> None:
        super().__init__(job, line, devices, tokenizer)
        self._prepare = prepare
        self._fleet = RemoteFleet(job.plan, self._line, self.check)
        self._stops = Stops(lambda armed: self._ask_all(SetBreakpoints(tuple(armed))))
        self._playing = threading.Event()
        self._begin()

    def _begin(self) -> None:
        plan_ids = self._prepare()
        self._look_anew()
        self._watch.plan_ids = plan_ids
        self._broken_at: float | None = None
        self._stepper = Stepper(self._fleet, self.config.timeout) if self.job.verdict.proved else None

    # -- moving

    @action
    def step(self, unit: Unit | str = "layer", n: int = 1) -> Moved | Decoded:
        """Move on by `n` units: "op", "layer", "wave", "chunk", or, after prefill, "token". At the end it does nothing,
        and says so."""
        if unit == TOKEN:
            return self._decode(len(self.tokens) + count_of(n), None)
        return self._moved(lambda stepper: stepper.step(unit_of(unit), count_of(n)))

    @action
    def step_back(self, unit: Unit | str = "layer", n: int = 1) -> Moved | Decoded:
        """Go back by `n` units; what follows then is computed anew. After decode, every unit but "token" goes back into
        prefill and forgets the new tokens."""
        if unit == TOKEN:
            with self._lock:
                return self._generation.back_to(max(0, len(self.tokens) - count_of(n)))
        return self._moved(lambda stepper: stepper.step_back(unit_of(unit), count_of(n)))

    @action
    def play(self, unit: Unit | str = "layer", per_second: float = 2.0) -> Moved:
        """Step by units at that pace, to the next breakpoint or the end of prefill, or until `pause()`. Raises
        PlanError for a pace that is none."""
        pace, of = pace_of(per_second), unit_of(unit)
        self._playing.clear()
        first = last = self._moved(lambda stepper: play_on(stepper, self._stops, of))
        while last.moved and not last.stopped and not self._playing.wait(1 / pace):
            last = self._moved(lambda stepper: play_on(stepper, self._stops, of))
        lines = tuple(moved_lines(self.plan, first.before, last.after))
        return replace(last, before=first.before, lines=lines)

    @action
    def run_to(self, chunk: int, layer: int) -> Moved:
        """Stop just after that block is on every rank, with all blocks before it; forward or back.

        Raises PlanError for a block that there is not.
        """
        return self._moved(lambda stepper: stepper.run_to(chunk, layer))

    @action
    def resume(self) -> None:
        """Let the ranks go on to the next breakpoint, or the end of prefill. Returns at once; `wait()` waits."""
        with self._lock:
            self._resume()

    @action
    def pause(self) -> Where:
        """Stop a run, or the action that another thread waits for, at the nearest cut; in decode, after a token."""
        self._pause()
        return self.where()

    def wait(self, timeout: float | None = None) -> Where:
        """Wait until the run stands: at a breakpoint, at the end of prefill, or paused. Raises NoProgress after
        `timeout` seconds, and RankFailed where a rank has failed."""
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            with self._line.changed:
                while self._state() in ("running", "decoding"):
                    if deadline is not None and time.monotonic() > deadline:
                        raise NoProgress(f"the run does not stand after {timeout:g} s:\n{self.where()}")
                    self._line.changed.wait(POLL_S)
                    self.check()
        except KeyboardInterrupt:
            self.interrupted()
            raise
        self.look()
        self.check()
        return self.where()

    def restart(self) -> Where:
        """Begin anew, paused at the start, with the same breakpoints and faults; also after `session.recover()`. What
        is under way is stopped first."""
        with self.halted():
            self.last_call = "run.restart()"
            if self.closed:
                raise NotPossible(f"this run is over: {self.closed}")
            self._stops.forget_ahead()
            self._begin()
            self._stops.arm()
            if self._armed:
                self._armed.arm()
        self.tell()
        return self.where()

    # -- breakpoints

    @action
    def break_at(
        self,
        *,
        layer: int | None = None,
        chunk: int | None = None,
        rank: int | None = None,
        op: OpKind | None = None,
        when: str | None = None,
    ) -> Breakpoint:
        """Stop after ops of this layer, chunk and rank, each None for any, and of this kind ("layer" by default).

        `when` has the run stop only where that holds: "nan", "inf", "absmax > 100" (of what the op made), "digest
        differs" (bytes changed on their way), "slower than 5 ms". Without it, the run stops as `run_to` would: with the
        block on every rank. Raises PlanError.
        """
        with self._lock:
            cuts = self._stepping().cuts
            check_digests(when, self.config)
            return self._stops.add(cuts, rank=rank, op=op, chunk=chunk, layer=layer, when=when)

    @property
    def breakpoints(self) -> Breakpoints:
        """Those that are set; `run.breakpoints.clear()` and `.remove(number)` end them."""
        return self._stops.view()

    def breakpoints_set(self) -> Breakpoints:
        return self.breakpoints

    # -- decode

    @action
    def decode(
        self, max_new_tokens: int | None = None, on_text: Callable[[str], None] | None = None
    ) -> Decoded:
        """Run prefill to its end if need be, then generate that many more tokens, the same on every rank.

        Fewer come where the text ends. `on_text` is called with each piece of text as it comes.
        """
        more = (
            self.config.max_new_tokens
            if max_new_tokens is None
            else count_of(max_new_tokens, "max_new_tokens")
        )
        with self._lock:
            if self._stepper and not self._stepper.at_end:
                self._resume()
                self._stepper.wait(None)
                if not self._stepper.at_end:
                    self.look()
                    return Decoded((), "", False, 0, self._not_done())
        return self._decode(len(self.tokens) + more, on_text)

    # -- for the session

    def check(self) -> None:
        """Raises RankFailed if the run cannot go on, or not now, and Hung where it stands still."""
        if not self.failure and not self.closed:
            self._look_for_failure()
        if self.failure:
            raise RankFailed(self.failure)
        silent = self._line.silent()
        self.silence = "\n".join(silent_text(self.plan, r, self._line.ranks[r]) for r in silent)
        if self.silence:
            raise RankFailed(self.silence)
        self.check_moving()

    def look(self) -> None:
        """Take in what the ranks have noted. Called often, on the session's thread."""
        if self.closed:
            return
        self._hear()
        if not self._generation.under_way:
            self._generation.hear()
        if self._state() in ("paused", "done") and (met := self._stops.arrived()):
            self.say(met)
        self.watch()
        self.tell_of_news(lambda: (self.standing(), self.events_heard(), tuple(self.breakpoints)))

    def interrupted(self) -> None:
        """A keyboard interrupt: the ranks stand at the next cut, mostly before this returns."""
        self._stops.forget_ahead()  # the breakpoint ahead was not met
        try:
            if self._stepper and not self._generation.under_way:
                self._stepper.pause(INTERRUPT_S)
            self.say("interrupted: the run is paused")
        except (NoProgress, RankFailed, TimeoutError) as error:
            self.say(f"interrupted; the ranks stop as soon as their ops end: {error}")

    # -- within

    def _pause(self) -> None:
        self._playing.set()
        if self._generation.under_way:
            self._generation.stop()
        elif self._stepper is None:
            self._fleet.freeze()
        else:
            self._stops.forget_ahead()
            self._stepper.pause()

    def _moved(self, go: Callable[[Stepper], Move]) -> Moved:
        with self._lock:
            stepper = self._stepping()
            self._stops.forget_ahead()
            move = go(stepper)
            self._marks.went(self.plan, move.before, move.after)
            self._went(move.before, move.after)
            if move.after != stepper.cuts.end:
                self._generation.forget()
        lines = moved_lines(self.plan, move.before, move.after)
        return Moved(
            move.before, move.after, move.stopped, tuple(lines), self._remark(move), tuple(self.edited)
        )

    def _remark(self, move: Move) -> str:
        if move.stopped:
            return self.message or "stopped before it was through"
        if move.moved:
            return ""
        end = move.after == self._stepping().cuts.end
        return f"nothing to do: the run stands at the {'end of prefill' if end else 'start'}"

    def _not_done(self) -> str:
        clear = "; run.breakpoints.clear() removes all breakpoints" * bool(self.breakpoints)
        return (
            f"prefill is not done: {self.message or 'it was paused'}\n"
            f"run.resume() or run.decode() goes on from there{clear}"
        )

    def _look_for_failure(self) -> None:
        exits, now = self._line.exits(), time.monotonic()
        found = broken(self.plan, self._line.ranks, exits, self.config)
        self._broken_at = (self._broken_at or now) if found else None
        grace = 0.0 if is_certain(self._line.ranks, exits) else GRACE_S
        if is_about_a_message(self._line.ranks):  # who is to blame shows in where its sender comes to stand
            grace = GRACE_S
        if self._broken_at and now - self._broken_at >= grace:
            self.failure = self._failed(found or "")

    def _resume(self) -> None:
        if self._stepper is None:
            self._fleet.set_limits(tuple(tuple(len(lane.ops) for lane in lanes) for lanes in self.plan.lanes))
            return
        limit, met = self._stops.ahead(self._stepper.cuts, self._stepper.pause())
        self._stepper.resume(limit)
        self._stops.expect(
            met
        )  # not before: whoever looks then would see the run stand, and take it for arrived

    def _decode(self, limit: int, on_text: Callable[[str], None] | None) -> Decoded:
        try:
            with self._lock:
                if self._stepper and not self._stepper.at_end:
                    raise PlanError(
                        f"prefill is not done: run.decode() runs it to its end first.\n{self._stepper.where()}"
                    )
                return self._generation.go(limit, on_text)
        finally:
            self._hear()  # what ranks have found before they answered is known when this returns

    def _hear(self) -> None:
        for rank, note in self._line.new_notes():
            self._take(rank, note)

    def _take(self, rank: int, note: Note) -> None:
        match note:
            case Edited():
                self.edited += [f"{what} on rank {rank}" for what in note.what]
            case FaultStruck():
                self.said += self._armed.struck(rank, note)
            case BreakpointHit():
                if said := self._stops.hit(rank, note):
                    self._stopped(said, note.order)
            case BlockCorrupt():
                found = Corruption.of(note.found)
                self.corrupt.append(found)
                self._marks.note_corrupt(found)
                if note.order is None or not self._stopped(f"stopped: {found}", note.order):
                    self.say(str(found))

    def _stopped(self, said: str, order: int) -> bool:
        """A rank has halted under that order: stop the others, unless the user has sent them elsewhere since."""
        self.message, before = said, self.message
        if self._stepper and self._stepper.pause_order(order):
            self.say(said)
            return True
        self.message = before
        return False

    def _stepping(self) -> Stepper:
        if self._stepper is None:
            raise PlanError(
                "this plan was refuted, so it has no cuts to stop at: resume it, and watch it hang."
            )
        return self._stepper
