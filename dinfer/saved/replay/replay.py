"""Replay: one rank of a run alone, stepped as a run is, from what was recorded of it, up to where it stood.

`stepper` moves the rank's engine, `peers` hands it what its peers sent, `differences` compares it with the run. Here
are the calls of a user, with decode and undo.
"""

import weakref
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch

from dinfer.display import Closing, Displayable, DisplayableText, Tidy, listed
from dinfer.engine.by_hand import LayerKV, op_lines, ops_between
from dinfer.history import History, call_text
from dinfer.model.decoder import Decoder
from dinfer.plan.cut import Unit, count_of, unit_of
from dinfer.rank.decode import Tokens
from dinfer.results import Decoded, Moved, Where, took_back
from dinfer.saved.replay.differences import Differences
from dinfer.saved.replay.record import (
    LanePositions,
    RankRecord,
    RecordError,
    check_rank,
    check_states,
    is_inside,
)
from dinfer.saved.replay.stepper import CLOSED, RankStepper
from dinfer.saved.replay.weights import decoder_of
from dinfer.severity import Severity
from dinfer.verdict.where import moved_lines, rank_text, returned_text

T = TypeVar("T")
P = ParamSpec("P")


def _undoable(method: Callable[Concatenate["Replay", P], T]) -> Callable[Concatenate["Replay", P], T]:
    """Add a call of this method to the replay's history if it moves the replay, also if it fails. The history refers to
    the replay weakly: a replay that is dropped is then collected at once."""

    @wraps(method)
    def called(replay: "Replay", /, *args: P.args, **kwargs: P.kwargs) -> T:
        before, itself = replay._place(), weakref.ref(replay)

        def undo() -> str:
            found = itself()
            assert found
            return found._return_to(*before)

        try:
            return method(replay, *args, **kwargs)
        finally:
            if replay._place() != before:
                call = call_text(method.__name__, args, kwargs, of="replay")
                replay._history.add(call, undo)

    return called


TOKEN = "token"

SHOWN = 12
"""up to so many ops are listed one by one"""


class Replay(Tidy, Displayable, Closing):
    """What `run.replay` returns: rank `rank` alone, stepped as a run is. `plan` is the run's; `engine` is the rank's
    engine, as under `%%px`; `notes` say where this is not the run bit for bit.

    An op that fails raises OpFailed here, with its own error as the cause; the next call starts again from the first op
    and goes to where it is sent. The replay computes on as many CPU threads as the rank did, on which the last bits of
    its values depend; the rest of this process keeps its own number of threads. Raises RecordError if the record lacks
    something.
    """

    INTERNAL = frozenset({"decoder", "recorded"})

    def __init__(
        self, recorded: RankRecord, *, model_path: str = "", device: str = "", decoder: Decoder | None = None
    ) -> None:
        check_rank(recorded.rank, recorded.plan)
        check_states(recorded)
        self.recorded, self.rank, self.plan = recorded, recorded.rank, recorded.plan
        self.decoder: Decoder = decoder_of(recorded, model_path, device, decoder)
        self._differences = Differences(recorded)
        self.notes = self._differences.notes
        self._stepper = RankStepper(recorded, self.decoder, self._differences)
        self._path, self.engine = self._stepper.path, self._stepper.engine
        self._history = History()
        self._forget_tokens()

    # -- moving

    @_undoable
    def step(self, unit: Unit | str = "layer", n: int = 1) -> Moved | Decoded:
        """Move on by `n` units, as a run does; steps in which this rank does nothing are skipped."""
        if unit == TOKEN:
            return self._decode(count_of(n))
        return self._go(self._stepper.ahead(self._path.next, unit_of(unit), count_of(n)))

    @_undoable
    def step_back(self, unit: Unit | str = "layer", n: int = 1) -> Moved | Decoded:
        """Undo the last `n` units, as a run does; what follows is computed again."""
        if unit == TOKEN:
            return self._tokens_back_to(max(0, len(self.tokens) - count_of(n)))
        return self._go(self._stepper.ahead(self._path.previous, unit_of(unit), count_of(n)))

    @_undoable
    def run_to(self, chunk: int, layer: int) -> Moved:
        """Go, forward or back, to where this rank stands once that block is on every rank of a run."""
        return self._go(self._path.after_block(chunk, layer))

    @_undoable
    def resume(self) -> Moved:
        """Go to where the rank stood in the run. Returns once it is there."""
        return self._go(self._path.reach)

    @_undoable
    def restart(self) -> Where:
        """Go back to before the first op."""
        self._stepper.begin()
        self._forget_tokens()
        return self.where()

    @_undoable
    def decode(self, max_new_tokens: int | None = None) -> Decoded:
        """Run prefill to its end if necessary, then decode that many of the recorded tokens, by default all that are
        left. Asked for more, it also makes the next token: the one at which a run failed that failed in decode.

        Raises RecordError if the run had not ended prefill, or if a token differs from the run's, and what decode
        raises.
        """
        return self._decode(max_new_tokens)

    def undo(self) -> DisplayableText:
        """Undo the last action, and say in one line what that did. The next undo goes further back."""
        return self._history.undo()

    # -- looking

    @property
    def tokens(self) -> list[int]:
        """New tokens so far."""
        return self._tokens.tokens

    @property
    def text(self) -> str:
        """Their text."""
        return "".join(self._texts)

    @property
    def hidden(self) -> dict[tuple[int, int], torch.Tensor]:
        """Hidden states that are kept: [chunk, layer] → [1, tokens, hidden_size] before that layer."""
        return self.engine.hidden

    @property
    def at_end(self) -> bool:
        """Whether it stands where the rank did."""
        return self._stepper.at_end

    def kv(self, layer: int) -> LayerKV:
        """The KV of a layer that this replay holds. Raises ValueError."""
        return self.engine.kv(layer)

    def where(self) -> Where:
        """Where it stands, and how it differs from the run."""
        if self._stepper.closed:
            return Where("closed", f"rank {self.rank}: {CLOSED}")
        failure, stand = self.engine.executor.failure, self.engine.executor.stand()
        state = "failed" if failure else "done" if self.engine.executor.is_done() else "paused"
        lines = [f"rank {self.rank}: {rank_text(self.plan.lanes[self.rank], stand)}"]
        lines += [str(failure)] * bool(failure) + [self.recorded.end_text] * (self.at_end and not failure)
        lines += [f"{len(self.tokens)} new tokens: {self.text!r}"] * bool(self.tokens)
        lines += [f"not as in the run: {listed(self.notes)}"] * bool(self.notes)
        return Where(state, "\n".join(lines), Severity.ERROR if failure else Severity.NOTE)

    def __str__(self) -> str:
        return f"replay of rank {self.rank} of {self.recorded.name}: {self.where()}"

    def close(self) -> None:
        """End its threads."""
        self._stepper.close()

    # -- within

    def _decode(self, max_new_tokens: int | None) -> Decoded:
        """As `decode`."""
        self._go(self._path.reach)
        if not self.engine.executor.is_done():
            raise RecordError(f"the run had not ended prefill: {self.recorded.end_text}")
        before, recorded = len(self.tokens), len(self.recorded.tokens)
        wanted = recorded if max_new_tokens is None else min(recorded + 1, before + count_of(max_new_tokens))
        self._tokens.limit_to(max(before, wanted))
        with self._stepper.rank_threads():
            answer = self._tokens.run(self._add_token)
        new = self.tokens[before:]
        remark = ""
        if not new and recorded:
            remark = f"only {recorded} new tokens were recorded, and all are here"
        elif not new:
            remark = "this run was recorded before decode: it has no new tokens"
        text = "".join(self._texts[before:])
        stopped = answer.stopped or "max_new_tokens"
        return Decoded(tuple(new), text, stopped, before + len(new), remark)

    def _tokens_back_to(self, tokens: int) -> Decoded:
        """Forget all but the first `tokens` new tokens."""
        gone = len(self.tokens) - tokens
        self._tokens.back_to(tokens)
        del self._texts[tokens:]
        return took_back(gone, tokens)

    def _return_to(self, positions: LanePositions, tokens: int) -> str:
        """Go there, and have that many new tokens; what was undone and done for it."""
        before, had = self._place()
        self._go(positions)
        if len(self.tokens) > tokens:
            self._tokens_back_to(tokens)
        elif len(self.tokens) < tokens:
            self._decode(tokens - len(self.tokens))
        return returned_text(self.plan, self._stepper.cut(before), self._stepper.cut(positions), had, tokens)

    def _go(self, target: LanePositions) -> Moved:
        """Forward or back. Raises OpFailed where an op raises."""
        stepper = self._stepper
        before, failed = stepper.positions, self.engine.executor.failure
        try:
            edited = stepper.go(target)
        finally:
            if failed or target != self._path.reach or before != target:
                self._forget_tokens()
        cuts = stepper.cut(before), stepper.cut(target)
        moved = moved_lines(self.plan, *cuts)
        # Of a move that only goes back, there is one line.
        lines = moved if len(moved) == 1 else [moved[self.rank]]
        ops = ops_between(self.engine.executor, before, target)
        if ops and len(ops) <= SHOWN and is_inside(before, target):
            lines = [f"rank {self.rank}: {line}" for line in op_lines(self.engine.prompt.state, ops)]
        remark = "" if before != target else "nothing to do: the rank stands at the start"
        remark = self.recorded.end_text if self.at_end else remark
        return Moved(*cuts, False, tuple(lines), remark, edited)

    def _forget_tokens(self) -> None:
        self._tokens, self._texts = Tokens(self.engine), list[str]()

    def _place(self) -> tuple[LanePositions, int]:
        """Where it stands, and how many new tokens it has."""
        return self._stepper.positions, len(self.tokens)

    def _add_token(self, count: int, token: int, text: str) -> None:
        """Raises RecordError if the run's token is another one."""
        self._texts.append(text)
        self._differences.after_token(count - 1, token)
