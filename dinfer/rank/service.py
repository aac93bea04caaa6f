"""RankService: one rank of a session, which lasts longer than any prompt.

It carries out a session's commands; how they arrive is for others: through a watcher from another process, or by a call
within the same one. It has three parts, each of which may be missing: weights, a group with the other ranks, and a
prompt.
"""

import gc
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from time import perf_counter
from typing import Protocol

import torch

from dinfer import messages
from dinfer.config import Config
from dinfer.engine.board import Board, Stand
from dinfer.engine.corruption import Corrupted, Corruption
from dinfer.engine.decoding import NotANumber, TokensDiffer
from dinfer.engine.engine import Engine
from dinfer.engine.kernels import Kernels, kernels_of
from dinfer.engine.lanes import LaneExecutor, OpFailed
from dinfer.errors import NotPossible
from dinfer.model.decoder import Decoder
from dinfer.plan.breakpoints import Breakpoint
from dinfer.plan.graph import Channel
from dinfer.plan.ops import Op
from dinfer.plan.plan import parse_plan
from dinfer.rank.agreement import agree, facts_of
from dinfer.rank.batch import measured, warm_up
from dinfer.rank.commands import CommandTable, looking, quick, slow, table_of
from dinfer.rank.decode import PromptOnRank, TokenFailed, Tokens
from dinfer.rank.failure import describe
from dinfer.rank.faults import fault_commands, misbehave_commands
from dinfer.rank.graft import graft_command
from dinfer.rank.inspect import inspect_commands
from dinfer.rank.reference import reference_commands
from dinfer.rank.remembered import Remembered
from dinfer.rank.stacks import stacks, thread_names
from dinfer.rank.weights import Weights
from dinfer.transport.gate import Gate
from dinfer.transport.gloo import Comm, drain

ANSWER_S = 2.0
FOUND_TOGETHER = (Corrupted, NotANumber, TokensDiffer)
"""What decode raises on all ranks alike, so that nobody waits for anybody."""


class SessionChannel(Protocol):
    """A rank's connection to its session."""

    def report(self, report: messages.RankReport) -> None:
        """Tell the session something."""

    def ask_stands(self, timeout: float) -> list[Stand | None]:
        """Where the session knows all ranks to stand; empty where it does not answer in time."""


class Meet(Protocol):
    """How this rank joins the group of all ranks."""

    def open(self, command: messages.OpenStore) -> messages.StoreAddress:
        """On rank 0: open the place where the others find it."""

    def join(self, command: messages.JoinGroup) -> Comm:
        """Meet all others there."""


class RankService:
    """`memory`: where events are recorded, which a watcher reads; None where the ranks share this process."""

    def __init__(
        self,
        rank: int,
        session: SessionChannel,
        meet: Meet,
        *,
        board: Board,
        memory: memoryview | None = None,
        gate: Gate | None = None,
        on_change: Callable[["RankService"], None] = lambda _: None,
    ) -> None:
        """`on_change` is called when engine or model have been replaced."""
        self.rank, self.session, self.board = rank, session, board
        self.weights = Weights(self.board, alone=memory is not None)
        self._kernels = Kernels()
        self.comm: Comm | None = None
        self.prompt: PromptOnRank | None = None
        self._remembered = Remembered()
        self._reporting = threading.Lock()
        """held while a report goes out: who comes next hears each note once"""
        self._preparing = False
        """a prompt is being prepared, or this rank measures, for which all ranks have to be asked"""
        self._token_failed = False
        """this rank has failed in decode, where the others may wait for its token"""
        self._memory, self._gate = memory, gate
        self._meet, self._on_change = meet, on_change

    def table(self) -> CommandTable:
        alone = self._memory is not None
        handlers = [
            slow(messages.UnloadModel, self._unload),
            slow(messages.LoadModel, self._load),
            slow(messages.OpenStore, self._meet.open),
            slow(messages.JoinGroup, self._join),
            slow(messages.PreparePrompt, self._prepare),
            slow(messages.EndPrompt, self._end_prompt),
            slow(messages.MeasureRank, self._measure),
            quick(messages.GetHeld, self._held),
            quick(messages.SetLimits, self._set_limits),
            slow(messages.Rewind, self._rewind),
            quick(messages.Freeze, lambda _: self._engine.executor.freeze()),
            quick(messages.GetStand, lambda _: self._engine.executor.stand()),
            quick(messages.Release, self._release),
            quick(messages.SetBreakpoints, self._set_breakpoints),
            slow(messages.ExpectDecode, self._expect_decode),
            slow(messages.StartDecode, self._decode),
            quick(messages.LimitDecode, self._limit_decode),
            slow(messages.StepBackDecode, self._step_back_decode),
            looking(messages.HashKv, self._hash_kv),
            quick(messages.DrainChannels, self._drain),
            slow(messages.LeaveGroup, self._leave),
            quick(messages.GetStacks, lambda _: stacks(self.rank, alone=alone)),
            *fault_commands(self._unbegun, self.report),
            graft_command(self._unbegun, self.report),
            *inspect_commands(self.rank, self._prompted),
            *reference_commands(self._prompted, self._tell),
            *misbehave_commands(self.rank, self.report),
        ]
        return table_of(map(self._remembered.noting, handlers))

    # -- what it has

    @property
    def decoder(self) -> Decoder | None:
        return self.weights.decoder

    @property
    def engine(self) -> Engine | None:
        return self.prompt.engine if self.prompt else None

    @property
    def _engine(self) -> Engine:
        return self._prompted().engine

    def _prompted(self) -> PromptOnRank:
        if self.prompt is None:
            raise NotPossible(
                f"rank {self.rank} holds no run: it has none yet, or gave it up when it recovered or loaded another "
                "checkpoint; session.prefill(…) begins one"
            )
        return self.prompt

    def _unbegun(self) -> Engine:
        """The engine, for what changes KV: decode that has begun early is given up."""
        engine, tokens = self._prompted()
        tokens.give_up_start()
        return engine

    def report(self, report: messages.RankReport) -> None:
        """Tell the session something, and whatever session comes after it."""
        with self._reporting:
            self._remembered.heard(report)
            self._tell(report)

    def _tell(self, report: messages.RankReport) -> None:
        """Tell the session only. One that is gone, or gives way to another, hears nothing: no op fails of that."""
        with suppress(OSError):
            self.session.report(report)

    def go_on(self, session: SessionChannel) -> None:
        """Report to another session from now on, first what it must know of the prompt that is here."""
        with self._reporting:
            self.session = session
            for report in self._remembered.repeated() if self.prompt else ():
                session.report(report)

    def _held(self, _: messages.GetHeld) -> messages.Holdings:
        last, tokens = self._remembered.last, self.prompt and self.prompt.tokens
        recorder = self.engine and self.engine.recorder
        breakpoints, faults = last(messages.SetBreakpoints), last(messages.SetFaults)
        return messages.Holdings(
            load=last(messages.LoadModel) if self.decoder else None,
            group=last(messages.JoinGroup) if self.comm else None,
            prompt=last(messages.PreparePrompt) if self.prompt else None,
            plan_id=self._engine.prompt.plan.id if self.prompt else 0,
            breakpoints=breakpoints.breakpoints if breakpoints else (),
            faults=faults.faults if faults else (),
            tokens=tuple(tokens.tokens) if tokens else (),
            begun=tokens.begun if tokens else 0,
            lost_events=recorder.lost if recorder else 0,
            preparing=self._preparing,
            measured=self._remembered.measured(),
        )

    def _ask_stands(self) -> list[Stand | None]:
        return self.session.ask_stands(ANSWER_S)

    def inherit(self, before: "RankService") -> None:
        """Take over the weights of the service that this one follows, which gives up its prompt and group."""
        self.weights.share(before.weights)
        self._remembered.take_model(before._remembered)
        before.close()

    def close(self) -> None:
        """Give up prompt and group; whatever is blocked in them stays so."""
        if self.prompt:
            self.prompt.tokens.limit_to(0)
            with suppress(NotPossible):
                self.prompt.tokens.give_up_start()
            self.prompt.engine.release()
        if self.comm:
            self.comm.close()
        self.prompt = self.comm = None
        self.weights.measure(None)

    # -- weights

    def _unload(self, command: messages.UnloadModel | messages.LoadModel) -> None:
        """Two checkpoints at a time might not fit into memory."""
        if self.weights.are(command) or not (self.decoder or self.prompt):
            return
        self.weights.drop()
        self._kernels.drop()
        try:
            self._give_up_prompt()
        finally:
            self._on_change(self)
            gc.collect()  # prompt and lanes know each other

    def _load(self, command: messages.LoadModel) -> messages.LoadedModel:
        """Ranks of one process share their weights: all of them must unload first."""
        torch.set_num_threads(command.threads)
        started = perf_counter()
        if not self.weights.are(command):
            self._unload(command)
            self.weights.load(command, lambda done, total: self._tell(messages.Loading(done, total)))
            self._on_change(self)
        decoder = self.decoder
        assert decoder
        self.weights.measure(decoder.device)
        config = Config(kernels=command.kernels, chunk_size=command.chunk_size, gpu_ids=(0,), world_size=1)  # type: ignore[arg-type]
        self._kernels.prepare(
            decoder, config, lambda done, total: self._tell(messages.Loading(done, total, "graphs"))
        )
        dtype = str(decoder.dtype).removeprefix("torch.")
        return messages.LoadedModel(str(decoder.device), dtype, perf_counter() - started)

    # -- the group

    def _join(self, command: messages.JoinGroup) -> None:
        if self.comm:
            self.comm.close()
        self.comm = None
        self.comm, self._token_failed = self._meet.join(command), False

    def _drain(self, command: messages.DrainChannels) -> None:
        assert self.comm
        sends, recvs = ([Channel(*one) for one in some] for some in (command.sends, command.recvs))
        drain(self.comm, sends, recvs)

    def _leave(self, _: messages.LeaveGroup) -> messages.LeftGroup:
        free = self.prompt is None or self.prompt.engine.release()
        if free and self.comm:
            self.comm.close()
            self.comm = self.prompt = None
        return messages.LeftGroup(free)

    def _measure(self, command: messages.MeasureRank) -> messages.RankMeasured:
        """All ranks do this together."""
        decoder, comm = self.decoder, self.comm
        if decoder is None or comm is None:
            raise RuntimeError(f"rank {self.rank} has no checkpoint yet: session.load(…) first.")
        self._preparing = True
        try:
            self._give_up_prompt()
            return measured(decoder, comm, command, self._kernels)
        finally:
            self._preparing = False

    # -- the prompt

    def _prepare(self, command: messages.PreparePrompt) -> messages.PreparedPrompt:
        self._preparing = True
        try:
            return self._prepared(command)
        finally:
            self._preparing = False

    def _prepared(self, command: messages.PreparePrompt) -> messages.PreparedPrompt:
        if self._token_failed:  # the others would take a message for that token
            raise RuntimeError(
                f"rank {self.rank} has failed in decode, where others may wait for it: session.recover() frees them."
            )
        decoder, comm = self.decoder, self.comm
        if decoder is None or comm is None:
            raise RuntimeError(f"rank {self.rank} has no checkpoint yet: session.load(…) first.")
        config, ids = Config.of(command.config), command.ids
        self._give_up_prompt()
        graphs = self._kernels.prepare(decoder, config)
        engine = Engine(
            decoder, comm, config, graphs=graphs, gate=self._gate, board=self.board, memory=self._memory,
            deadline=config.timeout, on_hit=self._hit, all_stands=self._ask_stands,
            on_corrupt=self._corrupt,
            on_nonfinite=lambda found: self.report(messages.FirstNonFinite(found.as_dict())),
        )  # fmt: skip
        warm_up(decoder, config, len(ids), graphs)
        plan = parse_plan(command.plan) if command.plan else engine.plan_for(len(ids))
        agree(comm, facts_of(config, decoder.spec, ids, plan.id, kernels_of(graphs)))
        try:
            executor = engine.prepare(ids, plan=plan)
        except BaseException:  # whatever it is (a lack of memory, say), no half of a prompt must stay
            engine.release()
            raise
        self.prompt = PromptOnRank(engine, Tokens(engine))
        assert engine.recorder
        self.report(messages.Lanes(tuple(engine.recorder.lanes), thread_names()))
        self.board.set_phase("prefill")
        watch = partial(self._report_failure, executor)
        threading.Thread(target=watch, name="dinfer failures", daemon=True).start()
        self._on_change(self)
        return messages.PreparedPrompt(executor.plan.id)

    def _report_failure(self, executor: LaneExecutor) -> None:
        try:
            executor.wait_until_closed()
        except OpFailed as failed:
            self.report(describe(failed))

    def _give_up_prompt(self) -> None:
        """Raises RuntimeError where lanes of the prompt are blocked."""
        if self.prompt:
            self.prompt.tokens.give_up_start()
        if self.prompt and not self.prompt.engine.release():
            raise RuntimeError(
                f"rank {self.rank} has lanes blocked in the run before this one: session.recover() frees them."
            )
        self.prompt = None

    def _end_prompt(self, _: messages.EndPrompt) -> None:
        self._give_up_prompt()
        self._on_change(self)
        gc.collect()  # prompt and lanes know each other

    def _set_limits(self, command: messages.SetLimits) -> None:
        prompt = self._engine.prompt
        self._report_edits(prompt.go(command.cut, order=command.order, stopping=command.stopping))

    def _rewind(self, command: messages.Rewind) -> None:
        engine, tokens = self._prompted()
        tokens.give_up_start()
        self.prompt = PromptOnRank(engine, Tokens(engine))
        self.board.set_phase("prefill")
        self._report_edits(engine.prompt.rewind(command.cut))
        if not engine.prompt.state.finite.has_found:
            self._remembered.forget(messages.FirstNonFinite)

    def _release(self, command: messages.Release) -> None:
        self._engine.executor.release([Channel(*channel) for channel in command.channels])

    def _set_breakpoints(self, command: messages.SetBreakpoints) -> None:
        found = [Breakpoint(**one) for one in command.breakpoints]
        self._engine.prompt.conditions.arm([one for one in found if one.condition])

    def _hash_kv(self, command: messages.HashKv) -> messages.KvHash:
        cache = self._engine.cache
        assert cache
        return messages.KvHash(cache.sha256(command.tokens))

    def _report_edits(self, edited: list[str]) -> None:
        if edited:
            self.report(messages.Edited(tuple(edited)))

    def _hit(self, breakpoint: Breakpoint, op: Op, found: str) -> None:
        """A breakpoint's condition holds: no further op begins here, and the session stops the others."""
        prompt = self._engine.prompt
        if prompt.halt():
            self.report(messages.BreakpointHit(breakpoint.as_dict(), str(op), found, prompt.order))

    def _corrupt(self, found: Corruption) -> None:
        """A block's bytes have changed. On the way, and where the run is to pause: no further op begins here, and the
        session stops the others; before decode, all ranks refuse to begin."""
        engine, order = self._engine, None
        if engine.config.on_corruption == "pause" and found.peer is not None and engine.prompt.halt():
            order = engine.prompt.order
        self.report(messages.BlockCorrupt(found.as_dict(), order))

    # -- decode

    def _expect_decode(self, command: messages.ExpectDecode) -> None:
        def show(text: str) -> None:
            self._show(messages.TextPiece(text, is_early=True))

        self._prompted().tokens.expect(command.limit, show)

    def _show(self, piece: messages.TextPiece) -> None:
        if self.rank == 0 and piece.text:
            self._tell(piece)

    def _decode(self, _: messages.StartDecode) -> messages.NewTokens:
        engine, tokens = self._prompted()

        def show(count: int, _: int, text: str) -> None:
            self.board.set_phase("decode", count)
            self._show(messages.TextPiece(text, tokens.characters - len(text)))

        try:
            self._report_edits(engine.prompt.edits.report())
            return tokens.run(show)
        except FOUND_TOGETHER:
            raise
        except Exception as error:  # whatever it is, the others wait for this rank's token
            self._token_failed = True
            failed = TokenFailed(self.rank, len(tokens.tokens), error)
            self.report(describe(failed))
            raise failed from error
        finally:
            engine.prompt.edits.accept_all()

    def _limit_decode(self, command: messages.LimitDecode) -> messages.BegunTokens:
        return messages.BegunTokens(self.prompt.tokens.limit_to(command.limit) if self.prompt else 0)

    def _step_back_decode(self, command: messages.StepBackDecode) -> None:
        if self.prompt:
            self.prompt.tokens.back_to(command.tokens)
            self.board.set_phase("decode", command.tokens)
