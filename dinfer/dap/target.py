"""The session and run behind one client: opening and leaving it, its breakpoints, its moves."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any, NamedTuple, Self

from dinfer.cluster.holder import ClusterTaken
from dinfer.cluster.ipyparallel.errors import ClusterError
from dinfer.cluster.ranks import RankRefused
from dinfer.dap.arguments import TargetArguments
from dinfer.dap.listing import RankListing
from dinfer.dap.places import BreakpointWords, breakpoint_words, line_words
from dinfer.dap.stack import PythonStacks, python_stacks, traceback_stack
from dinfer.dap.stops import DapClient, StopTeller
from dinfer.errors import DinferError, NoAnswer, NotPossible
from dinfer.monitor.stacks import gather
from dinfer.plan.breakpoints import Breakpoint
from dinfer.plan.cut import Unit
from dinfer.results import Decoded
from dinfer.run.run import Run
from dinfer.run.state import IN_OPS, State
from dinfer.session.connect import connect
from dinfer.session.session import Session
from dinfer.views.report.page import write_report

EXCEPTION_FILTERS = {"nan": "NaN", "inf": "Inf", "digest differs": "Changed bytes (digest differs)"}
"""conditions of breakpoints that editors list beside exceptions, each with its label. Ranks that fail, and hangs, stop
a run whatever is chosen."""

DapBreakpoint = Mapping[str, Any]
"""as a client gives it"""


class AskedBreakpoint(NamedTuple):
    """A breakpoint as a client has given it: the words of `break_at`, or why there are none."""

    words: BreakpointWords | None
    refusal: str = ""


class SetBreakpoint(NamedTuple):
    """What has come of it: the number in the run, and what to say of it; None and the reason where it cannot be."""

    number: int | None
    text: str


class DebugTarget:
    """Made by `launched` or `attached`. `stops` tells the client of stops."""

    def __init__(self, session: Session, run: Run, client: DapClient, *, is_ours: bool) -> None:
        self.session, self.run, self.is_ours = session, run, is_ours
        self._say = client.say
        self.listings = [RankListing(run.plan, rank) for rank in range(run.world_size)]
        self._set: dict[str, dict[BreakpointWords, int]] = {}
        """by who has set them (a source, functions, exceptions), the numbers of breakpoints by their words"""
        self.has_ended = False
        """whether there is no more text to decode"""
        self.stops = StopTeller(run, client, self._about)

    # -- opening and leaving

    @classmethod
    def launched(cls, given: TargetArguments, client: DapClient) -> Self:
        """A new run, before its first op. Raises dinfer's errors."""
        prompt = given.prompt_of_run()
        session = connect(
            given.where, given.ranks, profile=given.profile, cluster_id=given.cluster_id, write=_write
        )
        try:
            session.load(given.model, **given.of_load)
            parameters = {name: value for name, value in given.of_prefill.items() if name != "prompt_ids"}
            run = session.prefill(prompt, paused=True, **parameters)
        except BaseException:
            session.close()
            raise
        return cls(session, run, client, is_ours=True)

    @classmethod
    def attached(cls, given: TargetArguments, client: DapClient) -> Self:
        """The run that the ranks of a running cluster hold. Raises dinfer's errors."""
        try:
            session = connect(
                "ipyparallel", given.ranks, profile=given.profile, cluster_id=given.cluster_id, start=False,
                take=given.take, write=_write,
            )  # fmt: skip
        except ClusterTaken as error:
            raise NotPossible(f'{error} In the launch entry: "take": true.') from None
        except ClusterError as error:
            raise NotPossible(f'{error} A launch entry with "request": "launch" starts one, too.') from None
        try:
            run = session.run
        except NotPossible:
            session.leave()
            lost = f" {session.reattached}" if session.reattached else ""
            raise NotPossible(
                f"the ranks hold no run to attach to.{lost} Begin one where the session is, "
                'session.prefill(prompt, paused=True), or use "request": "launch".'
            ) from None
        except BaseException:
            session.leave()
            raise
        return cls(session, run, client, is_ours=False)

    def close(self, *, end: bool) -> None:
        """Stop telling; `end`: end the session, and a cluster that it has started; else leave the ranks as they are."""
        self.stops.close()
        if end:
            self.session.close()
        else:
            self._clear_own()
            self.session.leave()

    # -- breakpoints

    def set_functions(self, asked: Sequence[DapBreakpoint]) -> list[SetBreakpoint]:
        """Replace the function breakpoints."""
        read = [_read(breakpoint_words, str(one.get("name", "")), *_conditions(one)) for one in asked]
        return self._replace("functions", read)

    def set_lines(self, rank: int, asked: Sequence[DapBreakpoint]) -> list[SetBreakpoint]:
        """Replace those in the plan of a rank."""
        listing = self.listings[rank]
        read = [_read(line_words, listing, rank, one.get("line", 0), *_conditions(one)) for one in asked]
        return self._replace(listing.name, read)

    def set_exceptions(self, conditions: Sequence[str]) -> list[SetBreakpoint]:
        """Replace those of EXCEPTION_FILTERS."""
        return self._replace("exceptions", [_read(BreakpointWords, when=one) for one in conditions])

    def _replace(self, owner: str, asked: Sequence[AskedBreakpoint]) -> list[SetBreakpoint]:
        """Set what is new and remove what is gone. A run that goes on freely is stopped for that, and goes on; a step
        is left alone, and ends before what is new is set."""
        set_now = {one.number for one in self.run.breakpoints}  # the console removes some, too
        before = {words: number for words, number in self._set.get(owner, {}).items() if number in set_now}
        wanted = {one.words for one in asked if one.words}
        if before.keys() == wanted:
            return [self._outcome(before, one, {}) for one in asked]
        with self.stops.aside():
            resumes = (
                self.stops.is_moving and self.stops.continues and self.run.standing().state == State.RUNNING
            )
            if resumes:
                self.run.pause()
            kept = {words: number for words, number in before.items() if words in wanted}
            for words, number in before.items():
                if words not in wanted:
                    self._remove(number)
            refusals = dict[BreakpointWords, str]()
            for words in dict.fromkeys(one.words for one in asked if one.words):
                if words not in kept:
                    try:
                        kept[words] = self.run.break_at(**words._asdict()).number
                    except DinferError as error:
                        refusals[words] = str(error)
            self._set[owner] = kept
            if resumes and self.stops.continues:
                self.run.resume()
        return [self._outcome(kept, one, refusals) for one in asked]

    def _outcome(
        self,
        numbers: Mapping[BreakpointWords, int],
        one: AskedBreakpoint,
        refusals: Mapping[BreakpointWords, str],
    ) -> SetBreakpoint:
        if one.words is None:
            return SetBreakpoint(None, one.refusal)
        if one.words not in numbers:
            return SetBreakpoint(None, refusals.get(one.words, "it cannot be set"))
        number = numbers[one.words]
        known = {each.number: str(each) for each in self.run.breakpoints}
        if number not in known:
            return SetBreakpoint(None, "it has been removed")
        return SetBreakpoint(number, known[number])

    def _about(self, numbers: tuple[int, ...]) -> tuple[str, int | None]:
        """Why editors say that these breakpoints have stopped the run, and on which rank."""
        owners = {owner for owner, known in self._set.items() if set(known.values()) & set(numbers)}
        reason = "breakpoint" if owners - {"functions", "exceptions"} else "function breakpoint"
        if owners == {"exceptions"}:
            reason = "exception"
        first = next((one for one in self.run.breakpoints if one.number == numbers[0]), None)
        return reason, self._rank_of(first) if first else None  # None: it was removed while a step went there

    def _rank_of(self, one: Breakpoint) -> int | None:
        if one.rank is not None:
            return one.rank
        if self.run.met_on is not None:
            return self.run.met_on
        return self.run.plan.shape.owners[one.layer] if one.layer is not None and one.op == "layer" else None

    def _remove(self, number: int) -> None:
        with suppress(DinferError):  # the console may have removed it
            self.run.breakpoints.remove(number)

    def _clear_own(self) -> None:
        """The breakpoints of this client go with it; others stay."""
        for known in self._set.values():
            for number in known.values():
                self._remove(number)
        self._set = {}

    # -- moves; each ends with a stop

    def step(self, unit: Unit) -> None:
        """A unit on, but not past a breakpoint; after prefill, a token."""
        if self.run.standing().state == State.DONE:
            found = self.run.step("token")
            assert isinstance(found, Decoded)
            self._decoded(found)
        else:
            self._say("console", str(self.run.step_to_stop(unit)))

    def step_back(self, unit: Unit) -> None:
        """A unit back; a token, if there are new ones."""
        self._say("console", str(self.run.step_back("token" if self.run.tokens else unit)))

    def back(self) -> None:
        """Back to the last breakpoint, or the start."""
        self._say("console", str(self.run.resume_back()))

    def resume(self) -> None:
        """On to the next breakpoint, or the end of prefill; from there, decode."""
        if self.run.standing().state == State.DONE:
            self._decoded(self.run.decode(on_text=lambda text: self._say("stdout", text)), said=True)
        else:
            self.run.resume()

    def go_to(self, chunk: int, layer: int) -> None:
        """To just after that block."""
        self._say("console", str(self.run.run_to(chunk=chunk, layer=layer)))

    def restart(self) -> None:
        """Begin again, after what the remedy says if the run cannot go on."""
        self.has_ended = False
        if self.run.standing().remedy:
            self.run.mend()
        else:
            self.run.restart()

    def pause(self) -> None:
        self.stops.pausing()
        self.run.pause()

    def _decoded(self, found: Decoded, *, said: bool = False) -> None:
        self.has_ended = found.ended or (found.stopped == "max_new_tokens" and said)
        if not said and found.text:
            self._say("stdout", found.text)
        self._say("console", str(found).rpartition("\n")[2])

    # -- looking

    @cached_property
    def chunk_labels(self) -> list[str]:
        """The text of each chunk."""
        return self.run.chunk_labels()

    def python_of(self, rank: int) -> PythonStacks:
        """What the threads of a rank do in Python, if it is in an op; the exception with which it has failed."""
        standing = self.run.standing()
        state = self.session.ranks.ranks[rank]
        if state.error:
            return traceback_stack(state.error.traceback)
        is_in_op = bool(standing.stands) and any(standing.stands[rank].started)
        if not standing.alive[rank] or not (is_in_op or standing.state in IN_OPS):
            return {}
        with suppress(NoAnswer, RankRefused):
            return python_stacks(gather(self.session.ranks, [rank])[rank].text)
        return {}


def _conditions(one: DapBreakpoint) -> tuple[str, str]:
    """The condition and the number of a hit that stand beside a breakpoint, "" where there is none."""
    return str(one.get("condition") or ""), str(one.get("hitCondition") or "")


def _read(read: Callable[..., BreakpointWords], *given: Any, **named: Any) -> AskedBreakpoint:
    try:
        return AskedBreakpoint(read(*given, **named))
    except DinferError as error:
        return AskedBreakpoint(None, str(error))


def _write(trace: Any, path: Any) -> Any:
    return write_report([trace], path)
