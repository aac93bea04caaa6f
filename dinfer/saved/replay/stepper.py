"""Moves a replayed rank: its engine alone, forward and back from one of its positions to another."""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from dinfer.codec.choice import NONE
from dinfer.engine.corruption import Corruption
from dinfer.engine.engine import Engine
from dinfer.engine.kernels import Kernels
from dinfer.engine.prompt import Edit
from dinfer.errors import NotPossible
from dinfer.model.decoder import Decoder
from dinfer.plan.cut import Unit
from dinfer.plan.ops import Op
from dinfer.saved.replay.differences import Differences
from dinfer.saved.replay.peers import RecordedPeers
from dinfer.saved.replay.record import LanePositions, RankRecord, ReplayPath, is_inside, lower, upper
from dinfer.trace.events import Event
from dinfer.transport.gate import Gate

T = TypeVar("T")

CLOSED = "this replay is closed: replay the rank again"


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


class RankStepper:
    """The engine of one recorded rank, and where its lanes stand on `path`. It computes on as many CPU threads as the
    rank did; the rest of this process keeps its own number."""

    def __init__(self, recorded: RankRecord, decoder: Decoder, differences: Differences) -> None:
        self._recorded, self._decoder, self._differences = recorded, decoder, differences
        self.path = ReplayPath(recorded.plan, recorded.rank, recorded.reach)
        self.closed = False
        self._peers, self._gate = RecordedPeers(recorded), _ReplayGate()
        self.engine = self._new_engine()
        self.begin()

    @property
    def positions(self) -> LanePositions:
        """Where its lanes stand. Raises NotPossible once it is closed."""
        if self.closed:
            raise NotPossible(CLOSED)
        return self.engine.executor.stand().positions

    @property
    def at_end(self) -> bool:
        """Whether it stands where the rank did."""
        return self.positions == self.path.reach

    def begin(self) -> None:
        """Stand before the first op, also after a failure."""
        with self.rank_threads():
            executor = self.engine.prepare(self._recorded.ids, plan=self._recorded.plan)
            executor.state.coded.arriving = NONE  # blocks are recorded as they were decoded
            self._gate.wait_for_lanes()  # each takes over the number of CPU threads when it begins
        self._peers.positions = lambda: executor.stand().positions
        owners = self._recorded.plan.shape.owners
        # What faults did to received blocks is in the record of these blocks.
        again = [
            one
            for one in self._recorded.faults
            if one.kind == "repeat_row"
            or (one.kind != "append_twice" and owners[one.layer] == self._recorded.rank)
        ]
        self.engine.prompt.state.faults.arm(again, lambda _: None)
        self._applied = 0

    def ahead(
        self, step: Callable[[LanePositions, Unit], LanePositions], unit: Unit, n: int
    ) -> LanePositions:
        """The positions `n` steps of the path from here: `step` is its `next` or `previous`."""
        target = self.positions
        for _ in range(n):
            target = step(target, unit)
        return target

    def go(self, target: LanePositions) -> tuple[str, ...]:
        """Go there, forward or back; what the user had edited by hand before. Raises OpFailed where an op raises."""
        executor = self.engine.executor
        if executor.failure is None:
            executor.wait(lambda: not any(executor.stand().started))
        else:
            self.begin()
        edited = tuple(self.engine.prompt.new_edits())
        if not is_inside(self.positions, target):
            self._back(target)
        for edit in self._recorded.edits[self._applied :]:
            if not is_inside(edit.positions, target):
                break
            self._forward(edit.positions)
            self._apply(edit)
        # before what had not ended, and may fail again
        self._forward(lower(target, self._recorded.positions))
        self._forward(target)
        return edited

    def cut(self, mine: LanePositions) -> tuple[LanePositions, ...]:
        """A cut of all ranks, of which only this rank's part matters."""
        plan = self._recorded.plan
        starts = [tuple(0 for _ in lanes) for lanes in plan.lanes]
        return tuple(mine if rank == self._recorded.rank else start for rank, start in enumerate(starts))

    @contextmanager
    def rank_threads(self) -> Iterator[None]:
        """Have this thread, and those that begin meanwhile, compute on as many CPU threads as the rank did."""
        before = torch.get_num_threads()
        torch.set_num_threads(self._recorded.config.threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def close(self) -> None:
        """End the threads of the lanes."""
        self.closed = True
        self.engine.release()

    def _new_engine(self) -> Engine:
        """The plan need not be proved here: it has run, and a rank alone waits for nobody. The engine's callbacks refer
        to this weakly, so that both can be collected."""
        config = self._recorded.config.with_(unsafe=True, backend="gloo", on_corruption="record")
        itself = weakref.ref(self)

        def on_op(_: Event, op: Op) -> None:
            if stepper := itself():
                stepper._differences.after_op(op, stepper.engine.prompt.state)

        def on_corrupt(corrupt: Corruption) -> None:
            if stepper := itself():
                stepper._differences.note(f"as in the run: {corrupt}")

        engine = Engine(
            self._decoder, self._peers, config, on_op=on_op, on_corrupt=on_corrupt, gate=self._gate,
            graphs=Kernels().prepare(self._decoder, config),
        )  # fmt: skip
        # if nobody closes it: its threads would keep it alive
        weakref.finalize(self, engine.release).atexit = False
        return engine

    def _back(self, target: LanePositions) -> None:
        """Edits later than `target` must not be visible there: if there are any, start again from the first op."""
        if any(not is_inside(edit.positions, target) for edit in self._recorded.edits[: self._applied]):
            self.begin()
        else:
            with self.rank_threads():  # it computes hidden states anew
                self.engine.prompt.rewind(self.cut(lower(self.positions, target)))

    def _forward(self, target: LanePositions) -> None:
        """Move every lane that is not further yet to there."""
        prompt, executor = self.engine.prompt, self.engine.executor
        target = upper(target, self.positions)
        prompt.go(self.cut(target))
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
            state.hidden[key] = hidden.to(self._decoder.device, copy=True)
        self.engine.prompt.new_edits()
        self._applied += 1
