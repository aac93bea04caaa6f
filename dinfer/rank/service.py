"""Host: one rank of a session, which lasts longer than any prompt: checkpoint, group, current prompt.

It is a table of commands; how they arrive is for others: through a watcher from another process, or by a call from the
same one. Nothing here knows notebooks.
"""

import gc
import threading
from collections.abc import Callable
from time import perf_counter
from typing import Any, Protocol

import torch

from dinfer.config import Config
from dinfer.engine.board import Board, Stand
from dinfer.engine.corruption import Corrupted, Corruption
from dinfer.engine.decoding import NotANumber, TokensDiffer
from dinfer.engine.engine import Engine
from dinfer.engine.lanes import LaneExecutor, OpFailed
from dinfer.messages import Message
from dinfer.model.decoder import Decoder
from dinfer.plan.breakpoints import Breakpoint
from dinfer.plan.graph import Channel
from dinfer.plan.ops import Op
from dinfer.plan.plan import parse_plan
from dinfer.rank.agreement import agree, facts_of
from dinfer.rank.batch import warm_up
from dinfer.rank.commands import Command, CommandTable, lane_commands, stand_of
from dinfer.rank.decode import TokenFailed, Tokens
from dinfer.rank.failure import describe
from dinfer.rank.faults import fault_commands, misbehave_commands
from dinfer.rank.gpu_memory import Gauge
from dinfer.rank.inspect import inspect_commands
from dinfer.rank.reference import reference_commands
from dinfer.rank.stacks import stacks, thread_names
from dinfer.transport.drain import drain
from dinfer.transport.gate import Gate
from dinfer.transport.gloo import Comm

ANSWER_S = 2.0

FOUND_TOGETHER = (Corrupted, NotANumber, TokensDiffer)
"""what decode raises on all ranks alike, so that nobody waits for anybody"""


class SessionChannel(Protocol):
    """What a host needs of its connection to the session."""

    def report(self, kind: str, /, **fields: Any) -> None:
        """Tell the session something."""

    def ask(self, what: str, timeout: float) -> Message | None:
        """The session's answer, or None."""


class Meet(Protocol):
    """How this rank comes by its group."""

    def open(self, message: Message) -> Message:
        """On rank 0: where the others find it, as JSON."""

    def join(self, message: Message) -> Comm:
        """Meet all others there."""


class RankService:
    """`decoder`: weights that are there already, which all ranks of one process share."""

    def __init__(
        self,
        rank: int,
        line: SessionChannel,
        meet: Meet,
        *,
        board: Board | None = None,
        memory: memoryview | None = None,
        gate: Gate | None = None,
        decoder: Decoder | None = None,
        on_engine: Callable[["RankService"], None] | None = None,
    ) -> None:
        self.rank, self.line = rank, line
        self.board, self.memory, self.gate = board or Board(), memory, gate
        self.decoder = decoder
        self.comm: Comm | None = None
        self.engine: Engine | None = None
        self.tokens: Tokens | None = None
        self._loaded: tuple[str, ...] = ()
        self._had_weights = False
        self._gauge: Gauge | None = None
        self._out_of_step = False
        """whether others may wait in the group for a token that this rank has not made"""
        self._meet, self._on_engine = meet, on_engine

    def table(self) -> CommandTable:
        return {
            **lane_commands(self._executor),
            **fault_commands(self._engine, self.line.report, self._tell_edits),
            **inspect_commands(self),
            **misbehave_commands(self.rank, self.line.report),
            "limits": Command(self._limits),
            "rewind": Command(self._rewind, slow=True),
            "open": Command(self._meet.open, slow=True),
            "meet": Command(self._join, slow=True),
            "unload": Command(self._unload, slow=True),
            "load": Command(self._load, slow=True),
            "prepare": Command(self._prepare, slow=True),
            "breakpoints": Command(self._arm),
            "decode": Command(self._decode, slow=True),
            "decode_limit": Command(self._limit_decode),
            "decode_back": Command(self._decode_back, slow=True),
            "sha256": Command(self._sha256, slow=True),
            "drain": Command(self._drain),
            "leave": Command(self._leave, slow=True),
            **reference_commands(self),
            "stacks": Command(lambda _: stacks(self.rank, alone=self.memory is not None)),
        }

    def inherit(self, before: "RankService") -> None:
        """Take over the weights of the host that this one follows, which gives up its prompt and group."""
        self.share(before)
        before.close()

    def share(self, other: "RankService") -> None:
        """Use the weights that another host of this process has loaded."""
        self.decoder, self._loaded, self._had_weights = other.decoder, other._loaded, True

    def stands(self) -> list[Stand | None]:
        """Where all ranks stand, as the session knows it; empty if it does not answer."""
        said = self.line.ask("stands", ANSWER_S)
        return [stand_of(one) if one else None for one in said["stands"]] if said else []

    def close(self) -> None:
        """Give up prompt and group; whatever is blocked in them stays so."""
        if self.tokens:
            self.tokens.limit_to(0)
        if self.engine:
            self.engine.release()
        if self.comm:
            self.comm.close()
        self.engine = self.comm = self.tokens = None
        self._measure(None)

    # -- commands

    def _unload(self, message: Message) -> Message:
        """Give up prompt and weights, unless these are the ones named: two checkpoints at a time might not fit."""
        if not self._had_weights or self._loaded == _checkpoint(message):
            return {}
        self.decoder, self._loaded = None, ()
        try:
            self._give_up()
        finally:
            self._tell_names()
            gc.collect()  # prompt and lanes know each other
        return {}

    def _load(self, message: Message) -> Message:
        """Load a checkpoint, unless this very one is there; its bytes are reported as they come. Ranks of one process
        share theirs: first all of them must `unload`."""
        wanted = _checkpoint(message)
        torch.set_num_threads(message["threads"])
        started = perf_counter()
        if self._loaded != wanted or self.decoder is None:
            self._unload(message)
            self.board.set_phase("loading")
            self.decoder = Decoder.load(*wanted, on_progress=self._tell_progress)
            self._loaded, self._had_weights = wanted, True
            self._tell_names()
        self._measure(self.decoder.device)
        return {
            "device": str(self.decoder.device),
            "dtype": str(self.decoder.dtype).removeprefix("torch."),
            "seconds": perf_counter() - started,
        }

    def _measure(self, device: torch.device | None) -> None:
        """Have what this rank has of that device on the board, if it is a GPU and this process is the rank's alone."""
        if self._gauge:
            self._gauge.close()
        is_own = self.memory is not None and device is not None and device.type == "cuda"
        self._gauge = Gauge(self.board, device) if device and is_own else None

    def _tell_progress(self, done: int, total: int) -> None:
        self.line.report("loading", done=done, total=total)

    def _join(self, message: Message) -> Message:
        if self.comm:
            self.comm.close()
        self.comm = None
        self.comm, self._out_of_step = self._meet.join(message), False
        return {}

    def _prepare(self, message: Message) -> Message:
        if self.decoder is None or self.comm is None:
            raise RuntimeError(f"rank {self.rank} has no checkpoint yet: session.load(…) first.")
        if self._out_of_step:  # what is said in the group now, they would take for that token
            raise RuntimeError(
                f"rank {self.rank} has failed in decode, where others may wait for it: session.recover() frees them."
            )
        config = Config.of(message["config"])
        self._give_up()
        plan = parse_plan(message["plan"]) if message.get("plan") else None
        self.engine = Engine(
            self.decoder, self.comm, config, gate=self.gate, board=self.board, memory=self.memory,
            deadline=config.timeout, on_hit=self._hit, all_stands=self.stands, on_corrupt=self._tell_corrupt,
        )  # fmt: skip
        ids = message["ids"]
        warm_up(self.decoder, config, len(ids))
        plan_id = (plan or self.engine.plan_for(len(ids))).id
        agree(self.comm, facts_of(config, self.decoder.spec, ids, plan_id))
        executor = self.engine.prepare(ids, plan=plan)
        self.tokens = Tokens(self.engine)
        assert self.engine.recorder
        self.line.report("lanes", lanes=list(self.engine.recorder.lanes), threads=thread_names())
        self.board.set_phase("prefill")
        threading.Thread(
            target=self._mind, args=(executor,), name="dinfer minds failures", daemon=True
        ).start()
        self._tell_names()
        return {"plan_id": f"{executor.plan.id:016x}"}

    def _limits(self, message: Message) -> Message:
        cut = tuple(map(tuple, message["cut"]))
        self._tell_edits(self._engine().prompt.go(cut, order=message["order"], stopping=message["stopping"]))
        return {}

    def _rewind(self, message: Message) -> Message:
        self.tokens = Tokens(self._engine())
        self.board.set_phase("prefill")
        self._tell_edits(self._engine().prompt.rewind(tuple(map(tuple, message["cut"]))))
        return {}

    def _arm(self, message: Message) -> Message:
        self._engine().prompt.conditions.arm([Breakpoint.of(one) for one in message["breakpoints"]])
        return {}

    def _decode(self, _: Message) -> Message:
        engine, tokens = self._engine(), self.tokens
        assert tokens
        try:
            self._tell_edits(engine.prompt.edits.report())
            return tokens.run(self._tell_token)
        except FOUND_TOGETHER:
            raise
        except Exception as error:
            self._out_of_step = True
            failed = TokenFailed(self.rank, len(tokens.tokens), error)
            self.line.report("error", **describe(failed))
            raise failed from error
        finally:
            engine.prompt.edits.accept_all()

    def _limit_decode(self, message: Message) -> Message:
        """To be said before `decode`, and at any time meanwhile."""
        return {"begun": self.tokens.limit_to(message.get("limit")) if self.tokens else 0}

    def _decode_back(self, message: Message) -> Message:
        if self.tokens:
            self.tokens.back_to(message["tokens"])
            self.board.set_phase("decode", message["tokens"])
        return {}

    def _sha256(self, message: Message) -> Message:
        cache = self._engine().cache
        assert cache
        return {"sha256": cache.sha256(message["tokens"])}

    def _drain(self, message: Message) -> Message:
        assert self.comm
        sends, recvs = ([Channel(*channel) for channel in message[name]] for name in ("sends", "recvs"))
        drain(self.comm, sends, recvs)
        return {}

    def _leave(self, _: Message) -> Message:
        """Give up prompt and group; whether nothing of them is left blocked."""
        free = self.engine is None or self.engine.release()
        if free and self.comm:
            self.comm.close()
            self.comm = self.engine = self.tokens = None
        return {"free": free}

    # -- what they share

    def _give_up(self) -> None:
        """The prompt there is, with its KV. Raises RuntimeError where lanes of it are blocked."""
        if self.engine and not self.engine.release():
            raise RuntimeError(
                f"rank {self.rank} has lanes blocked in the run before this one: session.recover() frees them."
            )
        self.engine = self.tokens = None

    def _tell_names(self) -> None:
        """Engine or weights are others now."""
        if self._on_engine:
            self._on_engine(self)

    def _engine(self) -> Engine:
        if self.engine is None:
            raise RuntimeError(f"rank {self.rank} has no prompt yet: session.prefill(…) first.")
        return self.engine

    def _executor(self) -> LaneExecutor:
        return self._engine().executor

    def _mind(self, executor: LaneExecutor) -> None:
        try:
            executor.wait_until_closed()
        except OpFailed as failed:
            self.line.report("error", **describe(failed))

    def _tell_token(self, count: int, token: int, text: str) -> None:
        self.board.set_phase("decode", count)
        if self.rank == 0:
            self.line.report("text", text=text, token=token)

    def _tell_edits(self, edited: list[str]) -> None:
        if edited:
            self.line.report("note", note="edited", what=edited)

    def _hit(self, breakpoint: Breakpoint, op: Op, found: str) -> None:
        """A breakpoint's condition holds: no further op begins here, and the session stops the others."""
        prompt = self._engine().prompt
        if prompt.halt():
            said = {"breakpoint": breakpoint.as_dict(), "op": str(op), "found": found}
            self.line.report("note", note="hit", order=prompt.order, **said)

    def _tell_corrupt(self, found: Corruption) -> None:
        """A block's bytes have changed. On the way, and where the run is to pause: no further op begins here, and the
        session stops the others; before decode, all ranks refuse to begin."""
        engine, order = self._engine(), None
        if engine.config.on_corruption == "pause" and found.peer is not None and engine.prompt.halt():
            order = engine.prompt.order
        self.line.report("note", note="corrupt", order=order, found=found.as_dict())


def _checkpoint(message: Message) -> tuple[str, str, str]:
    return message["path"], message["dtype"], message["device"]
