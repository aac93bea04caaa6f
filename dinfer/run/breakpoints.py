"""The breakpoints of one run: setting them, arming their conditions on the ranks, noticing that one is met."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from dinfer.config import Config
from dinfer.display import listed
from dinfer.history import History
from dinfer.messages import BreakpointHit, SetBreakpoints
from dinfer.plan.breakpoints import Breakpoint, OpOfRank, check, next_stop, parse_when, previous_stop
from dinfer.plan.cut import Cut, Cuts
from dinfer.plan.ops import OpKind, PlanError, parse_op
from dinfer.results import Breakpoints


class BreakpointTable:
    """`tell` gives the ranks the conditions to look for; `view` is what a user sees and changes, and `note(call)` logs
    such a change."""

    def __init__(
        self,
        config: Config,
        tell: Callable[[SetBreakpoints], object],
        history: History,
        note: Callable[[str], object],
    ) -> None:
        self._config, self._tell, self._history, self._note = config, tell, history, note
        self._found: dict[int, Breakpoint] = {}
        self._count = 0
        self._ahead: tuple[list[Breakpoint], Cut] = [], ()
        """the breakpoints that the run is on its way to, and the cut at which it meets them"""
        self._conditions_met: dict[int, set[OpOfRank]] = {}
        """where the ranks have met the condition of each breakpoint so far, by its number"""
        self._here: tuple[int, OpOfRank] | None = None
        """of these, the one that has stopped the run where it stands"""
        self.met: tuple[int, ...] = ()
        """numbers of the breakpoints that have stopped the run where it stands"""
        self._hits = Counter[int]()
        self.view = Breakpoints(self._found, self._changed_there, self._hits)

    @property
    def met_on(self) -> int | None:
        """The rank that has met the condition of the breakpoint that has stopped the run, if it has one."""
        return self._here[1][0] if self._here else None

    def add(self, cuts: Cuts, op: OpKind | None, when: str | None, **where: int | None) -> Breakpoint:
        """Set a breakpoint; `where`: rank, chunk, layer and hit. Raises PlanError where no op of the plan could meet
        it."""
        condition, bound = parse_when(when)
        if condition == "digest" and not self._config.digests:
            raise PlanError(f"when is {when!r}, but this run has digests=False: start it with digests=True.")
        kind = op or ("recv" if condition == "digest" else "layer")
        place: dict[str, Any] = dict(where)
        one = Breakpoint(self._count + 1, op=kind, condition=condition, bound=bound, **place)
        check(one, cuts)
        before = dict(self._found)
        self._count += 1
        self._found[one.number] = one
        self._changed(one.call, before)
        return one

    def ahead(self, cuts: Cuts, cut: Cut) -> tuple[Cut, list[Breakpoint]]:
        """How far a run that stands at `cut` may go on, and the breakpoints that it meets there."""
        return next_stop(cuts, cut, list(self._found.values()))

    def behind(self, cuts: Cuts, cut: Cut) -> tuple[Cut, list[Breakpoint]]:
        """The last cut before this one at which a breakpoint has stopped the run, or would have; of conditions, where
        the ranks have met them so far. The start, and none, if there is no such cut."""
        met = {number: set(found) for number, found in self._conditions_met.items()}
        if self._here:
            number, op = self._here
            met[number].discard(op)
        return previous_stop(cuts, cut, list(self._found.values()), met)

    def expect(self, breakpoints: list[Breakpoint], at: Cut = ()) -> None:
        """The run is about to be sent to these, which it meets at that cut; none: it is sent elsewhere than to the next
        breakpoint."""
        self._ahead, self._here, self.met = (breakpoints, at), None, ()

    def arrived(self, cut: Cut) -> str:
        """The message for a run that stands at that cut, once; empty if it has come to no breakpoint there."""
        met, at = self._ahead
        if not met or cut != at:
            return ""
        self._ahead = [], ()
        self._hits.update(one.number for one in met)
        self.met = tuple(one.number for one in met)
        return f"stopped at {'; '.join(map(str, met))}"

    def hit(self, rank: int, note: BreakpointHit) -> str:
        """The message for a condition that a rank reports as met; empty if that breakpoint was removed."""
        one = Breakpoint(**note.breakpoint)
        if not self._found.get(one.number, one).enabled or one.number not in self._found:
            return ""
        self._hits[one.number] += 1
        self._ahead, self.met = ([], ()), (one.number,)
        with suppress(PlanError):  # it may be no op of the plan, such as a token
            self._here = one.number, (rank, parse_op(note.op))
            self._conditions_met.setdefault(one.number, set()).add(self._here[1])
        return f"stopped at {one}: rank {rank}, `{note.op}`: {note.found}"

    def arm(self) -> None:
        """Have the ranks look for the conditions that are set now, and for no others. They keep all breakpoints, for a
        session that comes after this one."""
        self._tell(SetBreakpoints(tuple(one.as_dict() for one in self._found.values())))

    def take_over(self, breakpoints: Sequence[dict[str, Any]]) -> None:
        """Take over those that the ranks have kept of an earlier session."""
        self._found.update({one.number: one for one in (Breakpoint(**found) for found in breakpoints)})
        self._count = max(self._found, default=0)

    def _changed_there(self, call: str, before: Mapping[int, Breakpoint]) -> None:
        """A user has changed the list in `view`."""
        self._note(call)
        self._changed(call, before)

    def _changed(self, call: str, before: Mapping[int, Breakpoint]) -> None:
        """This call has changed the list, which was `before`."""
        self.arm()
        if before != self._found:
            self._history.add(call, partial(self._restore, before))

    def _restore(self, before: Mapping[int, Breakpoint]) -> str:
        """Set those of `before` and no others; what that changed."""
        texts = [f"removed {one}" for number, one in self._found.items() if number not in before]
        texts += [f"set {one} again" for number, one in before.items() if number not in self._found]
        texts += [
            f"{'enabled' if one.enabled else 'disabled'} #{number}"
            for number, one in before.items()
            if number in self._found and self._found[number].enabled != one.enabled
        ]
        self._found.clear()
        self._found.update(before)
        self.arm()
        return listed(texts)
