"""Replay: one rank of a run alone, stepped as a run is, from what was recorded of it, up to where it stood.

The ordinary engine runs; what its peers sent comes from the record. Every block is compared with the rank's ledger of
the run, and every new token with the run's; `notes` say where they differ.
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from time import monotonic_ns
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from dinfer.codec.choice import NONE
from dinfer.display import Closing, Displayable, DisplayableText, Tidy, listed
from dinfer.engine.by_hand import LayerKV, op_lines, ops_between
from dinfer.engine.corruption import Corruption
from dinfer.engine.engine import Engine
from dinfer.engine.kernels import Kernels
from dinfer.engine.prompt import Edit
from dinfer.errors import ModelError, NotPossible, excerpt
from dinfer.history import History, call_text
from dinfer.kv.digests import as_numbers
from dinfer.model.checkpoint import check
from dinfer.model.decoder import Decoder
from dinfer.plan.cut import Unit, count_of, unit_of
from dinfer.plan.graph import Channel, channel_of
from dinfer.plan.ops import Op
from dinfer.rank.decode import Tokens
from dinfer.results import Decoded, Moved, Where, took_back
from dinfer.saved.replay.record import (
    LanePositions,
    RankRecord,
    RecordError,
    ReplayPath,
    check_rank,
    check_states,
    is_inside,
    lower,
    not_repeated,
    upper,
)
from dinfer.severity import Severity
from dinfer.trace.events import Event
from dinfer.transport.gate import Gate
from dinfer.transport.gloo import bytes_of
from dinfer.transport.header import Header
from dinfer.verdict.where import moved_lines, rank_text, returned_text

T = TypeVar("T")
P = ParamSpec("P")


def decoder_of(
    recorded: RankRecord, model_path: str = "", device: str = "", given: Decoder | None = None
) -> Decoder:
    """The recorded run's checkpoint, loaded here unless it is `given`. Raises RecordError."""
    path = str(given.spec.path) if given else model_path or recorded.config.model_path
    try:
        found = given.spec.fingerprint if given else check(path).fingerprint
    except ModelError as error:
        raise RecordError(
            f"the run's checkpoint cannot be read here: {error} Give model_path=… where it lies."
        ) from error
    if found != recorded.checkpoint:
        raise RecordError(
            f"{path} is another checkpoint than the run's: its fingerprint is {found[:16]}…, the run's "
            f"{recorded.checkpoint[:16]}…. Give model_path=… the same one."
        )
    like = "cuda:0" if recorded.device.startswith("cuda") and torch.cuda.is_available() else "cpu"
    try:
        torch.device(device or like)
    except RuntimeError:
        raise RecordError(
            f"device is {excerpt(device)}; it must be one of PyTorch's: cpu, cuda:0, …"
        ) from None
    decoder = given or Decoder.load(path, recorded.dtype, device or like)
    dtype = str(decoder.dtype).removeprefix("torch.")
    if dtype != recorded.dtype:
        raise RecordError(
            f"the run computed in {recorded.dtype}, but the weights that were given are {dtype}: leave decoder out, "
            "and they are loaded as the run's were."
        )
    return decoder


class _RecordedPeers:
    """The transport of a replayed rank, a Comm for it alone: it receives what its peers sent in the run, from the
    record, and what it sends is dropped. `positions`: returns where its lanes stand, which tells what they receive
    next, also after they have gone back."""

    def __init__(self, recorded: RankRecord) -> None:
        self.rank, self.world_size = recorded.rank, recorded.plan.world_size
        self.positions: Callable[[], tuple[int, ...]] = lambda: recorded.positions
        self._recorded = recorded
        self._payloads: dict[Channel, Tensor] = {}

    def send(self, channel: Channel, header: bytes, payload: Tensor | None) -> int:  # noqa: ARG002 - nobody receives
        return monotonic_ns()

    def recv_header(self, channel: Channel) -> bytes:
        lanes = zip(self._recorded.plan.lanes[self.rank], self.positions(), strict=True)
        ahead = (lane.ops[at] for lane, at in lanes if at < len(lane.ops) and lane.ops[at].kind == "recv")
        op = next((op for op in ahead if channel_of(self.rank, op) == channel), None)
        if op is None:
            raise RecordError(f"no lane receives from rank {channel.source} now.")
        payload = self._payloads[channel] = self._recorded.payload(op).contiguous()
        noted = self._recorded.noted.get((op.chunk, op.layer)) if op.what == "kv" else None
        tokens = payload.shape[0] if op.what == "kv" else payload.shape[1]
        return Header(
            self._recorded.plan.id, op.value, tokens, str(payload.dtype).removeprefix("torch."), payload.nbytes,
            digests=noted.announced if noted else (0, 0),
        ).pack()  # fmt: skip

    def recv_payload(self, channel: Channel, out: Tensor) -> None:
        payload = self._payloads.pop(channel)
        out.view(-1).view(torch.uint8).copy_(bytes_of(payload))

    def ahead(self, channel: Channel, most: int) -> None:
        """All messages are here."""

    def all_gather(self, data: bytes) -> list[bytes]:
        """The peers answer what this rank says; the replay compares that with the record."""
        return [data] * self.world_size

    def close(self) -> None:
        """Nothing to close."""


class _ReplayGate(Gate):
    """Knows when all lanes have begun."""

    def __init__(self) -> None:
        super().__init__()
        self._coming: set[str] = set()

    def enroll(self, thread: str) -> None:
        self._coming.add(thread)

    def wait(self, claim: Callable[[], T | None], timeout: float | None = None) -> T | None:
        name = threading.current_thread().name
        if name in self._coming:
            with self.change():
                self._coming.discard(name)
        return super().wait(claim, timeout)

    def wait_for_lanes(self) -> None:
        """Until every lane waits for its first op."""
        self.wait(lambda: None if self._coming else True)


def _undoable(method: Callable[Concatenate["Replay", P], T]) -> Callable[Concatenate["Replay", P], T]:
    """Add a call of this method to the replay's history if it moves the replay, also if it fails. The history refers to
    the replay weakly: a replay that is dropped is then collected at once."""

    @wraps(method)
    def called(replay: "Replay", /, *args: P.args, **kwargs: P.kwargs) -> T:
        before, itself = (replay._positions(), len(replay.tokens)), weakref.ref(replay)

        def undo() -> str:
            found = itself()
            assert found
            return found._return_to(*before)

        try:
            return method(replay, *args, **kwargs)
        finally:
            if (replay._positions(), len(replay.tokens)) != before:
                call = call_text(method.__name__, args, kwargs, of="replay")
                replay._history.add(call, undo)

    return called


TOKEN = "token"

SHOWN = 12
"""up to so many ops are listed one by one"""

CLOSED = "this replay is closed: replay the rank again"


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
        self._closed = False
        self.recorded, self.rank, self.plan = recorded, recorded.rank, recorded.plan
        self.notes = not_repeated(recorded)
        self.decoder: Decoder = decoder_of(recorded, model_path, device, decoder)
        self._path = ReplayPath(recorded.plan, recorded.rank, recorded.reach)
        self._peers = _RecordedPeers(recorded)
        self._gate = _ReplayGate()
        self._history = History()
        self.engine = self._new_engine()
        self._begin()

    # -- moving

    @_undoable
    def step(self, unit: Unit | str = "layer", n: int = 1) -> Moved | Decoded:
        """Move on by `n` units, as a run does; steps in which this rank does nothing are skipped."""
        if unit == TOKEN:
            return self._decode(count_of(n))
        return self._go(self._repeated(self._path.next, unit_of(unit), count_of(n)))

    @_undoable
    def step_back(self, unit: Unit | str = "layer", n: int = 1) -> Moved | Decoded:
        """Undo the last `n` units, as a run does; what follows is computed again."""
        if unit == TOKEN:
            return self._tokens_back_to(max(0, len(self.tokens) - count_of(n)))
        return self._go(self._repeated(self._path.previous, unit_of(unit), count_of(n)))

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
        self._begin()
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
        return self._positions() == self._path.reach

    def kv(self, layer: int) -> LayerKV:
        """The KV of a layer that this replay holds. Raises ValueError."""
        return self.engine.kv(layer)

    def where(self) -> Where:
        """Where it stands, and how it differs from the run."""
        if self._closed:
            return Where("closed", f"rank {self.rank}: {CLOSED}")
        failure, stand = self.engine.executor.failure, self.engine.executor.stand()
        state = "failed" if failure else "done" if self.engine.executor.is_done() else "paused"
        lines = [f"rank {self.rank}: {rank_text(self.plan.lanes[self.rank], stand)}"]
        lines += [str(failure)] * bool(failure) + [self._ended()] * (self.at_end and not failure)
        lines += [f"{len(self.tokens)} new tokens: {self.text!r}"] * bool(self.tokens)
        lines += [f"not as in the run: {listed(self.notes)}"] * bool(self.notes)
        return Where(state, "\n".join(lines), Severity.ERROR if failure else Severity.NOTE)

    def __str__(self) -> str:
        return f"replay of rank {self.rank} of {self.recorded.name}: {self.where()}"

    def close(self) -> None:
        """End its threads."""
        self._closed = True
        self.engine.release()

    # -- within

    def _decode(self, max_new_tokens: int | None) -> Decoded:
        """As `decode`."""
        self._go(self._path.reach)
        if not self.engine.executor.is_done():
            raise RecordError(f"the run had not ended prefill: {self._ended()}")
        before, recorded = len(self.tokens), len(self.recorded.tokens)
        wanted = recorded if max_new_tokens is None else min(recorded + 1, before + count_of(max_new_tokens))
        self._tokens.limit_to(max(before, wanted))
        with self._rank_threads():
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
        before, had = self._positions(), len(self.tokens)
        self._go(positions)
        if len(self.tokens) > tokens:
            self._tokens_back_to(tokens)
        elif len(self.tokens) < tokens:
            self._decode(tokens - len(self.tokens))
        return returned_text(self.plan, self._cut(before), self._cut(positions), had, tokens)

    def _new_engine(self) -> Engine:
        """The plan need not be proved here: it has run, and a rank alone waits for nobody. The engine's callbacks refer
        to this replay weakly, so that both can be collected."""
        config = self.recorded.config.with_(unsafe=True, backend="gloo", on_corruption="record")
        itself = weakref.ref(self)

        def on_op(_: Event, op: Op) -> None:
            if replay := itself():
                replay._compare(op)

        def on_corrupt(corrupt: Corruption) -> None:
            if replay := itself():
                replay._note(f"as in the run: {corrupt}")

        engine = Engine(
            self.decoder, self._peers, config, on_op=on_op, on_corrupt=on_corrupt, gate=self._gate,
            graphs=Kernels().prepare(self.decoder, config),
        )  # fmt: skip
        # if nobody closes it: its threads would keep it alive
        weakref.finalize(self, engine.release).atexit = False
        return engine

    @contextmanager
    def _rank_threads(self) -> Iterator[None]:
        """Have this thread, and those that begin meanwhile, compute on as many CPU threads as the rank did."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.recorded.config.threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def _begin(self) -> None:
        with self._rank_threads():
            executor = self.engine.prepare(self.recorded.ids, plan=self.plan)
            executor.state.coded.arriving = NONE  # blocks are recorded as they were decoded
            self._gate.wait_for_lanes()  # each takes over the number of CPU threads when it begins
        self._peers.positions = lambda: executor.stand().positions
        owners = self.plan.shape.owners  # what faults did to received blocks is in the record of these blocks
        again = [
            one
            for one in self.recorded.faults
            if one.kind == "repeat_row" or (one.kind != "append_twice" and owners[one.layer] == self.rank)
        ]
        self.engine.prompt.state.faults.arm(again, lambda _: None)
        self._applied = 0
        self._tokens, self._texts = Tokens(self.engine), list[str]()

    def _positions(self) -> LanePositions:
        if self._closed:
            raise NotPossible(CLOSED)
        return self.engine.executor.stand().positions

    def _repeated(
        self, step: Callable[[LanePositions, Unit], LanePositions], unit: Unit, n: int
    ) -> LanePositions:
        target = self._positions()
        for _ in range(n):
            target = step(target, unit)
        return target

    def _go(self, target: LanePositions) -> Moved:
        """Forward or back. Raises OpFailed where an op raises."""
        before, executor = self._positions(), self.engine.executor
        if executor.failure is None:
            executor.wait(lambda: not any(executor.stand().started))
        else:
            self._begin()
        edited = list(self.engine.prompt.new_edits())
        if not is_inside(self._positions(), target):
            self._back(target)
        for edit in self.recorded.edits[self._applied :]:
            if not is_inside(edit.positions, target):
                break
            self._forward(edit.positions)
            self._apply(edit)
        self._forward(lower(target, self.recorded.positions))  # before what had not ended, and may fail again
        self._forward(target)
        if target != self._path.reach or before != target:
            self._tokens, self._texts = Tokens(self.engine), list[str]()
        ops, cuts = ops_between(self.engine.executor, before, target), (self._cut(before), self._cut(target))
        moved = moved_lines(self.plan, *cuts)
        # Of a move that only goes back, there is one line.
        lines = moved if len(moved) == 1 else [moved[self.rank]]
        if ops and len(ops) <= SHOWN and is_inside(before, target):
            lines = [f"rank {self.rank}: {line}" for line in op_lines(self.engine.prompt.state, ops)]
        remark = "" if before != target else "nothing to do: the rank stands at the start"
        remark = self._ended() if self.at_end else remark
        return Moved(*cuts, False, tuple(lines), remark, tuple(edited))

    def _back(self, target: LanePositions) -> None:
        """Edits later than `target` must not be visible there: if there are any, start again from the first op."""
        if any(not is_inside(edit.positions, target) for edit in self.recorded.edits[: self._applied]):
            self._begin()
        else:
            with self._rank_threads():  # it computes hidden states anew
                self.engine.prompt.rewind(self._cut(lower(self._positions(), target)))

    def _forward(self, target: LanePositions) -> None:
        """Move every lane that is not further yet to there."""
        prompt, executor = self.engine.prompt, self.engine.executor
        target = upper(target, self._positions())
        prompt.go(self._cut(target))
        try:
            executor.wait(lambda: executor.stand().positions == target)
        except KeyboardInterrupt:
            executor.freeze()
            raise

    def _apply(self, edit: Edit) -> None:
        """Repeat what the user changed by hand when the rank stood here."""
        state = self.engine.prompt.state
        for key, block in edit.kv.items():
            state.block(*key).copy_(block)
        for key, hidden in edit.hidden.items():
            state.hidden[key] = hidden.to(self.decoder.device, copy=True)
        self.engine.prompt.new_edits()
        self._applied += 1

    def _cut(self, mine: LanePositions) -> tuple[LanePositions, ...]:
        """A cut of all ranks, of which only this rank's part matters."""
        starts = [tuple(0 for _ in lanes) for lanes in self.plan.lanes]
        return tuple(mine if rank == self.rank else start for rank, start in enumerate(starts))

    def _ended(self) -> str:
        """Where the rank stood, so that nothing more can be replayed."""
        recorded = self.recorded
        lanes = zip(self.plan.lanes[self.rank], recorded.positions, recorded.begun, strict=True)
        ahead = [(lane.ops[at], begun) for lane, at, begun in lanes if at < len(lane.ops)]
        if not ahead:
            return "the record ends here: the rank had ended prefill"
        stood = [f"in `{op}`" for op, begun in ahead if begun] or [f"before `{ahead[0][0]}`"]
        failed = f"; the run failed: {recorded.failure.partition(chr(10))[0]}" if recorded.failure else ""
        return f"the record ends here: rank {self.rank} stood {' and '.join(stood)}{failed}"

    # -- comparing with the run

    def _compare(self, op: Op) -> None:
        self.engine.prompt.state.coded.seal_all()
        for value in op.makes():
            key = value.chunk, value.layer
            noted, entry = self.recorded.noted.get(key), self.engine.prompt.state.ledger.entries.get(key)
            if value.what != "kv" or noted is None or entry is None:
                continue
            if as_numbers(entry.digests) == noted.came or (noted.edited and op.kind == "layer"):
                continue
            block = f"block c{op.chunk} l{op.layer}"
            if op.kind == "layer":
                self._note(
                    f"{block} has other bytes here than in the run (another machine, version of torch, device or "
                    "number of threads, other weights, or a fault that was armed there)"
                )
            else:
                self._note(
                    f"{block} as it was recorded is not what rank {op.peer} had sent: it has changed since"
                )

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _add_token(self, count: int, token: int, text: str) -> None:
        """Raises RecordError if the run's token is another one."""
        self._texts.append(text)
        tokens, number = self.recorded.tokens, count - 1
        if number == len(tokens):
            self._note(f"new token {number}, which was not recorded, is {token} here")
        elif token != tokens[number]:
            self._note(f"new token {number} is {token} here; in the run it was {tokens[number]}")
            raise RecordError(f"this replay of rank {self.rank} is not the run: {listed(self.notes)}")
