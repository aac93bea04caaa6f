"""Starts the probe in this process: at once where torch.distributed is there already, else once it is imported."""

import os
import sys
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

from .caches import TransformersCaches
from .captures import captures
from .cells import Cells
from .endings import Endings
from .groups import NO_GROUP
from .imports import ImportWatch
from .kv_methods import watch_methods
from .models import TransformersModels
from .paged import PagedCaches
from .recorder import OpRecorder
from .records import NOTHING
from .stacks import dump_no_more, dump_on_signal, dumps_still
from .tensors import TensorWatch
from .thread import ProbeThread
from .works import Works

VARIABLE = "DINFER_WATCH"
HOOK_VARIABLE = "DINFER_WATCH_HOOK"
"""how ops are to be seen, `kernels` or `patched`; if it is not set, by the best that torch has"""
_C10D = "torch.distributed.distributed_c10d"
_RANK = 4
"""the argument `rank` of init_process_group, where it has no name"""


class Probe:
    """What watches this process."""

    def __init__(self, folder: str | Path, *, compares: bool = False) -> None:
        self.recorder = OpRecorder(
            Path(folder).absolute(), on_open=self._on_open, on_fork=self._on_fork, on_off=self._on_off
        )
        self._works = Works(self.recorder)
        self._hook: Any = None
        self._dump: int | None = None
        self._thread: ProbeThread | None = None
        self._restore: list[tuple[Any, str, Any, Any]] = []
        self._cells: Cells | None = None
        self._imports = ImportWatch()
        self._endings = Endings(self.recorder, self._imports, self._stop_thread, lambda: self._tensors.look())
        self._tensors = TensorWatch(self.recorder, compares=compares)
        TransformersCaches(self._tensors, self._imports)
        TransformersModels(self._tensors, self._imports)
        watch_methods(self._tensors, self._imports)
        captures.watch(self._imports)
        PagedCaches(self._tensors, self._imports)
        self._imports.add(_C10D, self._found_c10d)

    def serves(self, folder: str | Path, *, compares: bool) -> bool:
        """Whether this is what a `Probe` of that folder would be."""
        return self.recorder.folder == Path(folder).absolute() and self._tensors.compares >= compares

    def stop(self) -> None:
        """Watch no more, and leave torch as it was. What was recorded stays."""
        self._stop_thread()
        if self._cells is not None:
            self._cells.remove()
        self._tensors.stop()
        self._imports.remove()
        self._endings.remove()
        if self._hook is not None:
            self._hook.remove()
            self._works.unpatch()
        for owner, name, by, before in reversed(self._restore):
            if getattr(owner, name, None) is by:
                setattr(owner, name, before)
        captures.unwatch()
        dump_no_more()
        self._works.clear()
        self.recorder.close()

    def follow_cells(self, shell: Any) -> None:
        """Of an IPython shell, whose cells this process runs: when they begin, end and fail. A second call changes
        nothing."""
        if self._cells is None:
            self._cells = Cells(self.recorder, shell, self._tensors.look)

    def _on_open(self) -> None:
        self._thread = ProbeThread(self.recorder, self._works, self._look)
        self._say_dump()

    def _say_dump(self) -> None:
        records = self.recorder.records
        try:
            if records is not None:
                self._dump = dump_on_signal(self.recorder.folder / f"{records.name}.dump")
                if self._dump is not None:
                    records.lines.write("dump", signal=self._dump)
        except (OSError, ValueError, RuntimeError) as error:
            self.recorder.problem(f"no stacks while C code holds the GIL: {error}")

    def _look(self) -> None:
        self._tensors.look()
        self._check_dump()

    def _check_dump(self) -> None:
        records = self.recorder.records
        if self._dump is not None and records is not None and not dumps_still():
            self._dump = None
            records.lines.write("dump", signal=None)

    def _on_off(self) -> None:
        self._works.clear()

    def _on_fork(self) -> None:
        self._thread = None  # threads are not forked; the first op starts one
        captures.clear()
        self._works.clear()
        self._tensors.clear()

    def _stop_thread(self) -> None:
        thread, self._thread = self._thread, None
        self.recorder.find_groups()
        self._tensors.flush()
        if thread is not None:
            thread.stop()
        self._works.look()  # what was under way at its last look may be over

    # -- torch.distributed

    def _found_c10d(self, c10d: ModuleType) -> None:
        try:
            package = sys.modules.get("torch.distributed")
            for name, make in (("init_process_group", self._initialising), ("new_group", self._making_group)):
                before = getattr(c10d, name)
                by = make(before)
                for owner in (c10d, package):
                    if getattr(owner, name, None) is before:
                        setattr(owner, name, by)
                        self._restore.append((owner, name, by, before))
            if c10d.is_initialized():
                self._hook_ops()
                self.recorder.find_groups()
        except Exception as error:
            self.recorder.switch_off("finding torch.distributed", error)

    def _hook_ops(self) -> None:
        """When the first group is made: then torch is imported as a whole."""
        if self._hook is not None or self.recorder.is_off:
            return
        try:
            import torch

            self._works.patch()
            self._hook = self._placed_hook()
            self.recorder.say_hook(self._hook.name, torch.__version__)
        except Exception as error:
            self.recorder.switch_off("seeing ops", error)

    def _placed_hook(self) -> Any:
        """The best that this torch has, or the one that is asked for."""
        from .kernels import KernelHook
        from .patched import PatchedMethods

        asked = os.environ.get(HOOK_VARIABLE, "")
        if asked not in ("", KernelHook.name, PatchedMethods.name):
            self.recorder.problem(
                f"{HOOK_VARIABLE} is {asked!r}; it takes {KernelHook.name} or {PatchedMethods.name}"
            )
        if asked != PatchedMethods.name:
            try:
                return KernelHook(self.recorder, self._works)
            except (AttributeError, ImportError, NotImplementedError, RuntimeError, TypeError) as error:
                self.recorder.problem(
                    "ops are seen by methods of process groups alone, so functional collectives and those of C++ code, "
                    f"as DDP's, are not: torch's operators cannot be overridden: {type(error).__name__}: {error}"
                )
        return PatchedMethods(self.recorder, self._works)

    def _initialising(self, before: Any) -> Any:
        @wraps(before)
        def init_process_group(*args: Any, **options: Any) -> Any:
            self._hook_ops()
            rank = options.get("rank", args[_RANK] if len(args) > _RANK else None)
            if isinstance(rank, int) and rank >= 0:
                self.recorder.meant_to_be(rank)
            pending = self.recorder.issued(
                "init_group", NO_GROUP, NOTHING, NOTHING, (), False, sys._getframe(1)
            )
            return self._made(pending, before, args, options)

        return init_process_group

    def _making_group(self, before: Any) -> Any:
        @wraps(before)
        def new_group(*args: Any, **options: Any) -> Any:
            pending = None
            args, options = _with_listed_ranks(args, options)
            if not self.recorder.is_off:
                try:
                    group = self._wanted(args, options)
                    pending = self.recorder.issued(
                        "new_group", group, NOTHING, NOTHING, (), False, sys._getframe(1)
                    )
                except (TypeError, ValueError):
                    pass  # no ranks: torch will say so
                except Exception as error:
                    self.recorder.switch_off("seeing new groups", error)
            return self._made(pending, before, args, options)

        return new_group

    def _wanted(self, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        ranks = options.get("ranks", args[0] if args else None)
        if ranks is None:
            ranks = range(sys.modules[_C10D].get_world_size())
        backend = options.get("backend", args[2] if len(args) > 2 else None)
        return self.recorder.future_group(tuple(int(rank) for rank in ranks), str(backend or ""))

    def _made(self, pending: Any, before: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if pending is None:
            return before(*args, **options)
        try:
            result = before(*args, **options)
        except BaseException as error:
            self.recorder.done(pending, error)
            raise
        self.recorder.done(pending)
        self.recorder.find_groups()
        return result


current: Probe | None = None
"""The probe of this process."""


def start(folder: str | Path, *, compares: bool = False) -> Probe:
    """Watch this process from now on, and what it forks; its files go into `folder`. `compares`: take what a comparison
    with a reference needs, too. A second call changes nothing; one with another folder begins anew there."""
    global current
    if current is not None and not current.serves(folder, compares=compares):
        stop()
    if current is None:
        current = Probe(folder, compares=compares)
    return current


def stop() -> None:
    """Watch this process no more."""
    global current
    if current is not None:
        current.stop()
    current = None


def start_from_environment() -> None:
    """Watch this process if DINFER_WATCH names a folder. Never raises."""
    folder = os.environ.get(VARIABLE)
    if folder:
        try:
            start(folder)
        except Exception as error:
            print(
                f"dinfer: process {os.getpid()} is not watched: {type(error).__name__}: {error}",
                file=sys.stderr,
            )


def _with_listed_ranks(
    args: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `new_group`, with a list in place of ranks that can be gone through only once."""
    if hasattr(options.get("ranks"), "__next__"):
        return args, {**options, "ranks": list(options["ranks"])}
    if args and hasattr(args[0], "__next__"):
        return (list(args[0]), *args[1:]), options
    return args, options
