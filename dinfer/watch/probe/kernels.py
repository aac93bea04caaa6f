"""Sees ops by kernels of their own in torch's dispatcher, put in front of the c10d operators' kernels of all devices.

This sees names that were imported early, `batch_isend_irecv`, functional collectives, other threads, inference mode and
`group.send`; not what calls a backend itself (`group._get_backend(…).send`) or NCCL.

The kernels stand at the key BackendSelect, which every call with tensors passes on its way to its device. So nothing is
replaced, and passing on is a redispatch, which releases the GIL. (Calling a replaced kernel from Python would hold it
while a communicator is being made: then the process could not be looked into, and two of its threads could block each
other.)
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from .recorder import GroupFacts, OpRecorder, PendingOp
from .records import NOTHING
from .works import Works


class _Way(NamedTuple):
    """How to read the arguments of an operator."""

    kind: str
    tensors: str
    """the argument with the tensors whose shape and size are recorded"""
    output: str = ""
    """the argument with the tensor that a functional collective returns, by which it is waited for"""
    peer: str = ""


OPERATORS = {
    "send": _Way("send", "tensors", peer="dst"),
    "recv_": _Way("recv", "tensors", peer="src"),
    "recv_any_source_": _Way("recv", "tensors"),
    "allreduce_": _Way("all_reduce", "tensors", "tensors"),
    "allreduce_coalesced_": _Way("all_reduce", "tensors", "tensors"),
    "allgather_": _Way("all_gather", "input_tensors", "output_tensors"),
    "_allgather_base_": _Way("all_gather", "input_tensor", "output_tensor"),
    "allgather_coalesced_": _Way("all_gather", "input_list", "output_lists"),
    "allgather_into_tensor_coalesced_": _Way("all_gather", "inputs", "outputs"),
    "reduce_scatter_": _Way("reduce_scatter", "output_tensors", "output_tensors"),
    "_reduce_scatter_base_": _Way("reduce_scatter", "output_tensor", "output_tensor"),
    "reduce_scatter_tensor_coalesced_": _Way("reduce_scatter", "outputs", "outputs"),
    "alltoall_": _Way("all_to_all", "input_tensors", "output_tensors"),
    "alltoall_base_": _Way("all_to_all", "input", "output"),
    "broadcast_": _Way("broadcast", "tensors", "tensors", "root_rank"),
    "reduce_": _Way("reduce", "tensors", peer="root_rank"),
    "gather_": _Way("gather", "input_tensors", peer="root_rank"),
    "scatter_": _Way("scatter", "output_tensors", peer="root_rank"),
    "barrier": _Way("barrier", ""),
    "monitored_barrier_": _Way("barrier", ""),
}

MOST_OUTPUTS = 1024


class KernelHook:
    """Kernels for the c10d operators that tell a recorder of each call."""

    name = "kernels"

    def __init__(self, recorder: OpRecorder, works: Works) -> None:
        """Puts them in place. Raises as torch does."""
        import torch

        self._recorder, self._works = recorder, works
        self._select = torch._C.DispatchKey.BackendSelect
        self._group = torch._C._distributed_c10d.ProcessGroup.unbox
        self._work = torch._C._distributed_c10d.Work.unbox
        self._libraries: list[Any] = []
        library: Any = torch.library.Library
        c10d = library("c10d", "IMPL")
        self._libraries.append(c10d)
        for name, way in OPERATORS.items():
            operator = getattr(torch.ops.c10d, name, None)
            if operator is not None:
                c10d.impl(name, self._kernel(operator.default, way), "BackendSelect", with_keyset=True)
        functional = library("_c10d_functional", "IMPL")
        self._libraries.append(functional)
        wait = torch.ops._c10d_functional.wait_tensor.default
        functional.impl(
            "wait_tensor", self._wait_kernel(wait, torch.Tensor), "BackendSelect", with_keyset=True
        )

    def remove(self) -> None:
        """Take the kernels away."""
        for library in self._libraries:
            library._destroy()

    def _kernel(self, operator: Any, way: _Way) -> Callable[..., Any]:
        names = [argument.name for argument in operator._schema.arguments]
        group_at = names.index("process_group")
        tensors_at = names.index(way.tensors) if way.tensors else -1
        output_at = names.index(way.output) if way.output else -1
        peer_at = names.index(way.peer) if way.peer else -1
        tag_at = names.index("tag") if "tag" in names else -1
        async_at = next((names.index(name) for name in ("async_op", "asyncOp") if name in names), -1)
        # Arguments at the end that have their default value do not come.
        is_async_default = operator._schema.arguments[async_at].default_value if async_at >= 0 else None
        returns = operator._schema.returns
        pass_on, select, recorder, kind = (
            operator._handle.redispatch_boxed,
            self._select,
            self._recorder,
            way.kind,
        )

        def begin(args: tuple[Any, ...], frame: Any) -> PendingOp | None:
            group: GroupFacts = recorder.group_of(self._group(args[group_at]))
            tensors = _flat(args[tensors_at]) if tensors_at >= 0 else ()
            if tensors and tensors[0].is_meta:
                return None
            return recorder.issued(
                kind, group,
                args[peer_at] if peer_at >= 0 else NOTHING,
                args[tag_at] if tag_at >= 0 else NOTHING,
                tensors,
                args[async_at] if 0 <= async_at < len(args) else is_async_default,
                frame,
            )  # fmt: skip

        def kernel(keys: Any, *args: Any) -> Any:
            pending = None
            if not recorder.is_off:
                try:
                    pending = begin(args, sys._getframe(1))
                except Exception as error:
                    recorder.switch_off("reading ops", error)
            if pending is not None and not returns:  # it waits here and now
                recorder.waiting(pending, sys._getframe(1))
            try:
                result = pass_on(keys.remove(select), *args)
            except BaseException as error:
                if pending is not None:
                    recorder.done(pending, error)
                raise
            if pending is not None:
                try:
                    if returns:
                        boxed = result[-1] if type(result) is tuple else result
                        self._follow(pending, boxed, args[output_at] if output_at >= 0 else None)
                    else:
                        recorder.done(pending)
                except Exception as error:
                    recorder.switch_off("following ops", error)
            return result

        return kernel

    def _follow(self, pending: PendingOp, boxed: Any, output: Any) -> None:
        work = self._work(boxed) if boxed is not None else None
        if work is None:
            return
        self._works.hand_over(work, pending)
        if output is not None:
            tensors = _flat(output)
            by_output = self._works.by_output
            if tensors:
                by_output[tensors[0].data_ptr()] = pending
                if len(by_output) > MOST_OUTPUTS:
                    by_output.pop(next(iter(by_output)), None)

    def _wait_kernel(self, operator: Any, plain: Any) -> Callable[..., Any]:
        pass_on, select, recorder = operator._handle.redispatch_boxed, self._select, self._recorder
        by_output = self._works.by_output

        def kernel(keys: Any, tensor: Any) -> Any:
            pending = None
            if by_output and type(tensor) is plain and not recorder.is_off:
                pending = by_output.pop(tensor.data_ptr(), None)
            if pending is None:
                return pass_on(keys.remove(select), tensor)
            recorder.waiting(pending, sys._getframe(1))
            try:
                result = pass_on(keys.remove(select), tensor)
            except BaseException as error:
                recorder.done(pending, error)
                raise
            if not pending.on_device:
                recorder.done(pending)
            return result

        return kernel


def _flat(value: Any) -> Any:
    """The tensors of an argument: a tensor, a list, or the first of a list of lists."""
    if type(value) is list:
        return value[0] if value and type(value[0]) is list else value
    return (value,)
