"""Sees ops by methods of process groups that are replaced: messages, and all ops of a torch whose c10d operators cannot
be overridden.

As `kernels` does, this sees names that were imported early, `batch_isend_irecv`, other threads and `group.send`, since
all of `torch.distributed` goes by these methods. It does not see functional collectives, nor what C++ code calls, such
as DDP's reducer. But it costs half as much: the way through a Python kernel makes objects of all arguments.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import CodeType
from typing import Any, NamedTuple

from .recorder import OpRecorder, PendingOp
from .records import NOTHING
from .works import Works, flat, is_uneven


class MethodArguments(NamedTuple):
    """Where among a method's arguments the facts are, behind the group itself."""

    kind: str
    tensors: int | None = 0
    """which is recorded: what this rank sends, or receives where it sends nothing"""
    peer: int | None = None
    tag: int | None = None
    has_root: bool = False
    """the options say a root"""
    parts: int | None = None
    """one tensor for each rank, where backends for devices admit these to differ"""


METHODS = {
    "send": MethodArguments("send", peer=1, tag=2),
    "recv": MethodArguments("recv", peer=1, tag=2),
    "recv_anysource": MethodArguments("recv", tag=1),
    "allreduce": MethodArguments("all_reduce"),
    "allreduce_coalesced": MethodArguments("all_reduce"),
    "allgather": MethodArguments("all_gather", 1, parts=0),
    "_allgather_base": MethodArguments("all_gather", 1),
    "all_gather_single": MethodArguments("all_gather", 1),
    "allgather_coalesced": MethodArguments("all_gather", 1),
    "allgather_into_tensor_coalesced": MethodArguments("all_gather", 1),
    "all_gather_single_coalesced": MethodArguments("all_gather", 1),
    "reduce_scatter": MethodArguments("reduce_scatter", parts=1),
    "_reduce_scatter_base": MethodArguments("reduce_scatter"),
    "reduce_scatter_single": MethodArguments("reduce_scatter"),
    "reduce_scatter_tensor_coalesced": MethodArguments("reduce_scatter"),
    "reduce_scatter_single_coalesced": MethodArguments("reduce_scatter"),
    "alltoall": MethodArguments("all_to_all", 1),
    "alltoall_base": MethodArguments("all_to_all", 1),
    "all_to_all_single": MethodArguments("all_to_all", 1),
    "broadcast": MethodArguments("broadcast", has_root=True),
    "reduce": MethodArguments("reduce", has_root=True),
    "gather": MethodArguments("gather", 1, has_root=True),
    "scatter": MethodArguments("scatter", has_root=True),
    "barrier": MethodArguments("barrier", None),
    "monitored_barrier": MethodArguments("barrier", None),
}

MESSAGES = ("send", "recv", "recv_anysource")

WAITING = "monitored_barrier"
"""the method that waits by itself"""


class PatchedMethods:
    """Methods of ProcessGroup that tell a recorder of each call."""

    name = "patched"

    def __init__(self, recorder: OpRecorder, works: Works, names: Iterable[str] = METHODS) -> None:
        """Puts those of these names in place. Raises as torch does."""
        import torch

        self._recorder, self._works = recorder, works
        self._kind: Any = torch._C._distributed_c10d.ProcessGroup
        self._restore: list[Callable[[], None]] = []
        self.passing: CodeType | None = None
        """the code of the methods for messages, from which an op comes that is recorded already"""
        for name in names:
            if name in vars(self._kind):
                original, where = getattr(self._kind, name), METHODS[name]
                make = self._message if name in MESSAGES else partial(self._method, waits=name == WAITING)
                self._replace(name, make(original, where))

    def remove(self) -> None:
        """As it was before."""
        for restore in reversed(self._restore):
            restore()

    def _replace(self, name: str, by: Any) -> None:
        kind, before = self._kind, vars(self._kind)[name]
        by.__wrapped__ = before
        setattr(kind, name, by)
        self._restore.append(lambda: setattr(kind, name, before))

    def _message(self, original: Any, where: MethodArguments) -> Callable[..., Any]:
        """As `_method`, in fewer steps."""
        recorder, works, kind, peer_at = self._recorder, self._works, where.kind, where.peer
        count = 2 if peer_at is None else 3

        def message(group: Any, *args: Any, **options: Any) -> Any:
            pending = None
            if not recorder.is_off:
                try:
                    tensors = args[0] if len(args) == count else None
                    if type(tensors) is list and type(args[1]) is int:
                        pending = recorder.issued(
                            kind, recorder.group_of(group), NOTHING if peer_at is None else args[1], args[-1],
                            tensors, None, sys._getframe(1),
                        )  # fmt: skip
                    else:
                        pending = self._begin(group, where, args, options, False)
                except Exception as error:
                    recorder.switch_off("reading ops", error)
            try:
                work = original(group, *args, **options)
            except BaseException as error:
                if pending is not None:
                    recorder.not_issued(pending, error)
                raise
            if pending is not None:
                try:
                    if work is None:
                        works.without_work(pending, next(iter(_tensors(where, args, options)), None))
                    else:
                        works.follow(work, pending)
                except Exception as error:
                    recorder.switch_off("following ops", error)
            return work

        self.passing = message.__code__
        return message

    def _method(self, original: Any, where: MethodArguments, *, waits: bool) -> Callable[..., Any]:
        recorder, works = self._recorder, self._works

        def method(group: Any, *args: Any, **options: Any) -> Any:
            pending = None
            if not recorder.is_off:
                try:
                    pending = self._begin(group, where, args, options, waits)
                except Exception as error:
                    recorder.switch_off("reading ops", error)
            try:
                result = original(group, *args, **options)
            except BaseException as error:
                if pending is not None and waits:
                    recorder.done(pending, error)
                elif pending is not None:
                    recorder.not_issued(pending, error)
                raise
            if pending is not None:
                try:
                    if waits:
                        recorder.done(pending)
                    elif result is None:
                        works.without_work(pending, next(iter(_tensors(where, args, options)), None))
                    else:
                        works.hand_over(result, pending)
                except Exception as error:
                    recorder.switch_off("following ops", error)
            return result

        return method

    def _begin(
        self, group: Any, where: MethodArguments, args: tuple[Any, ...], options: dict[str, Any], waits: bool
    ) -> PendingOp | None:
        tensors = _tensors(where, args, options)
        about = options.get("opts", args[-1] if args else None)
        parts = _argument(where.parts, args, options)
        sized = flat(parts) if parts is not None and tensors and not tensors[0].is_cpu else ()
        peer, tag = (_argument(at, args, options) for at in (where.peer, where.tag))
        if where.has_root:
            peer = getattr(about, "rootRank", None)
        return self._recorder.issued(
            where.kind,
            self._recorder.group_of(group),
            NOTHING if peer is None else int(peer),
            NOTHING if tag is None else int(tag),
            tensors,
            False if waits else getattr(about, "asyncOp", None),  # None: the callers' frames tell
            sys._getframe(2),
            None,
            sized if sized and is_uneven(sized) else (),
        )


def _argument(at: int | None, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """The argument at a place, where those that are named follow in their order; None if it is not given."""
    if at is None:
        return None
    given = args if at < len(args) else (*args, *options.values())
    return given[at] if at < len(given) else None


def _tensors(where: MethodArguments, args: tuple[Any, ...], options: dict[str, Any]) -> Sequence[Any]:
    found = _argument(where.tensors, args, options)
    tensors: Sequence[Any] = () if found is None else flat(found)
    return tensors
