"""Run: one distributed prefill, and the decode after it, as its user holds it.

A Run is made of parts, each in a file of its own. All of them get its `state`: job, ranks, what it is doing and why.
`action` says who may move it and who hears of changes, `moves` and `stepper` go from cut to cut, `play` at a pace, and
`history` takes that back; `hang` sees failures and gives the verdict; `breakpoints`, `faults`, `decode` and `events`
are what they say; `inspect` reads what the ranks hold, `recorder` makes reports, folders and replays of all that. Here
each call of a user goes to the part that does it.
"""

import json
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import wraps
from operator import attrgetter
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar, overload

from dinfer.arguments import CHECKED, argument_check
from dinfer.cluster.kv import Live
from dinfer.cluster.lease import RankLease
from dinfer.cluster.ranks import RankRefused, Ranks
from dinfer.display import Displayable, DisplayableText, Table, Tidy
from dinfer.engine.corruption import Corruption
from dinfer.engine.finite import NonFinite
from dinfer.errors import NotPossible, ipython
from dinfer.history import History, call_text
from dinfer.job import Job
from dinfer.kv.reference.comparison import Comparison
from dinfer.kv.source import ViewableSource
from dinfer.kv.view import KV, AttentionWeights, Hidden
from dinfer.messages import (
    Answer,
    BlockCorrupt,
    BreakpointHit,
    Command,
    Edited,
    FaultStruck,
    FirstNonFinite,
    GetStand,
)
from dinfer.model.decoder import Decoder
from dinfer.plan.breakpoints import Breakpoint
from dinfer.plan.cut import Unit, count_of, cut_of, unit_of
from dinfer.plan.ops import OpKind, PlanError
from dinfer.results import Breakpoints, Decoded, Moved, Where
from dinfer.run.action import Actions
from dinfer.run.breakpoints import BreakpointTable
from dinfer.run.comparison import RunComparison, compare_runs
from dinfer.run.decode import Generation
from dinfer.run.events import RunEvents
from dinfer.run.failure import RankFailed
from dinfer.run.faults import Armed, Injected
from dinfer.run.graft import Grafts
from dinfer.run.hang import Health, Hung
from dinfer.run.history import MoveHistory
from dinfer.run.inspect import RunInspector, check_comparable
from dinfer.run.kept import KeptKv
from dinfer.run.left import LeftRun
from dinfer.run.log import CallLog
from dinfer.run.moves import Moves
from dinfer.run.play import Player, period_of
from dinfer.run.prediction import prediction
from dinfer.run.recorder import RunRecorder
from dinfer.run.report import NO_VIEWS, Reporter
from dinfer.run.state import (
    IN_OPS,
    MOVING,
    RECOVER,
    RESTART,
    RunState,
    Standing,
    where_of,
)
from dinfer.run.stepper import Move, NoProgress
from dinfer.saved.bisect.collect import Collected, collect
from dinfer.saved.bisect.result import Bisection
from dinfer.saved.bisect.search import Bisectable, bisect_run
from dinfer.saved.replay.replay import Replay
from dinfer.saved.saved import Saved
from dinfer.severity import Severity
from dinfer.trace.events import Event
from dinfer.trace.findings import Findings
from dinfer.trace.moment import Moment, moment_after
from dinfer.trace.stretch import Stretch, stretch_between
from dinfer.trace.trace import Trace
from dinfer.verdict.verdict import Verdict

ANSWER_S = 30.0

A = TypeVar("A", bound=Answer)

END_S = 10.0
"""how long a run that is closed waits for the action under way to end"""

POLL_S = 0.05

P = ParamSpec("P")

T = TypeVar("T")

RunMethod = Callable[Concatenate["Run", P], T]


def action(*, alone: bool = True, moves: bool = False) -> Callable[[RunMethod[P, T]], RunMethod[P, T]]:
    """Make a method an action, as `Actions.taken` describes. `moves`: it moves the run, so it ends a play first, and
    can be undone."""

    def decorated(method: RunMethod[P, T]) -> RunMethod[P, T]:
        name: str = method.__name__
        check = argument_check(method, "run")

        @wraps(method)
        def called(run: "Run", /, *args: P.args, **kwargs: P.kwargs) -> T:
            check(run, *args, **kwargs)
            call = call_text(name, args, kwargs)
            if moves:
                run._end_play()
            with (
                run._actions.taken(call, alone=alone) as made,
                run._moving.moving(made) if moves else nullcontext(),
            ):
                found = method(run, *args, **kwargs)
                made.cut_short = isinstance(found, Decoded) and found.stopped == "user"
                return found

        setattr(called, CHECKED, True)
        return called

    return decorated


def _of_state(name: str, about: str) -> Any:
    """A property of a run: what its state has under that name."""
    return property(attrgetter(f"_state.{name}"), doc=about)


class Run(Tidy, Displayable):
    """Made by `session.prefill`; it stands before its first op. Actions may be called from any thread: they happen one
    after another, except `pause`, which stops the one under way.

    `plan`: the ops of its `world_size` ranks; `config`: its parameters.
    `prepare()` makes all ranks ready for the prompt, with all lanes at limit 0, and returns the id of each rank's plan.
    `left`: the ranks are in this run already, as an earlier session has left it.
    """

    INTERNAL = frozenset({
        "INTERNAL", "call_name", "cause", "check", "chunk_labels", "close", "collected", "events_since", "findings",
        "hold", "job", "keeps", "kept", "last_call", "last_standing", "left_blocked", "live", "load_again", "look",
        "mend", "met", "met_on", "on_change", "recover", "recovering", "reporter", "runs", "said", "say", "show",
        "silence", "step_to_stop", "story", "stuck_ranks", "told", "undoable",
    })  # fmt: skip
    show: Callable[[Any], Any] | None = None
    """makes the panel that a notebook shows for a run; set by the session, as is the next"""
    reporter: Reporter | None = None
    recover: Callable[[], object] | None = None
    """frees the session's ranks and brings back lost ones"""
    load_again: Callable[[], object] | None = None
    """loads its checkpoint again on the session's ranks, as for this run"""
    runs: Any = None
    """the runs of its session"""
    keeps = False
    """whether the values of its KV are kept once it is over"""

    def __init__(
        self,
        job: Job,
        ranks: Ranks,
        devices: list[str],
        tokenizer: Any | None,
        prepare: Callable[[], dict[int, int]],
        left: LeftRun | None = None,
    ) -> None:
        self.job, self.plan, self.config = job, job.plan, job.config
        self.world_size = job.plan.world_size
        self._prepare = prepare
        self._state = state = RunState(job, RankLease(ranks), devices)
        self._health = Health(state)
        self.check, self.say = self._health.check, state.say  # for the session, as are the next
        self.stuck_ranks, self.left_blocked = self._health.stuck_ranks, self._health.left_blocked
        self._history = history = History()
        self._breakpoints = BreakpointTable(job.config, self._ask_all, history, state.note_call)
        state.arrived = self._breakpoints.arrived
        self._faults = Armed(state, self._ask_all, history)
        self._generation = Generation(state, self.check, tokenizer)
        self._events = RunEvents(state)
        self._moves = Moves(state, self._breakpoints, self.check, self._went)
        self._actions = Actions(state, self.check, self._interrupted)
        self._player = Player(state, self._play_failed, self._actions.tell)
        self._moving = MoveHistory(state, self._moves, self._generation, history)
        self._inspector = RunInspector(state, self._actions, self.check, tokenizer)
        self._recorder = RunRecorder(
            state, self._health, self._breakpoints, self._faults, self._events, self._inspector, self.look
        )
        self._grafts = Grafts(state, self._inspector, self._recorder, history)
        self._begin(left)

    # -- moving

    @action(moves=True)
    def step(self, unit: Unit | str = "layer", n: int = 1) -> Moved | Decoded:
        """Move on by `n` units: "op", "layer", "wave", "chunk", or, after prefill, "token". At the end it does nothing,
        and says so."""
        if unit == "token":
            self._generation.begin()
            return self._decode(count_of(n), None)
        return self._moves.moved(self._moves.leaving().step(unit_of(unit), count_of(n)))

    @action(moves=True)
    def step_back(self, unit: Unit | str = "layer", n: int = 1) -> Moved | Decoded:
        """Undo the last `n` units in the global order, whatever did them; what follows then is computed anew. After
        decode, every unit but "token" goes back into prefill and forgets the new tokens."""
        if unit == "token":
            return self._generation.back_to(max(0, len(self.tokens) - count_of(n)))
        return self._moves.moved(self._moves.leaving().step_back(unit_of(unit), count_of(n)))

    @action(moves=True)
    def play(self, unit: Unit | str = "layer", per_second: float = 2.0) -> None:
        """Step by units at that pace, to the next breakpoint or the end of prefill, until `pause()` or another call
        that moves the run. Returns at once: `wait()` waits for it. Raises PlanError for a pace out of range."""
        chosen, period = unit_of(unit), period_of(per_second)
        if self._moves.play_from():
            call = f'run.play("{chosen}", per_second={per_second:g})'
            self._player.start(call, lambda stopping: self._play_on(chosen, stopping), period)

    def undo(self) -> DisplayableText:
        """Undo the last action that can be undone, and say in one line what that did: a move, by going to where the run
        stood before it, with as many new tokens as it had there; decode; a restart; or a change of breakpoints or
        faults. The next undo goes further back. What was edited by hand stays as it is."""
        self._end_play()
        with self._actions.taken("run.undo()") as made, self._moving.undoing(made):
            made.undid = self.undoable
            return self._history.undo()

    @action(moves=True)
    def run_to(self, chunk: int, layer: int) -> Moved:
        """Stop just after that block is on every rank, with all blocks before it; forward or back. Raises PlanError for
        an unknown block."""
        return self._moves.moved(self._moves.leaving().run_to(chunk, layer))

    @action(moves=True)
    def resume_back(self) -> Moved:
        """Go back to the last place before this one at which a breakpoint has stopped the run, or would have; without
        one, to the start. A condition counts where the ranks have met it on their way here."""
        return self._moves.back_to_stop()

    @action(moves=True)
    def go_to(self, positions: Sequence[Sequence[int]]) -> Moved:
        """Go to any cut, forward or back, past breakpoints: `positions[rank][lane]` is how many ops of that lane are
        done then. Logs of calls have such cuts. Raises PlanError where ranks would wait for one another there."""
        return self._moves.moved(self._moves.leaving().go_to(cut_of(self._moves.stepper.cuts, positions)))

    @action(moves=True)
    def resume(self) -> None:
        """Let the ranks go on to the next breakpoint, or the end of prefill; returns at once."""
        self._moves.resume()

    @action(alone=False)
    def pause(self) -> Where:
        """Stop the run, a play, or the action that another thread waits for, at the nearest cut; in decode, after a
        token."""
        self._pause()
        return self.where()

    def wait(self, timeout: float | None = None) -> Where:
        """Wait until the run, or a play of it, stops: at a breakpoint, at the end of prefill, or paused. Raises
        NoProgress after `timeout` seconds, RankFailed where a rank has failed, Hung where the run hangs, and the error
        that ended a play."""
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            while self._player.wait(POLL_S) or self._state.is_doing(IN_OPS, POLL_S):
                self.check()
                if deadline is not None and time.monotonic() > deadline:
                    raise NoProgress(f"the run does not stand after {timeout:g} s:\n{self.where()}")
        except KeyboardInterrupt:
            self._interrupted()
            raise
        self.look()
        self.check()
        self._player.check()
        return self.where()

    def restart(self) -> Where:
        """Begin again, paused at the start, with the same breakpoints and faults; also after `session.recover()`. Stops
        what is under way first."""
        with self._actions.halted(self._stop), self._moving.restarting("run.restart()"):
            made = self._actions.begin("run.restart()")
            self._breakpoints.expect([])
            self._begin()
            self._breakpoints.arm()
            if self._faults:
                self._faults.arm()
            made.after = self._state.cut_now()
        self._actions.tell()
        return self.where()

    def mend(self) -> Where:
        """Do what `standing().remedy` says: `session.recover()` if need be, and restart; or load the weights again that
        were overwritten, after which this run is over. Raises NotPossible where there is nothing to mend, or only the
        user can."""
        remedy, recover = self._state.remedy, self.recover
        if self._state.is_outdated and self.load_again:
            self.load_again()
            return self.where()
        if remedy not in (RECOVER, RESTART) or (remedy == RECOVER and recover is None):
            raise NotPossible(f"nothing here can be mended: {remedy or f'the run is {self._state.now}'}")
        if remedy == RECOVER and recover:
            recover()
        where = self.restart()
        self._state.last_call = remedy
        return where

    # -- breakpoints

    @action()
    def break_at(
        self,
        *,
        layer: int | None = None,
        chunk: int | None = None,
        rank: int | None = None,
        op: OpKind | None = None,
        when: str | None = None,
        hit: int | None = None,
    ) -> Breakpoint:
        """Stop after ops of this layer, chunk and rank, each None for any, and of this kind ("layer" by default).

        `when`: only where that holds: "nan", "inf", "absmax > 100" (of what the op made), "digest differs" (bytes
        changed on their way), "slower than 5 ms". Without it, the run stops as `run_to` would. `hit`: only at its hit
        of that number, from 1, in the order of steps by op; with `when`, each rank counts its own. Raises PlanError.
        """
        cuts = self._moves.stepper.cuts
        number = None if hit is None else count_of(hit, "hit")
        return self._breakpoints.add(cuts, op, when, rank=rank, chunk=chunk, layer=layer, hit=number)

    @property
    def breakpoints(self) -> Breakpoints:
        """The breakpoints that are set; `run.breakpoints.clear()` and `.remove(number)` remove them."""
        return self._breakpoints.view

    @property
    def undoable(self) -> str:
        """The call that `undo` would undo; "" where there is none."""
        return self._history.last

    @property
    def calls(self) -> CallLog:
        """The calls made on this run so far; `run.calls.cell()` and `.save("replay.ipynb")` make them again."""
        return self._state.calls

    # -- decode

    @action(moves=True)
    def decode(
        self, max_new_tokens: int | None = None, on_text: Callable[[str], None] | None = None
    ) -> Decoded:
        """Run prefill to its end if need be, then generate up to that many more tokens, the same on every rank; fewer
        if the text ends. `on_text` is called with each piece of text as it arrives."""
        default = self.config.max_new_tokens
        more = default if max_new_tokens is None else count_of(max_new_tokens, "max_new_tokens")
        generation = self._generation
        generation.begin()
        try:
            if self._moves.finish(lambda: generation.is_stopped, lambda: generation.expect(more)):
                return self._decode(more, on_text)
        finally:
            generation.end()
        self.look()
        clear = "; run.breakpoints.clear() removes all breakpoints" * bool(self.breakpoints)
        remark = (
            f"prefill is not done: {self.message or 'it was paused'}\n"
            f"run.resume() or run.decode() goes on from there{clear}"
        )
        return Decoded((), "", "", 0, remark)

    @property
    def tokens(self) -> list[int]:
        """The new tokens so far, the same on every rank."""
        return list(self._state.tokens)

    text: str = _of_state("text", "The text of the new tokens, in whole characters.")

    # -- where it stands, and why

    def where(self) -> Where:
        """The position of each rank, one line each; then what else is known, such as the first NaN or Inf."""
        if self._state.nonfinite.first:
            self._events.wait()
            self._events.note_nonfinite()
        return where_of(self.plan, self.standing(), self._state)

    @property
    def severity(self) -> Severity:
        """How grave it is what `where()` says."""
        return self.where().severity

    def standing(self) -> Standing:
        """The run at this moment; returns at once."""
        return self._recorder.standing()

    def verdict(self) -> Verdict:
        """Why the run does not move: who waits for whom, for what, and who is to blame; or that it moves, and whether a
        rank is slow."""
        return self._health.verdict()

    def on_change(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback()`, on any thread, whenever the run may have changed; the function returned ends that."""
        return self._actions.on_change(callback)

    def chunk_labels(self) -> list[str]:
        """The text of each chunk, in whole characters; empty where there is no tokenizer."""
        return self._inspector.chunk_labels()

    # -- what the ranks hold

    def kv(self, layer: int | None = None, *, chunk: int | None = None, rank: int | None = None) -> KV:
        """The KV that the ranks hold, of a layer, a chunk, a rank, each None for all; first waits until the run stands
        still. `.k[head, tokens]` and `.v[head, tokens]` fetch values, [heads, tokens, head_dim]; `.diff()` finds where
        ranks differ. Raises PlanError for what does not exist, or not yet."""
        return self._inspector.kv(layer=layer, chunk=chunk, rank=rank)

    def hidden(self, chunk: int, layer: int) -> Hidden:
        """The hidden state of a chunk before a layer (or after the last), from the rank that owns it, which recomputes
        it if it is no longer in memory. `[tokens, dims]` fetches values. Raises PlanError for what does not exist, or
        not yet."""
        return self._inspector.hidden(chunk, layer)

    def attention(self, layer: int, chunk: int, head: int | None = None) -> AttentionWeights:
        """The attention weights of a chunk's tokens in a layer, over themselves and all earlier tokens: recomputed on
        the rank that owns the layer, from its hidden state and the KV that it holds. Raises PlanError."""
        return self._inspector.attention(layer, chunk, head)

    @overload
    def compare(
        self, what: str = "reference", *, chunked: bool | None = None, dtype: str | None = None
    ) -> Comparison: ...
    @overload
    def compare(self, what: "Run | Saved") -> RunComparison: ...
    def compare(
        self,
        what: "str | Run | Saved" = "reference",
        *,
        chunked: bool | None = None,
        dtype: str | None = None,
    ) -> Comparison | RunComparison:
        """Compare with another run, live, over or saved: KV by digests, first block and first new token that differ,
        times, plan, parameters, side by side. Where prompt, checkpoint or dtype differ, the KV is not compared.

        "reference": compare what the ranks hold with transformers' own forward of the same checkpoint, at the ranks'
        thread count: K, V and hidden states of every layer and chunk, and every new token fed as the run fed it.

        By default, in the run's chunks and dtype, every bit must be the same (on a CPU). `chunked=False` feeds the
        prompt at once, and `dtype` loads the checkpoint in another one; then differences up to a stated tolerance are
        rounding (`dinfer.model.tolerance`). A checkpoint whose rotary angles may depend on the length (long-rope) is
        compared both ways, unless `chunked` is given: `at_once` of the result is the second. A run that stands half-way
        is compared as far as it has come. Raises PlanError where nothing is computed yet or an argument is unknown, and
        RankRefused where a second KV, or the weights in `dtype`, do not fit into memory.
        """
        if isinstance(what, Run | Saved):
            return compare_runs(self, what)
        return self._compare(what, chunked=chunked, dtype=dtype)

    def bisect(
        self,
        against: "str | Bisectable" = "reference",
        *,
        rank: int | None = None,
        what: str | None = None,
        model_path: str | Path = "",
        device: str = "",
        decoder: Decoder | None = None,
    ) -> Bisection:
        """The first block with which the answer of `rank` turns from another's into its own: K or V, or a hidden state
        that entered a rank; and whether the answer agrees once that alone is the other's.

        `against`: transformers' own forward, "reference", or another run of the same prompt, live or saved; `rank`: by
        default all, and the first wrong part is told; `what`: whether new "tokens", "logits" or "hidden" states have to
        agree, by default tokens if they differ, else logits.

        Prefill is computed again in this process, on one copy of the weights, once for each halving of the parts that
        differ; the run is only read. `model_path`, `device`, `decoder`: as `replay` takes them. Raises NothingYet
        before the end of prefill, PlanError for another prompt or model, and as `replay` does.
        """
        return bisect_run(
            self, against, rank=rank, what=what, model_path=str(model_path), device=device, decoder=decoder
        )

    def sha256(self) -> list[str]:
        """SHA-256 of the KV that each rank holds of the prompt, once prefill is done."""
        return self._inspector.sha256()

    def source(self) -> ViewableSource:
        """What the ranks hold, once the run stands still; of a run that is over, what was kept of it. Raises RunOver
        where nothing was."""
        return self._inspector.source()

    def hold(self) -> AbstractContextManager[None]:
        """Wait until the run stands still, and let no action move it meanwhile. Raises RunOver for a run that is over
        and of which nothing was kept, and as `check` does for one that moves and cannot go on."""
        return self._inspector.hold()

    # -- faults

    @action()
    def inject(
        self,
        kind: str,
        *,
        rank: int | None = None,
        layer: int | None = None,
        chunk: int | None = None,
        tensor: str | None = None,
        head: int | None = None,
        token: int | None = None,
        dim: int | None = None,
        bit: int | None = None,
        where: str | None = None,
        dtype: str | None = None,
        seed: int | None = None,
        source: int | None = None,
        target: int | None = None,
        ms: float | None = None,
        factor: float | None = None,
    ) -> Injected:
        """Break something on purpose, now or as soon as it exists; for a run that stands still.

        One value of a block: "bitflip", "nan". One row, of a head and token: "zero". A block: "stale" (it holds the
        rows of the chunk before), "swap_kv", "permute" (its tokens, drawn by `seed`), "lost" (zeros), "head_shift",
        "cast" (through `dtype` and back), "append_twice" (its rows again behind the layer's, so that `rank` holds
        more). "positions": the layer gets wrong ones. "repeat_row": decode appends each row twice, on all ranks.

        `where`: "memory": on `rank`, once the block is there; "wire": on its way to `rank`; "compute": on the rank that
        owns the layer, so that all ranks get it alike. The defaults: the first of these that the kind allows, the rank
        that receives the block first, K, head 0, the chunk's first token, dim 0, a bit in the middle of the mantissa.
        `token` is a position in the prompt and selects its chunk.

        Time, and no byte: "slow link": each message from rank `source` to rank `target` takes `ms` milliseconds longer;
        "slow rank": each layer on `rank` does, in prefill, or takes `factor` times as long. In sessions on threads and
        over gloo.

        It strikes again whenever the block is made again, until `run.faults.clear()`. Raises PlanError for a fault that
        is not possible.
        """
        injected = self._faults.inject(
            self._ask_all(GetStand()), kind, rank=rank, layer=layer, chunk=chunk, tensor=tensor, head=head,
            token=token, dim=dim, bit=bit, where=where, dtype=dtype, seed=seed, source=source, target=target, ms=ms,
            factor=factor,
        )  # fmt: skip
        self.look()
        return injected

    @action()
    def graft(
        self,
        *,
        layer: int,
        chunk: int,
        source: "str | Bisectable",
        rank: int | None = None,
        part: str | None = None,
    ) -> DisplayableText:
        """Put another run's block into the cache of `rank`, or of all ranks that hold it, in the place of their own; as
        the rank of that run held it that computed it. What was computed from the old block stays: to have it computed
        again, go back before it and on.

        `source`: another run of the same prompt, live or saved, or "reference", transformers' own forward, which is run
        in this process; `part`: "K" or "V", by default both. It counts as an edit by hand, and can be undone. Raises
        PlanError for another prompt or model, a block that does not exist, and one that is not there yet.
        """
        with self.hold():
            done = self._grafts.graft(layer=layer, chunk=chunk, source=source, rank=rank, part=part)
            self.look()
            return done

    @property
    def faults(self) -> Armed:
        """The armed faults, and what they have done; `run.faults.clear()` and `.remove(number)` disarm them."""
        return self._faults

    # -- events, reports, folders, replays

    @property
    def trace(self) -> Trace:
        """The events of all ranks so far; of a run that stands still, all of them."""
        return self._events.trace()

    def at(self, seconds: float) -> Moment:
        """What every lane and link did that many seconds after the first op began. Pauses between steps do not count,
        as on the panel's time strip, which shows this call."""
        return moment_after(self.trace, seconds)

    def stretch(self, begin: float, end: float) -> Stretch:
        """What each rank's time between two moments, counted as in `at()`, went into, and what each link carried.
        Raises TraceError where `end` is before `begin`."""
        return stretch_between(self.trace, begin, end)

    def prediction(self) -> Table:
        """Seconds of prefill as they are predicted beside those measured so far: in all, by rank and by link. Raises
        NotPossible unless `session.measure()`, or a run with "auto", came before the run."""
        return prediction(self.job, self.trace)

    def events_since(self, read: Sequence[int]) -> tuple[list[Event], list[int]]:
        """The events after those that have been `read`, [] at first, and the `read` of the next call. All events of a
        run that has been restarted since."""
        return self._events.since(read)

    def report(
        self, path: str | Path = "report.html", *, prompt: bool = False, environment: bool = False
    ) -> Path:
        """Write what is known of the run, once it stands still, to one HTML file; the file's path. With `prompt` it
        holds the prompt and the new text, with `environment` this process's environment variables: look for secrets in
        them before you pass it on. A file that this run has not written is kept, and the new one gets a number. Raises
        NotPossible for a name that ends otherwise than .html, and OSError, at once where the file's folder is missing
        and cannot be made."""
        if self.reporter is None:
            raise NotPossible(NO_VIEWS)
        given = {"prompt": prompt} if prompt else {}
        self._state.note_call(call_text("report", (str(path),), given))
        return self._recorder.report(path, self.reporter, prompt=prompt, environment=environment)

    def findings(self) -> Findings:
        """What a report says of the run, besides its events."""
        return self._recorder.findings(self.reporter)

    def save(
        self,
        folder: str | Path,
        *,
        kv: bool | Sequence[int] = True,
        hidden: bool = True,
        prompt: bool = False,
    ) -> Path:
        """Save the run to a folder, which `dinfer.open` opens without a cluster or a checkpoint; the folder's path.

        First waits until the run stands still; one that hangs or has failed is saved as far as its ranks answer. The
        folder holds the plan, the trace, the verdict, token ids and the digests of all rows; with `kv` the values of
        all layers, or of those in a list; with `hidden` what has entered each rank, for replays; with `prompt` its text
        and that of new tokens. What this run had saved there is replaced; another saved run is kept, and the new folder
        gets a number. Of a run that is over, there are values only where they were kept, and no hidden states. Raises
        SavedError where something else is there, and RunOver where nothing was kept, or not what `kv` asks for.
        """
        defaults = {"kv": (kv, True), "hidden": (hidden, True), "prompt": (prompt, False)}
        given = {name: one for name, (one, default) in defaults.items() if one != default}
        self._state.note_call(call_text("save", (str(folder),), given))
        return self._recorder.save(folder, self.reporter, kv=kv, hidden=hidden, prompt=prompt)

    def replay(
        self, rank: int, *, model_path: str | Path = "", device: str = "", decoder: Decoder | None = None
    ) -> Replay:
        """One rank of this run alone, without its peers, in this process: what they sent to it comes from what it holds
        now. It begins before its first op, is stepped as a run is, and ends at the op at which the rank stands.

        `model_path`: the checkpoint's folder here, if not the ranks'; `device`: by default a GPU if the rank had one
        and there is one here, else the CPU; `decoder`: weights that are loaded already. Raises PlanError for an unknown
        rank, RankFailed where it is gone, RecordError for another checkpoint.
        """
        record = self._recorder.record_of(rank)
        return Replay(record, model_path=str(model_path), device=device, decoder=decoder)

    # -- for the session and the debug adapter

    @action(moves=True)
    def step_to_stop(self, unit: Unit | str) -> Moved:
        """As `step`, but not past the next breakpoint."""
        return self._moves.step_to_stop(unit_of(unit))

    def live(self) -> Live:
        """What the ranks hold now, also of a run that hangs or has failed, as far as its ranks answer."""
        return self._inspector.live()

    @property
    def met(self) -> tuple[int, ...]:
        """Numbers of the breakpoints that have stopped the run where it stands."""
        return self._breakpoints.met

    @property
    def met_on(self) -> int | None:
        """The rank that has met their condition, if they have one."""
        return self._breakpoints.met_on

    def collected(self, rank: int | None = None) -> Collected:
        """What a bisect compares."""
        with self.hold():
            return collect(self.kept.source, None, rank) if self.kept else self._recorder.collected(rank)

    def look(self) -> None:
        """Take in what the ranks report. Called often, on the session's thread."""
        if self.closed:
            return
        self._hear()
        self._events.note_nonfinite()
        if not self._state.is_decoding:
            self._generation.hear()
        self._state.note_arrival()
        self._health.look()
        self._actions.tell_of_news(lambda: (self.standing(), self._events.heard(), tuple(self.breakpoints)))

    def recovering(self, *, ended: bool) -> None:
        """The session has begun to recover its ranks, or has ended that: the run cannot go on until it is restarted."""
        self._state.note_recovery(ended=ended)
        self._actions.tell()

    def close(self, why: str, *, patient: bool = True) -> None:
        """The run is over: its ranks are stopped, if possible, and asked nothing more after what it answers from
        afterwards has been gathered. `patient`: see `RunRecorder.keep`."""
        if self.closed:
            return
        self._state.ending = why
        try:
            with self._actions.halted(self._stop, END_S):
                self._recorder.keep(self.reporter, values=self.keeps, patient=patient)
                self._state.ranks.give_back(why)
                self._state.close(why)
                self._actions.tell()
        finally:
            self._state.ending = ""

    @property
    def name(self) -> str:
        """Its name among `session.runs`."""
        return self._inspector.name

    @name.setter
    def name(self, name: str) -> None:
        self._inspector.name = name

    @property
    def call_name(self) -> str:
        """For logs of calls."""
        return f"session.runs[{json.dumps(self.name)}]"

    @property
    def kept(self) -> KeptKv | None:
        """Of a run that is over: what was kept of its KV; None where its ranks did not answer."""
        return self._inspector.kept

    def last_standing(self) -> Standing:
        """The run at this moment or, once it is over, before it was."""
        return self._recorder.last_standing()

    message: str = _of_state("message", "Why the last action stopped.")
    cause: str = _of_state("cause", "The failure, without what the session has done about it since.")
    failure: str = _of_state("failure", "Why the run cannot go on until it is restarted; empty while it can.")
    silence: str = _of_state("silence", "Which ranks do not answer; empty while all do.")
    told: Verdict | None = _of_state("hang", "The verdict on a run that hangs; None while it does not.")
    closed: str = _of_state("closed", "Why the run is over; empty while it is not.")
    edited: list[str] = _of_state("edited", "What the user has changed by hand on the ranks.")
    corrupt: list[Corruption] = _of_state("corrupt", "Blocks whose bytes have changed, as they were found.")
    said: list[str] = _of_state("said", "Messages that the session has not logged yet.")
    story: list[str] = _of_state("story", "All messages.")

    @property
    def last_call(self) -> str:
        """The text of the last call, whoever made it."""
        return self._state.last_call

    @last_call.setter
    def last_call(self, call: str) -> None:
        self._state.note_call(call)

    @property
    def hang(self) -> str:
        """The first sentence of the verdict on a run that hangs; empty while it does not."""
        return self.told.sentence if self.told else ""

    def __str__(self) -> str:
        plan = self.plan
        head = f"{plan.shape.tokens_text}, {plan.schedule}, {plan.sync_strategy}"
        return f"run of {head}{self.job.config.codec_text}: {self.where()}"

    def _repr_mimebundle_(self, **_: Any) -> Any:
        """The panel beside the text in a notebook; elsewhere the text alone."""
        if self.show is None or self.closed or not hasattr(ipython(), "kernel"):
            return {}
        data, metadata = self.show(self)._repr_mimebundle_()
        return {**data, "text/plain": str(self)}, metadata

    # -- within

    def _compare(self, what: str, *, chunked: bool | None, dtype: str | None) -> Comparison:
        """Compare with the reference, as an action."""
        given = {"chunked": chunked, "dtype": dtype}
        call = call_text("compare", (what,), {name: one for name, one in given.items() if one is not None})
        with self._actions.taken(call, alone=False):
            check_comparable(what, dtype)
            self.wait()
            return self._inspector.compare(chunked=chunked, dtype=dtype)

    def _begin(self, left: LeftRun | None = None) -> None:
        plan_ids = left.plan_ids if left else self._prepare()
        if not left:
            self._state.ranks.new_notes()
        self._state.begin()
        self._health.begin(plan_ids)
        self._faults.begin()
        self._events.begin()
        self._moves.begin()
        if left:
            self._history.forget("actions of an earlier session cannot be undone")
            self._breakpoints.take_over(left.breakpoints)
            self._faults.take_over(left.faults)
            self._hear()  # what the ranks have repeated
            self._moves.halt()
            # Of a rank that is gone, or hangs.
            with suppress(RankFailed, RankRefused, NoProgress, TimeoutError):
                self._generation.take_over()
            self._events.take_over()
            self._events.note_nonfinite()
            # Blocks from which that session has gone back are not there any more.
            if (stands := self._state.stands()) and self._moves.can_step:
                cut = tuple(stand.positions for stand in stands)
                self._state.nonfinite.went(self.plan, self._moves.stepper.cuts.end, cut)
                self._state.marks.went(self.plan, self._moves.stepper.cuts.end, cut)

    def _ask_all(self, command: Command[A]) -> list[A]:
        ranks = range(self.world_size)
        answers = self._state.ranks.ask(dict.fromkeys(ranks, command), ANSWER_S, self.check)
        return [answers[rank] for rank in ranks]

    def _pause(self) -> None:
        self._player.stop()
        self._generation.stop()
        if not self._state.is_decoding:
            self._moves.pause()

    def _interrupted(self) -> None:
        self._player.stop()
        self._moves.interrupted()

    def _end_play(self) -> None:
        """End a play at once, also the step that it is in."""
        if self._player.stop():
            self._moves.pause()

    def _play_on(self, unit: Unit, stopping: threading.Event) -> bool:
        """A step of a play; whether there is more to play."""
        with self._actions.lock:
            if stopping.is_set():
                return False
            self.check()
            return self._moves.play_on(unit)

    def _play_failed(self, call: str, error: Exception) -> None:
        """Failures of ranks and hangs are logged, and shown, by themselves."""
        if not isinstance(error, RankFailed | Hung):
            self.say(f"{call} ended: {error}")

    def _stop(self) -> None:
        """Pause a run that moves. One that has failed or hangs cannot be paused: it is left as it is."""
        self._player.stop()
        if self._state.is_doing(MOVING):
            with suppress(RankFailed, RankRefused, NoProgress, TimeoutError):
                self._pause()

    def _went(self, move: Move) -> None:
        """What was known of blocks, events and tokens behind a cut to which the run went back no longer holds."""
        self._events.note_nonfinite()
        self._state.nonfinite.went(self.plan, move.before, move.after)
        self._state.marks.went(self.plan, move.before, move.after)
        self._events.went(move.before, move.after)
        if move.after != self._moves.stepper.cuts.end:
            self._generation.forget()

    def _decode(self, more: int, on_text: Callable[[str], None] | None) -> Decoded:
        try:
            if not self._moves.at_end:
                where = self._moves.stepper.where()
                raise PlanError(f"prefill is not done: run.decode() runs it to its end first.\n{where}")
            return self._generation.go(len(self.tokens) + more, on_text)
        finally:
            self._hear()  # what ranks have found before they answered is known when this returns

    def _hear(self) -> None:
        """Take in what ranks have noted."""
        for rank, note in self._state.ranks.new_notes():
            match note:
                case Edited():
                    self._state.note_edited(f"{what} on rank {rank}" for what in note.what)
                case FaultStruck():
                    self._faults.struck(rank, note)
                case BreakpointHit():
                    if why := self._breakpoints.hit(rank, note):
                        self._moves.pause_order(note.order, why)
                case FirstNonFinite():
                    self._state.note_nonfinite(rank, NonFinite.of(note.found))
                case BlockCorrupt():
                    found = Corruption.of(note.found)
                    self._state.note_corrupt(found)
                    why = f"stopped: {found}"
                    if note.order is None or not self._moves.pause_order(note.order, why, Severity.ERROR):
                        self.say(str(found), Severity.ERROR)
