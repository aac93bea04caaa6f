"""When ops are waited for, and when they are over: as their Work says.

`wait` of Work is replaced, which counts for every Work, whoever made it; and what else tells somebody that an op is
over: `is_completed` that says yes, and the future, whose `wait` is one, too, as is that of what follows on it. On the
CPU an op is over when `wait` returns. On a device `wait` only tells the device to wait, so there the probe's thread
asks `is_completed`, which does not wait either. It also asks for ops that nobody waits for: gloo says so of
collectives, never of sends and receives.

Backends for devices give no Work for an op whose caller waits at once, nor for the parts of a batch. Such an op runs on
the caller's stream, where an event behind it says when it is over; of a batch the Work at its end does.

A Work may hold tensors, so none is held for long: one that was just made, until its thread's next op or half a second;
that of a collective on the CPU, until it is over, as its backend holds it too (C++ code, such as DDP's, may wait for it
where nobody sees); and on a device the last one of each group, or pair of ranks in it, until it is over, since these
end in the order of their issue.
"""

import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from .captures import captures
from .recorder import ChannelKey, OpRecorder, PendingOp

MOST_OUTPUTS = 1024

MOST_ASKED = 512
"""So many ops are asked about at a time."""

MOST_HELD = 256
"""collectives on the CPU that are under way at a time, whose Work is held"""

HELD_BYTES = 2**20
"""On a device, also older ops are followed one by one if they have no more bytes than this; at most 64 of a group."""

Pendings = tuple[PendingOp, ...]


class Works:
    """The ops of this process that may not be over, by their Work."""

    def __init__(self, recorder: OpRecorder) -> None:
        self._recorder = recorder
        self._by_work: dict[int, tuple[weakref.ref[Any], Pendings]] = {}
        self._by_future: dict[int, tuple[weakref.ref[Any], Any, Pendings]] = {}
        self.by_output: dict[int, PendingOp] = {}
        """Collectives by the address of their output, by which functional ones are waited for."""
        self._handed: dict[int, Any] = {}
        self._handed_before: dict[int, tuple[int, int]] = {}
        """at the last look: the id of each thread's Work, and its op, since another Work may get the same id"""
        self._under_way: dict[int, Any] = {}
        """the Work of collectives on the CPU that were not over when their thread went on, by its id"""
        self._batches: dict[int, list[PendingOp]] = {}
        """by thread"""
        self.devices = DeviceOps(recorder)
        self._restore: list[Callable[[], None]] = []

    def clear(self) -> None:
        """Forget all: in a forked child none of them is this process's, and who records no more needs none."""
        for found in (
            self._by_work, self._by_future, self.by_output, self._handed, self._handed_before, self._under_way,
            self._batches,
        ):  # fmt: skip
            found.clear()
        self.devices.clear()

    # -- from issue to wait

    def hand_over(self, work: Any, pending: PendingOp) -> None:
        """This Work stands for the op. The caller will get the same object, if it is held until then."""
        ident, handed = threading.get_ident(), self._handed
        if ident in handed:
            self._let_go(handed[ident])
        handed[ident] = work
        self.follow(work, pending)

    def follow(self, work: Any, pending: PendingOp) -> None:
        """This Work, which the caller has, stands for the op."""
        if self._batches and (batch := self._batches.get(threading.get_ident())) is not None:
            batch.append(pending)
        elif pending.on_device:
            self._follow_on_device(work, (pending,), pending.queue)
        else:
            self._keep(work, (pending,))
        if self._recorder.is_off:
            self.clear()

    def keep_output(self, tensors: Any, pending: PendingOp) -> None:
        """A collective has these outputs, by which it may be waited for."""
        if tensors:
            try:
                self.by_output[tensors[0].data_ptr()] = pending
            except RuntimeError:  # a sparse tensor has no address
                return
            _keep_at_most(self.by_output, MOST_OUTPUTS)

    def without_work(self, pending: PendingOp, tensor: Any) -> None:
        """The op was issued, and there is no Work. `tensor`: one of its own, on its device; None: it has none."""
        batch = self._batches.get(threading.get_ident())
        if batch is not None:
            batch.append(pending)
            return
        if pending.on_device and tensor is not None:
            self._behind((pending,), pending.queue, tensor.device)
        else:
            self._recorder.done(pending)

    def _behind(self, pendings: Pendings, queue: ChannelKey, device: Any) -> None:
        """Ops on the caller's stream: they are over when that has come so far."""
        event = None if captures.is_capturing else stream_event(device)
        if event is None:  # a graph is captured: they will run whenever that does
            for pending in pendings:
                self._recorder.done(pending)
        else:
            self.devices.add(event, pendings, queue)

    def _follow_on_device(self, work: Any, pendings: Pendings, queue: ChannelKey) -> None:
        if captures.is_capturing:
            for pending in pendings:  # it will run whenever the graph does: here it is only written down
                self._recorder.done(pending)
            return
        self._keep(work, pendings)
        self.devices.add(work, pendings, queue)

    def _keep(self, work: Any, pendings: Pendings) -> None:
        key, by_work = id(work), self._by_work
        by_work[key] = (weakref.ref(work, lambda _: by_work.pop(key, None) and None), pendings)

    def patch(self) -> None:
        """Replace `wait` of every kind of Work, and what ends a batch of ops. Raises as torch does."""
        import torch

        c10d = torch._C._distributed_c10d
        for kind in (c10d.Work, *_all_subclasses(c10d.Work)):
            for name, make in (
                ("wait", self._waiting),
                ("synchronize", self._waiting),
                ("is_completed", self._asking),
                ("get_future", self._giving_future),
            ):
                if name in vars(kind):
                    self._replace(kind, name, make(getattr(kind, name)))
        self._replace(torch._C.Future, "wait", self._waiting_for_future(torch._C.Future.wait))
        self._replace(torch._C.Future, "then", self._continuing(torch._C.Future.then))
        group = c10d.ProcessGroup
        if hasattr(group, "_start_coalescing"):
            self._replace(group, "_start_coalescing", self._starting(group._start_coalescing))
            self._replace(group, "_end_coalescing", self._ending(group._end_coalescing))

    def unpatch(self) -> None:
        """As it was before `patch`."""
        for restore in reversed(self._restore):
            restore()
        self._restore.clear()

    def _replace(self, kind: Any, name: str, by: Any) -> None:
        before = vars(kind)[name]
        by.__wrapped__ = before
        setattr(kind, name, by)
        self._restore.append(lambda: setattr(kind, name, before))

    def _known(self, work: Any) -> Pendings:
        """The ops that a Work stands for."""
        found = self._by_work.get(id(work))
        return () if found is None or found[0]() is not work else found[1]

    def _waiting(self, original: Any) -> Any:
        by_work, recorder = self._by_work, self._recorder

        def wait(work: Any, *args: Any, **options: Any) -> Any:
            found = by_work.get(id(work))
            if found is None or found[0]() is not work:
                return original(work, *args, **options)
            pendings = found[1]
            for pending in pendings:
                if not pending.blocking:
                    recorder.waiting(pending, sys._getframe(1))
            try:
                result = original(work, *args, **options)
            except BaseException as error:
                self._over(work, pendings, error)
                raise
            self._over(work, pendings, None)
            return result

        return wait

    def _asking(self, original: Any) -> Any:
        known, recorder = self._known, self._recorder

        def is_completed(work: Any) -> Any:
            result = original(work)
            if result:  # whoever asks until then has waited; whoever does not goes on to something else
                pendings = known(work)
                for pending in pendings:
                    recorder.waiting(pending, sys._getframe(1))
                    recorder.done(pending, None, work)
            return result

        return is_completed

    def _giving_future(self, original: Any) -> Any:
        known, recorder = self._known, self._recorder

        def get_future(work: Any) -> Any:
            future = original(work)
            pendings = known(work)
            if pendings:
                try:
                    for pending in pendings:
                        recorder.followed(pending)
                    self._keep_future(future, weakref.ref(work), pendings)
                except Exception as error:
                    recorder.switch_off("following futures", error)
            return future

        return get_future

    def _keep_future(self, future: Any, work: Any, pendings: Pendings) -> None:
        key, by_future = id(future), self._by_future
        forget = weakref.ref(future, lambda _: by_future.pop(key, None) and None)
        by_future[key] = (forget, work, pendings)

    def _continuing(self, original: Any) -> Any:
        def then(future: Any, *args: Any, **options: Any) -> Any:
            following = original(future, *args, **options)
            found = self._by_future.get(id(future)) if self._by_future else None
            if found is not None and found[0]() is future:
                self._keep_future(following, *found[1:])
            return following

        return then

    def _waiting_for_future(self, original: Any) -> Any:
        recorder, by_future = self._recorder, self._by_future

        def wait(future: Any) -> Any:
            found = by_future.get(id(future)) if by_future else None
            if found is None or found[0]() is not future:
                return original(future)
            _, work, pendings = found
            for pending in pendings:
                recorder.waiting(pending, sys._getframe(1))
            try:
                result = original(future)
            except BaseException as error:
                self._over(work(), pendings, error)
                raise
            self._over(work(), pendings, None)
            return result

        return wait

    def _over(self, work: Any, pendings: Pendings, error: BaseException | None) -> None:
        for pending in pendings:
            if error is not None or not pending.on_device:
                self._recorder.done(pending, error, work)
        if not pendings[-1].on_device:
            self._by_work.pop(id(work), None)
        if self._under_way:
            self._under_way.pop(id(work), None)
        if self._handed:
            ident = threading.get_ident()
            if self._handed.get(ident) is work:
                self._handed.pop(ident, None)

    # -- batches

    def _starting(self, original: Any) -> Any:
        def start(group: Any, *args: Any, **options: Any) -> Any:
            result = original(group, *args, **options)
            if not self._recorder.is_off:
                self._batches[threading.get_ident()] = []
            return result

        return start

    def _ending(self, original: Any) -> Any:
        def end(group: Any, *args: Any, **options: Any) -> Any:
            pendings = tuple(self._batches.pop(threading.get_ident(), ()))
            try:
                work = original(group, *args, **options)
            except BaseException as error:
                for pending in pendings:
                    self._recorder.done(pending, error)
                raise
            try:
                if pendings:
                    self._follow_batch(work, pendings, args)
            except Exception as error:
                self._recorder.switch_off("following batches", error)
            return work

        return end

    def _follow_batch(self, work: Any, pendings: Pendings, args: tuple[Any, ...]) -> None:
        queue = pendings[-1].channel[:2]  # a batch of messages, too, runs where the group's collectives do
        if not pendings[-1].on_device:
            for pending in pendings if work is None else ():
                self._recorder.done(pending)
            if work is not None:
                self._keep(work, pendings)
        elif work is not None:
            self._follow_on_device(work, pendings, queue)
        else:
            for pending in pendings:
                self._recorder.waiting(pending, sys._getframe(2))
            self._behind(pendings, queue, args[0] if args else None)

    # -- without a wait

    def _let_go(self, work: Any) -> None:
        """The caller has this Work by now, unless it has let go of it, or is C++ code: then only it says that the op is
        over. gloo says so of collectives, of messages never."""
        self._ask(work)
        found = self._by_work.get(id(work))
        last = found[1][-1] if found else None
        if last is None or self._recorder.is_over(last) or last.on_device or not last.is_collective:
            return
        self._under_way[id(work)] = work
        _keep_at_most(self._under_way, MOST_HELD)

    def _ask(self, work: Any) -> None:
        """Whether it is over: C++ code may have waited for it, as DDP's does."""
        found = self._by_work.get(id(work))
        if found is None or found[1][-1].on_device or self._recorder.is_over(found[1][-1]):
            return
        if is_completed(work):
            for pending in found[1]:
                self._recorder.done(pending, None, work)

    def _handed_of(self, ident: int) -> tuple[int, int]:
        key = id(self._handed.get(ident))
        found = self._by_work.get(key)
        return key, found[1][-1].commit if found else 0

    def look(self) -> bool:
        """Ask, without waiting, which ops are over. Returns whether device ops are under way. Never raises."""
        try:
            for reference, _ in list(self._by_work.values())[:MOST_ASKED]:
                work = reference()
                if work is not None:
                    self._ask(work)
            for ident, before in self._handed_before.items():
                if self._handed_of(ident) == before:
                    self._let_go(self._handed.pop(ident, None))
            for key in list(self._under_way):
                found = self._by_work.get(key)
                if found is None or self._recorder.is_over(found[1][-1]):
                    self._under_way.pop(key, None)
            self._handed_before = {ident: self._handed_of(ident) for ident in list(self._handed)}
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
        self._queues: dict[ChannelKey, deque[tuple[Any, Pendings]]] = {}
        # Reentrant: a signal's handler may issue an op while its thread is here. Never held while anything is asked.
        self._changing = threading.RLock()

    def clear(self) -> None:
        """Forget all."""
        self._queues.clear()

    def add(self, work: Any, pendings: Pendings, queue: ChannelKey) -> None:
        """Ops were issued; `work`: their Work, or an event. Of those before only small ones are still held."""
        with self._changing:
            waiting = self._queues.setdefault(queue, deque(maxlen=4096))
            if waiting:
                older = waiting[-1][1]
                if sum(pending.nbytes for pending in older) > HELD_BYTES:
                    waiting[-1] = (None, older)
                if len(waiting) > 64:
                    waiting[-65] = (None, waiting[-65][1])
            waiting.append((work, pendings))

    def look(self) -> bool:
        """Which are over: those that say so, and all issued before them. Returns whether others are under way."""
        found: list[bool] = []
        captures.unless_capturing(lambda: found.append(self._look()))
        return bool(found and found[0])

    def _look(self) -> bool:
        is_any = False
        for waiting in list(self._queues.values()):
            over, error = 0, None
            for number, (work, _) in enumerate(list(waiting)):
                if work is not None:
                    try:
                        if not is_completed(work):
                            break
                    except Exception as failure:  # the device has failed
                        error = failure
                    over = number + 1
                    if error is not None:
                        break
            with self._changing:
                ended = [waiting.popleft()[1] for _ in range(over)]
            for number, pendings in enumerate(ended):
                for pending in pendings:
                    self._recorder.done(pending, error if number == over - 1 else None)
            is_any = is_any or bool(waiting)
        return is_any


def _keep_at_most(found: dict[int, Any], most: int) -> None:
    """Drop the oldest, unless other threads are changing it just now: they will."""
    with suppress(RuntimeError, StopIteration):
        if len(found) > most:
            found.pop(next(iter(found)), None)


class StreamEvent:
    """An event on a device's stream, asked like a Work."""

    def __init__(self, event: Any) -> None:
        self._event = event

    def is_completed(self) -> bool:
        """Whether the stream has come so far."""
        return bool(self._event.query())


def stream_event(device: Any) -> StreamEvent | None:
    """An event behind what the current stream of this device has to do; None while that is captured into a graph."""
    import torch

    module: Any = getattr(torch, device.type)
    if device.type == "cuda" and module.is_current_stream_capturing():
        return None
    event = module.Event()
    event.record(module.current_stream(device))
    return StreamEvent(event)


def is_completed(work: Any) -> bool:
    """As Work itself says, not as the program is told."""
    method = type(work).is_completed
    return bool(getattr(method, "__wrapped__", method)(work))


def _all_subclasses(kind: type[Any]) -> list[type[Any]]:
    found: list[type[Any]] = []
    for one in kind.__subclasses__():
        found.append(one)
        found.extend(_all_subclasses(one))
    return found


def flat(value: Any) -> Any:
    """The tensors of an argument: a tensor, a list, or the first of a list of lists."""
    if type(value) is list or type(value) is tuple:
        return value[0] if value and type(value[0]) in (list, tuple) else value
    return (value,)


def is_uneven(tensors: Any) -> bool:
    """Whether they differ in shape."""
    return any(tensor.shape != tensors[0].shape for tensor in tensors)
