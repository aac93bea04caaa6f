"""Runs for a panel to hold, without a session: one on paper, one whose ranks are threads. Not a test.

Notebooks of the browser tests make them as well.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np

from dinfer.config import Config
from dinfer.engine.board import DeviceMemory, Stand
from dinfer.kv.view import KV
from dinfer.model.decoder import Decoder
from dinfer.model.text import load_tokenizer
from dinfer.plan.breakpoints import Breakpoint, parse_when
from dinfer.plan.cut import Cut, Cuts, Unit
from dinfer.plan.ops import Op, PlanError
from dinfer.plan.partition import partition
from dinfer.plan.plan import Plan
from dinfer.plan.schedule import build
from dinfer.results import Breakpoints
from dinfer.run.state import RECOVER, Mark, Standing, State
from dinfer.run.stepper import Stepper
from dinfer.severity import Severity
from dinfer.trace.events import Event
from dinfer.views.cells import STATES, CellMap
from tests.support.twin import Twin


class Faults:
    """Lines of faults."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def clear(self) -> None:
        self.lines.clear()


class Listeners:
    """Those who want to hear of changes."""

    def __init__(self) -> None:
        self.callbacks: list[Callable[[], None]] = []

    def on_change(self, callback: Callable[[], None]) -> Callable[[], None]:
        self.callbacks.append(callback)
        return lambda: self.callbacks.remove(callback)

    def tell(self) -> None:
        for callback in list(self.callbacks):
            callback()


class Bare:
    """What no run here has: KV, events, ranks that hang."""

    def __init__(self) -> None:
        self.listeners = Listeners()
        self.on_change = self.listeners.on_change
        self.faults = Faults()
        self.found: dict[int, Breakpoint] = {}
        self.last_call = ""
        self.breakpoints = Breakpoints(self.found, self._changed)
        self.events: list[Event] = []

    def _changed(self, call: str, _: object) -> None:
        self.last_call = call
        self.listeners.tell()

    def break_at(
        self,
        *,
        layer: int | None = None,
        chunk: int | None = None,
        rank: int | None = None,
        when: str | None = None,
        hit: int | None = None,
    ) -> None:
        number = max(self.found, default=0) + 1
        self.found[number] = Breakpoint(number, rank, "layer", chunk, layer, *parse_when(when), hit=hit)
        self.listeners.tell()

    def verdict(self) -> str:
        return "the run moves"

    def compare(self, what: object, /) -> object:
        raise PlanError(f"this run is on paper: it cannot be compared with {what!r}.")

    def kv(self, *, layer: int | None = None) -> KV:
        raise PlanError(f"this run holds no KV of layer {layer}.")

    def events_since(self, read: Sequence[int]) -> tuple[list[Event], list[int]]:
        return self.events[read[1] if read else 0 :], [0, len(self.events)]


def paper_plan(layers: int = 4, chunks: int = 3, ranks: int = 2) -> Plan:
    """A pipelined pairwise plan of that size."""
    shape = partition(layers=layers, tokens=chunks * 8, world_size=ranks, chunk_size=8)
    return build(shape, "pipelined", "pairwise")


class PaperRun(Bare):
    """Steps on paper: no ranks, positions jump from cut to cut. While `open` is cleared, a step does not return."""

    def __init__(self, plan: Plan, labels: Sequence[str] = ()) -> None:
        super().__init__()
        self.plan, self.world_size = plan, plan.world_size
        self.labels = list(labels) or [""] * len(plan.shape.chunks)
        self.cuts = Cuts(plan)
        self.cut = self.cuts.start
        self.started: Cut = tuple(tuple(0 for _ in lanes) for lanes in plan.lanes)
        self.open = threading.Event()
        self.open.set()
        self.calls: list[str] = []
        self.state: str = "paused"
        self.message, self.decoded, self.text = "", 0, ""
        self.marks: list[Mark] = []
        self.why = self.last_call = self.over = self.playing = self.remedy = ""
        self.severity, self.begun = Severity.NOTE, 1
        self.devices = ["cpu"] * plan.world_size
        self.alive = [True] * plan.world_size
        self.memory: list[int | None] = []
        self.device_memory: list[DeviceMemory | None] = []

    def chunk_labels(self) -> list[str]:
        return self.labels

    def standing(self) -> Standing:
        stands = tuple(
            Stand(lanes, tuple(map(bool, begun)), lanes)
            for lanes, begun in zip(self.cut, self.started, strict=True)
        )
        return Standing(
            stands,
            State(self.state),
            self.message,
            self.decoded,
            self.text,
            tuple(self.devices),
            tuple(self.alive),
            last_call=self.calls[-1] if self.calls else "",
            faults=tuple(self.faults.lines),
            marks=tuple(self.marks),
            memory=tuple(self.memory),
            verdict=self.why,
            device_memory=tuple(self.device_memory),
            over=self.over,
            playing=self.playing,
            remedy=self.remedy,
            severity=self.severity,
            begun=self.begun,
        )

    def move(self, call: str, cut: Cut) -> None:
        """Arrive at a cut."""
        self.calls.append(call)
        self.open.wait()
        self.cut = cut
        self.listeners.tell()

    def step(self, unit: Unit, n: int = 1) -> None:
        cut = self.cut
        for _ in range(n):
            cut = self.cuts.next(cut, unit)
        self.move(f'run.step("{unit}")', cut)

    def step_back(self, unit: Unit, n: int = 1) -> None:
        cut = self.cut
        for _ in range(n):
            cut = self.cuts.previous(cut, unit)
        self.move(f'run.step_back("{unit}")', cut)

    def play(self, unit: Unit, per_second: float) -> None:
        self.move(f'run.play("{unit}", per_second={per_second:g})', self.cuts.next(self.cut, unit))

    def undo(self) -> str:
        self.move("run.undo()", self.cuts.start)
        return "undid all"

    def run_to(self, *, chunk: int, layer: int) -> None:
        self.move(f"run.run_to(chunk={chunk}, layer={layer})", self.cuts.after_block(chunk, layer))

    def resume(self) -> None:
        self.move("run.resume()", self.cuts.end)

    def restart(self) -> None:
        self.begun += 1
        self.move("run.restart()", self.cuts.start)

    def mend(self) -> None:
        self.state, self.message, self.remedy, self.why = "paused", "", "", ""
        self.begun += 1
        self.move(RECOVER, self.cuts.start)

    def pause(self) -> None:
        self.calls.append("run.pause()")
        self.listeners.tell()


def busy_run(layers: int, chunks: int, ranks: int, waves: int) -> PaperRun:
    """A run on paper that is under way: after some waves, with every state of a cell on its map."""
    run = PaperRun(paper_plan(layers, chunks, ranks))
    run.step("wave", waves)
    run.started = tuple(tuple(int(lane.name == "compute") for lane in lanes) for lanes in run.plan.lanes)
    cells = CellMap(run.plan)
    while len(np.unique(cells.states(run.standing().stands))) < len(STATES):
        assert run.cut != run.cuts.end, "no cut by op has every state"
        run.step("op")
    return run


class TwinRun(Bare):
    """A run whose ranks are threads of this process. Each compute op takes `pace` seconds more than it needs."""

    def __init__(self, model: str, prompt: str, **config: object) -> None:
        super().__init__()
        settings = Config.of({"model_path": model, **config})
        tokenizer = load_tokenizer(model)
        assert tokenizer is not None
        ids = list(tokenizer(prompt)["input_ids"])
        self.twin = Twin(Decoder.load(model), settings)
        self.fleet = self.twin.prepare(ids)
        self.plan, self.world_size = self.fleet.plan, settings.world_size
        self.labels = [tokenizer.decode(ids[chunk.start : chunk.stop]) for chunk in self.plan.shape.chunks]
        self.stepper = Stepper(self.fleet, timeout=60)
        self.last_call = ""
        self._closing = threading.Event()
        self.pace = 0.0
        for engine in self.twin.engines:
            engine.executor.on_op = self._linger
        self._watcher = threading.Thread(target=self._watch, name="twin run watcher", daemon=True)
        self._watcher.start()

    def chunk_labels(self) -> list[str]:
        return self.labels

    def standing(self) -> Standing:
        stands = self.fleet.stands()
        moving = any(any(stand.started) or not stand.at_limits for stand in stands)
        ended = tuple(stand.positions for stand in stands) == self.stepper.cuts.end
        state = State.DONE if ended else State.RUNNING if moving else State.PAUSED
        ranks = self.world_size
        return Standing(tuple(stands), state, "", 0, "", ("cpu",) * ranks, (True,) * ranks, self.last_call)

    def step(self, unit: Unit, n: int = 1) -> object:
        return self._said(f'run.step("{unit}")', lambda: self.stepper.step(unit, n))

    def step_back(self, unit: Unit, n: int = 1) -> object:
        return self._said(f'run.step_back("{unit}")', lambda: self.stepper.step_back(unit, n))

    def play(self, unit: Unit, per_second: float) -> object:  # noqa: ARG002 - as fast as it goes
        return self.step(unit)

    def undo(self) -> object:
        return self._said("run.undo()", lambda: self.stepper.go_to(self.stepper.cuts.start))

    def run_to(self, *, chunk: int, layer: int) -> object:
        call = f"run.run_to(chunk={chunk}, layer={layer})"
        return self._said(call, lambda: self.stepper.run_to(chunk, layer))

    def resume(self) -> object:
        return self._said("run.resume()", self.stepper.resume)

    def pause(self) -> object:
        return self._said("run.pause()", self.stepper.pause)

    def mend(self) -> object:
        return self.restart()

    def restart(self) -> object:
        chunks = len(self.plan.shape.chunks)
        return self._said("run.restart()", lambda: self.stepper.step_back("chunk", chunks))

    def close(self) -> bool:
        """End lanes and watcher; whether all lanes ended."""
        with self.twin.gate.change():
            self._closing.set()
        self._watcher.join()
        return self.twin.close()

    def _said(self, call: str, do: Callable[[], object]) -> object:
        self.last_call = call
        self.listeners.tell()
        return do()

    def _linger(self, _: Event, op: Op) -> None:
        if not op.is_transfer:
            self._closing.wait(self.pace)

    def _watch(self) -> None:
        seen = self.fleet.stands()
        while not self._closing.is_set():
            before = seen
            self.twin.gate.wait(
                lambda before=before: (self._closing.is_set() or self.fleet.stands() != before) or None  # type: ignore[misc]
            )
            seen = self.fleet.stands()
            self.listeners.tell()
