"""When ops are waited for, and when they are over: as their Work says.

`wait` of Work is replaced, which counts for every Work, whoever made it. On the CPU an op is over when `wait` returns.
On a device `wait` only tells the device to wait, so there the probe's thread asks `is_completed`, which does not wait
either. It also asks for ops that nobody waits for: gloo says so of collectives, never of sends and receives.

A Work may hold tensors, so none is held for long: one that was just made, until its thread's next op or half a second;
and on a device the last one of each group, or pair of ranks in it, until it is over, since these end in the order of
their issue.
"""

import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from .recorder import OpRecorder, PendingOp

MOST_ASKED = 512
"""So many ops are asked about at a time."""

HELD_BYTES = 2**20
"""On a device, also older ops are followed one by one if they have no more bytes than this; at most 64 of a group."""


class Works:
    """The ops of this process that may not be over, by their Work."""

    def __init__(self, recorder: OpRecorder) -> None:
        self._recorder = recorder
        self._by_work: dict[int, tuple[weakref.ref[Any], tuple[PendingOp, ...]]] = {}
        self.by_output: dict[int, PendingOp] = {}
        """Collectives by the address of their output, by which functional ones are waited for."""
        self._handed: dict[int, Any] = {}
        self._handed_before: dict[int, int] = {}
        self._coalesced: dict[int, list[PendingOp]] = {}
        self.devices = DeviceOps(recorder)
        self._restore: list[Callable[[], None]] = []

    def clear(self) -> None:
        """Forget all: in a forked child none of them is this process's."""
        for found in (self._by_work, self.by_output, self._handed, self._handed_before, self._coalesced):
            found.clear()
        self.devices.clear()

    # -- from issue to wait

    def hand_over(self, work: Any, pending: PendingOp) -> None:
        """This Work stands for the op. The caller will get the same object, if it is held until then."""
        ident = threading.get_ident()
        before = self._handed.get(ident)
        if before is not None:
            self._ask(before)
        self._handed[ident] = work
        started = self._coalesced.get(ident)
        if started is None:
            self._follow(work, (pending,))
        else:
            started.append(pending)

    def _follow(self, work: Any, pendings: tuple[PendingOp, ...]) -> None:
        if pendings[-1].on_device and self.devices.is_capturing:
            for pending in pendings:  # it will run whenever the graph does: here it is only written down
                self._recorder.done(pending)
            return
        key, by_work = id(work), self._by_work
        by_work[key] = (weakref.ref(work, lambda _: by_work.pop(key, None) and None), pendings)
        if pendings[-1].on_device:
            self.devices.add(work, pendings)

    def patch(self) -> None:
        """Replace `wait` of every kind of Work, and what ends a batch of ops. Raises as torch does."""
        import torch

        c10d = torch._C._distributed_c10d
        for kind in (c10d.Work, *_all_subclasses(c10d.Work)):
            for name in ("wait", "synchronize"):
                if name in vars(kind):
                    self._replace(kind, name, self._waiting(getattr(kind, name)))
        group = c10d.ProcessGroup
        if hasattr(group, "_start_coalescing"):
            self._replace(group, "_start_coalescing", self._starting(group._start_coalescing))
            self._replace(group, "_end_coalescing", self._ending(group._end_coalescing))

        graph = getattr(torch.cuda, "CUDAGraph", None)
        if graph is not None and "capture_begin" in vars(graph):
            self._replace(graph, "capture_begin", self.devices.pausing(graph.capture_begin))
            self._replace(graph, "capture_end", self.devices.resuming(graph.capture_end))

    def unpatch(self) -> None:
        """As it was before `patch`."""
        for restore in reversed(self._restore):
            restore()
        self._restore.clear()

    def _replace(self, kind: Any, name: str, by: Any) -> None:
        before = vars(kind)[name]
        setattr(kind, name, by)
        self._restore.append(lambda: setattr(kind, name, before))

    def _waiting(self, original: Any) -> Any:
        by_work, recorder = self._by_work, self._recorder

        def wait(work: Any, *args: Any, **options: Any) -> Any:
            found = by_work.get(id(work))
            if found is None or found[0]() is not work:
                return original(work, *args, **options)
            for pending in found[1]:
                recorder.waiting(pending, sys._getframe(1))
            try:
                result = original(work, *args, **options)
            except BaseException as error:
                self._over(work, found[1], error)
                raise
            self._over(work, found[1], None)
            return result

        return wait

    def _over(self, work: Any, pendings: tuple[PendingOp, ...], error: BaseException | None) -> None:
        for pending in pendings:
            if error is not None or not pending.on_device:
                self._recorder.done(pending, error)
            if pending.peer_unknown and error is None:
                self._recorder.found_peer(pending, work)
        ident = threading.get_ident()
        if self._handed.get(ident) is work:
            self._handed.pop(ident, None)

    def _starting(self, original: Any) -> Any:
        def start(group: Any, *args: Any, **options: Any) -> Any:
            result = original(group, *args, **options)
            self._coalesced[threading.get_ident()] = []
            return result

        return start

    def _ending(self, original: Any) -> Any:
        def end(group: Any, *args: Any, **options: Any) -> Any:
            pendings = self._coalesced.pop(threading.get_ident(), None)
            work = original(group, *args, **options)
            try:
                if pendings and work is not None:
                    self._follow(work, tuple(pendings))
            except Exception as error:
                self._recorder.switch_off("following batches", error)
            return work

        return end

    # -- without a wait

    def _ask(self, work: Any) -> None:
        """Whether it is over: C++ code may have waited for it, as DDP's does."""
        found = self._by_work.get(id(work))
        if found is None or found[1][-1].on_device or self._recorder.is_over(found[1][-1]):
            return
        if work.is_completed():
            for pending in found[1]:
                self._recorder.done(pending)

    def look(self) -> bool:
        """Ask, without waiting, which ops are over. Returns whether device ops are under way. Never raises."""
        try:
            for reference, _ in list(self._by_work.values())[:MOST_ASKED]:
                work = reference()
                if work is not None:
                    self._ask(work)
            for ident, key in self._handed_before.items():
                if id(self._handed.get(ident)) == key:  # the caller has it by now
                    self._handed.pop(ident, None)
            self._handed_before = {ident: id(work) for ident, work in list(self._handed.items())}
            return self.devices.look()
        except Exception as error:
            self._recorder.switch_off("asking whether ops are over", error)
            return False


class DeviceOps:
    """Ops on a device, in the order of issue: those of one communicator end in it.

    To ask whether one is over is forbidden to all threads while any captures a CUDA graph, and would spoil the graph:
    so nothing is asked meanwhile.
    """

    def __init__(self, recorder: OpRecorder) -> None:
        self._recorder = recorder
        self.is_capturing = False
        self._asking = threading.Lock()
        self._lanes: dict[tuple[int, int], deque[tuple[Any, tuple[PendingOp, ...]]]] = {}

    def clear(self) -> None:
        """Forget all."""
        self._asking = threading.Lock()
        self._lanes.clear()

    def add(self, work: Any, pendings: tuple[PendingOp, ...]) -> None:
        """An op was issued; of those before it only small ones are still held."""
        queue = self._lanes.setdefault(pendings[-1].lane, deque(maxlen=4096))
        if queue:
            older = queue[-1][1]
            if sum(pending.nbytes for pending in older) > HELD_BYTES:
                queue[-1] = (None, older)
            if len(queue) > 64:
                queue[-65] = (None, queue[-65][1])
        queue.append((work, pendings))

    def look(self) -> bool:
        """Which are over: those that say so, and all issued before them. Returns whether others are under way."""
        with self._asking:
            return not self.is_capturing and self._look()

    def pausing(self, original: Any) -> Any:
        """What begins to capture a graph: until it has ended, nothing is asked."""

        def capture_begin(*args: Any, **options: Any) -> Any:
            self.is_capturing = True
            if self._asking.acquire(timeout=1):  # no question is under way any more
                self._asking.release()
            try:
                return original(*args, **options)
            except BaseException:
                self.is_capturing = False
                raise

        return capture_begin

    def resuming(self, original: Any) -> Any:
        """What ends the capture of a graph."""

        def capture_end(*args: Any, **options: Any) -> Any:
            try:
                return original(*args, **options)
            finally:
                self.is_capturing = False

        return capture_end

    def _look(self) -> bool:
        is_any = False
        for queue in list(self._lanes.values()):
            over = 0
            for number, (work, _) in enumerate(list(queue)):
                if work is not None:
                    if not work.is_completed():
                        break
                    over = number + 1
            for _ in range(over):
                for pending in queue.popleft()[1]:
                    self._recorder.done(pending)
            is_any = is_any or bool(queue)
        return is_any


def _all_subclasses(kind: type[Any]) -> list[type[Any]]:
    found: list[type[Any]] = []
    for one in kind.__subclasses__():
        found.append(one)
        found.extend(_all_subclasses(one))
    return found
