"""Sees ops by kernels of their own in torch's dispatcher, put in front of the c10d operators' kernels of all devices.

This sees names that were imported early, `batch_isend_irecv`, functional collectives, other threads, inference mode and
`group.send`; not what calls a backend itself (`group._get_backend(…).send`) or NCCL.

The kernels stand at the key BackendSelect, which every call with tensors passes on its way to its device. So nothing is
replaced, and passing on is a redispatch, which releases the GIL. (Calling a replaced kernel from Python would hold it
while a communicator is being made: then the process could not be looked into, and two of its threads could block each
other.)
"""

import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from .patched import MESSAGES as METHODS_FOR_MESSAGES
from .patched import PatchedMethods
from .recorder import OpRecorder, PendingOp
from .records import NOTHING
from .works import Works, flat, is_uneven


class OperatorArguments(NamedTuple):
    """Where in the arguments of an operator the facts are."""

    kind: str
    tensors: str
    """the argument with the tensors whose shape and size are recorded"""
    output: str = ""
    """the argument with the tensor that a functional collective returns, by which it is waited for"""
    peer: str = ""
    parts: str = ""
    """the argument with one tensor for each rank, where backends for devices admit these to differ"""
    placeholder: str = ""
    """the argument with a tensor that only says which device"""


OPERATORS = {
    "send": OperatorArguments("send", "tensors", peer="dst"),
    "recv_": OperatorArguments("recv", "tensors", peer="src"),
    "recv_any_source_": OperatorArguments("recv", "tensors"),
    "allreduce_": OperatorArguments("all_reduce", "tensors", "tensors"),
    "allreduce_coalesced_": OperatorArguments("all_reduce", "tensors", "tensors"),
    "allgather_": OperatorArguments("all_gather", "input_tensors", "output_tensors", parts="output_tensors"),
    "_allgather_base_": OperatorArguments("all_gather", "input_tensor", "output_tensor"),
    "allgather_coalesced_": OperatorArguments("all_gather", "input_list", "output_lists"),
    "allgather_into_tensor_coalesced_": OperatorArguments("all_gather", "inputs", "outputs"),
    "reduce_scatter_": OperatorArguments(
        "reduce_scatter", "output_tensors", "output_tensors", parts="input_tensors"
    ),
    "_reduce_scatter_base_": OperatorArguments("reduce_scatter", "output_tensor", "output_tensor"),
    "reduce_scatter_tensor_coalesced_": OperatorArguments("reduce_scatter", "outputs", "outputs"),
    "alltoall_": OperatorArguments("all_to_all", "input_tensors", "output_tensors"),
    "alltoall_base_": OperatorArguments("all_to_all", "input", "output"),
    "broadcast_": OperatorArguments("broadcast", "tensors", "tensors", "root_rank"),
    "reduce_": OperatorArguments("reduce", "tensors", peer="root_rank"),
    "gather_": OperatorArguments("gather", "input_tensors", peer="root_rank"),
    "scatter_": OperatorArguments("scatter", "output_tensors", peer="root_rank"),
    "barrier": OperatorArguments("barrier", "", placeholder="tensor"),
    "monitored_barrier_": OperatorArguments("barrier", "", placeholder="tensor"),
}


MESSAGES = ("send", "recv_", "recv_any_source_")
"""operators that all of `torch.distributed` reaches by methods of process groups, at which to see them costs half"""

FUNCTIONAL_MESSAGES = ("isend", "irecv", "batch_p2p_ops")
"""functional operators, of newer torch, that call the operators for messages without these methods"""


class KernelHook:
    """Kernels for the c10d operators that tell a recorder of each call; of messages, methods of process groups do."""

    name = "kernels"

    def __init__(self, recorder: OpRecorder, works: Works) -> None:
        """Puts them in place. Raises as torch does."""
        import torch

        self._recorder, self._works = recorder, works
        self._select = torch._C.DispatchKey.BackendSelect
        self._group = torch._C._distributed_c10d.ProcessGroup.unbox
        self._work = torch._C._distributed_c10d.Work.unbox
        self._libraries: list[Any] = []
        self._methods: PatchedMethods | None = None
        self._sees_all = False
        try:
            self._place(torch)
        except BaseException:
            self.remove()  # else ops would be seen twice, by whatever else sees them
            raise

    def _place(self, torch: Any) -> None:
        library: Any = torch.library.Library
        self._libraries.append(library("c10d", "IMPL"))
        self._place_kernels(name for name in OPERATORS if name not in MESSAGES)
        functional = library("_c10d_functional", "IMPL")
        self._libraries.append(functional)
        for name in FUNCTIONAL_MESSAGES:
            operator = getattr(torch.ops._c10d_functional, name, None)
            if operator is not None:
                by = self._functional_message(operator.default)
                functional.impl(name, by, "BackendSelect", with_keyset=True)
        wait = torch.ops._c10d_functional.wait_tensor.default
        functional.impl(
            "wait_tensor", self._wait_kernel(wait, torch.Tensor), "BackendSelect", with_keyset=True
        )

        self._methods = PatchedMethods(self._recorder, self._works, METHODS_FOR_MESSAGES)

    def _place_kernels(self, names: Iterable[str]) -> None:
        import torch

        for name in names:
            operator = getattr(torch.ops.c10d, name, None)
            if operator is not None:
                by = self._kernel(operator.default, OPERATORS[name])
                self._libraries[0].impl(name, by, "BackendSelect", with_keyset=True)

    def _functional_message(self, operator: Any) -> Callable[..., Any]:
        """At the first of them kernels are put in place for messages, too."""
        pass_on, select, recorder = operator._handle.redispatch_boxed, self._select, self._recorder

        def kernel(keys: Any, *args: Any) -> Any:
            try:
                if not self._sees_all and not recorder.is_off:
                    with recorder.placing:
                        if not self._sees_all:
                            self._place_kernels(MESSAGES)
                            self._sees_all = True
            except Exception as error:
                recorder.switch_off("seeing functional messages", error)
            return pass_on(keys.remove(select), *args)

        return kernel

    def remove(self) -> None:
        """Take the kernels away."""
        if self._methods is not None:
            self._methods.remove()
        for library in self._libraries:
            library._destroy()

    def _kernel(self, operator: Any, where: OperatorArguments) -> Callable[..., Any]:
        names = [argument.name for argument in operator._schema.arguments]

        def at(name: str) -> int:
            return names.index(name) if name in names else -1

        group_at, tensors_at, output_at = at("process_group"), at(where.tensors), at(where.output)
        peer_at, tag_at, parts_at, placeholder_at = (
            at(where.peer), at("tag"), at(where.parts), at(where.placeholder),
        )  # fmt: skip
        async_at = max(at("async_op"), at("asyncOp"))
        # Arguments at the end that have their default value do not come.
        is_async_default = operator._schema.arguments[async_at].default_value if async_at >= 0 else None
        returns = operator._schema.returns
        pass_on, select, recorder, works = (
            operator._handle.redispatch_boxed, self._select, self._recorder, self._works,
        )  # fmt: skip
        unbox_group, unbox_work, kind = self._group, self._work, where.kind
        passing = self._methods.passing if self._methods is not None else None

        below: dict[int, Any] = {}

        def next_keys(keys: Any) -> Any:
            """The keys behind this kernel's: to look them up takes a third of the time."""
            raw = keys.raw_repr()
            found = below.get(raw)
            if found is None:
                found = below[raw] = keys.remove(select)
            return found

        def async_op(args: tuple[Any, ...]) -> Any:
            return args[async_at] if 0 <= async_at < len(args) else is_async_default

        def begin(args: tuple[Any, ...], frame: Any) -> PendingOp | None:
            tensors = flat(args[tensors_at]) if tensors_at >= 0 else ()
            sized = flat(args[parts_at]) if parts_at >= 0 and tensors and not tensors[0].is_cpu else ()
            return recorder.issued(
                kind, recorder.group_of(unbox_group(args[group_at])),
                args[peer_at] if peer_at >= 0 else NOTHING,
                args[tag_at] if tag_at >= 0 else NOTHING,
                tensors,
                async_op(args) if async_at >= 0 else None,
                frame,
                args[placeholder_at] if placeholder_at >= 0 else None,
                sized if sized and is_uneven(sized) else (),
            )  # fmt: skip

        def follow(pending: PendingOp, result: Any, args: tuple[Any, ...]) -> None:
            boxed = result[-1] if type(result) is tuple else result
            work = unbox_work(boxed) if boxed is not None else None
            if work is None:
                first = flat(args[tensors_at])[0] if tensors_at >= 0 else args[placeholder_at]
                works.without_work(pending, first)
                return
            works.hand_over(work, pending)
            if output_at >= 0 and async_op(args) is not False:  # else nobody waits by the output
                works.keep_output(flat(args[output_at]), pending)

        def kernel(keys: Any, *args: Any) -> Any:
            frame = sys._getframe(1)
            if recorder.is_off or frame.f_code is passing:
                return pass_on(next_keys(keys), *args)
            pending = None
            try:
                pending = begin(args, frame)
            except Exception as error:
                recorder.switch_off("reading ops", error)
            try:
                result = pass_on(next_keys(keys), *args)
            except BaseException as error:
                if pending is not None and returns:
                    recorder.not_issued(pending, error)
                elif pending is not None:
                    recorder.done(pending, error)
                raise
            if pending is not None:
                try:
                    if returns:
                        follow(pending, result, args)
                    else:  # it has waited
                        recorder.done(pending)
                except Exception as error:
                    recorder.switch_off("following ops", error)
            return result

        return kernel

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
