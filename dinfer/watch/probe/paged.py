"""Ready-made taps for the paged KV caches of vLLM and SGLang.

Rows are digested as the model gives them to the cache, and told by request and position in it, never by slot: where
blocks lie, that they move, and which requests share them does not matter, nor how a backend lays them out (one tensor
or two, heads before tokens or behind). Where the cache keeps them quantised, that is said. Of multi-head latent
attention the row is the latent with its rotated part.

Which request a row belongs to is what the engine's runner says: its ids and positions, for each step. Both go to the
host behind the digests; nothing waits. What is replayed by a CUDA graph runs no Python and is not seen: run eagerly.
A step of which nothing was seen is said.
"""

import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import wraps
from types import ModuleType
from typing import Any, NamedTuple

from .imports import ImportWatch
from .rows import LASTING_REQUEST
from .tensors import TensorWatch

VLLM_RUNNERS = {
    "vllm.v1.worker.gpu_model_runner": "_prepare_inputs",
    "vllm.v1.worker.gpu.model_runner": "prepare_inputs",
}
"""modules of its runners, and the method that makes a step's requests and positions, kept in the runner or returned"""

VLLM_BACKEND = "vllm.v1.attention.backend"
VLLM_BACKENDS = "vllm.v1.attention.backends"
"""a module, and a package of modules, whose classes write to the cache, in `do_kv_cache_update` or, before 0.14, in
`forward`"""

SGLANG_ATTENTION = "sglang.srt.layers.radix_attention"
SGLANG_RUNNER = "sglang.srt.model_executor.model_runner"
SGLANG_POOLS = tuple(
    f"sglang.srt.mem_cache.{name}"
    for name in (
        "memory_pool", "swa_memory_pool", "page_interleave_pool", "unified_memory_pool", "hisparse_memory_pool",
        "dsa_cache_layer_split", "qsa_kv_pool",
    )
)  # fmt: skip
SGLANG_SETTERS = ("set_kv_buffer", "set_mla_kv_buffer")

MOST_REQUESTS = 1 << 16
"""whose ids are remembered"""


class VllmStep(NamedTuple):
    """What a runner of vLLM runs at a time: the ids of its requests in their order; where the tokens of each begin,
    with the end behind; and each token's position. The tensors may be longer."""

    ids: Sequence[str]
    starts: Any
    positions: Any


class _Draft:
    """In place of a batch, while SGLang drafts: those layers are not the model's."""


class PagedCaches:
    """The taps of this process."""

    def __init__(self, tensors: TensorWatch, imports: ImportWatch) -> None:
        self._tensors = tensors
        self._now = threading.local()
        """of each thread: `step` of vLLM, `batch` of SGLang, and whether it `is_writing`"""
        self._numbers: dict[str, int] = {}
        self._next_number = 0
        self._layer_names: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
        """of vLLM, by their `impl`"""
        self._taken = 0
        for name in VLLM_RUNNERS:
            imports.add(name, self._guarded("vLLM", self._found_vllm_runner))
        imports.add(VLLM_BACKEND, self._guarded("vLLM", self._found_vllm))
        imports.add_within(VLLM_BACKENDS, self._guarded("vLLM", self._found_vllm))
        imports.add(SGLANG_RUNNER, self._guarded("SGLang", self._found_sglang_runner))
        imports.add(SGLANG_ATTENTION, self._guarded("SGLang", self._found_sglang_attention))
        for name in SGLANG_POOLS:
            imports.add(name, self._guarded("SGLang", self._found_sglang_pools))

    def _guarded(self, engine: str, act: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        def found(module: ModuleType) -> None:
            try:
                act(module)
            except Exception as error:
                self._tensors.problem(
                    f"the KV cache of {engine} is not tapped: {type(error).__name__}: {error}"
                )

        return found

    def _writing(
        self, engine: str, method: Callable[..., Any], take: Callable[[dict[str, Any]], None]
    ) -> Callable[..., Any]:
        """Calls `take` with a method's arguments by name, and then the method, which may scale them in place. Of calls
        within each other the outermost counts, which knows the layer best. The first that fails is the last."""
        is_off, signature, now = False, inspect.signature(method), self._now

        @wraps(method)
        def called(*args: Any, **options: Any) -> Any:
            nonlocal is_off
            if is_off or self._tensors.is_off or getattr(now, "is_writing", False):
                return method(*args, **options)
            try:
                take(signature.bind(*args, **options).arguments)
            except Exception as error:
                is_off = True
                text = f"the KV cache of {engine} is tapped no more: {type(error).__name__}: {error}"
                self._tensors.problem(text)
            now.is_writing = True
            try:
                return method(*args, **options)
            finally:
                now.is_writing = False

        return called

    def _take(self, k: Any, v: Any, layer: int | None, positions: Any, requests: Any) -> None:
        self._tensors.paged(k, v, layer, positions, requests)
        self._taken += 1

    # -- vLLM

    def _found_vllm_runner(self, module: ModuleType) -> None:
        kind, now = module.GPUModelRunner, self._now
        name = VLLM_RUNNERS[module.__name__]
        prepare, execute = getattr(kind, name), kind.execute_model

        @wraps(prepare)
        def prepared(runner: Any, *args: Any, **options: Any) -> Any:
            result = prepare(runner, *args, **options)
            try:
                now.step = _step_of(runner, result)
            except Exception as error:
                self._tensors.problem(f"vLLM's requests are not known: {type(error).__name__}: {error}")
            return result

        @wraps(execute)
        def executed(runner: Any, *args: Any, **options: Any) -> Any:
            before, now.step = self._taken, None
            try:
                result = execute(runner, *args, **options)
                if now.step is not None and before == self._taken:
                    self._tensors.problem(
                        "of a step of vLLM no KV was seen: its attention backend is none that is known, or it replays "
                        "a CUDA graph"
                    )
                return result
            finally:
                now.step = None

        self._tensors.replace(kind, name, prepared)
        self._tensors.replace(kind, "execute_model", executed)

    def _found_vllm(self, module: ModuleType) -> None:
        for kind in list(vars(module).values()):
            if not isinstance(kind, type) or kind.__module__ != module.__name__:
                continue
            update, forward = vars(kind).get("do_kv_cache_update"), vars(kind).get("forward")
            if inspect.isfunction(update):
                by = self._writing("vLLM", update, self._vllm_updated)
                self._tensors.replace(kind, "do_kv_cache_update", by)
            elif inspect.isfunction(forward) and kind.__name__.endswith("Impl") and _writes(kind, forward):
                self._tensors.replace(kind, "forward", self._writing("vLLM", forward, self._vllm_ran))

    def _vllm_updated(self, given: dict[str, Any]) -> None:
        context = sys.modules["vllm.forward_context"].get_forward_context()
        about = context.attn_metadata
        name = given["layer"].layer_name if "layer" in given else self._layer_name(given["self"], context)
        if isinstance(about, (list, tuple)):  # in speculative decoding the first is that of the model itself
            about = about[0]
        about = about.get(name) if isinstance(about, dict) else about
        self._vllm(name, given, given["slot_mapping"], about)

    def _vllm_ran(self, given: dict[str, Any]) -> None:
        about = given["attn_metadata"]
        if (
            getattr(given["self"], "kv_sharing_target_layer_name", None) is None
        ):  # else another layer writes for it
            self._vllm(given["layer"].layer_name, given, getattr(about, "slot_mapping", None), about)

    def _layer_name(self, impl: Any, context: Any) -> str:
        if impl not in self._layer_names:
            layers = context.no_compile_layers.items()
            names = (name for name, one in layers if getattr(one, "impl", None) is impl)
            if not (name := next(names, "")):
                raise LookupError(f"of which layer {type(impl).__name__} is, is not known")
            self._layer_names[impl] = name
        return self._layer_names[impl]

    def _vllm(self, layer: str, given: dict[str, Any], slots: Any, about: Any) -> None:
        latent = given.get("kv_c_normed", given.get("k_c_normed"))
        key, value = (given.get("key"), given.get("value")) if latent is None else (latent, given["k_pe"])
        if about is None or key is None or value is None or slots is None or not given["kv_cache"].numel():
            return  # a run that only measures memory, or attention that keeps no rows
        import torch

        stored = str(getattr(given["self"], "kv_cache_dtype", given.get("kv_cache_dtype", "auto")))
        if any(word in stored for word in ("fp8", "fp4", "int8", "int4")):
            self._tensors.problem(f"vLLM's KV cache is {stored}: rows are taken as they are before that")
        slots = slots.flatten()
        count = min(slots.shape[0], key.shape[0])
        token = torch.arange(count, device=slots.device, dtype=torch.int32)
        step = getattr(self._now, "step", None)
        if step is not None:
            starts = step.starts[: len(step.ids) + 1]
            request = _owner(torch, starts, token)
            position = step.positions[:count]
            requests = self._numbers_of(torch, step.ids, slots.device)[request]
        elif getattr(about, "block_table", None) is not None:
            self._tensors.problem(
                "vLLM's runner is not known: its requests are told by their first block, which confuses those that "
                "share it"
            )
            starts = about.query_start_loc
            request = _owner(torch, starts, token)
            position = about.seq_lens[request] - starts[request + 1] + token
            requests = about.block_table[request, 0]
        else:
            raise LookupError("its runner is not known, and nothing else tells the requests")
        if latent is not None:
            key = value = _latent_rows(torch, latent, value)
        position = torch.where(slots[:count] >= 0, position, -1)
        self._take(key[:count], value[:count], layer_number(layer), position, requests)

    def _numbers_of(self, torch: Any, ids: Sequence[str], device: Any) -> Any:
        """A number for each request, on the device, without waiting for it."""
        for one in ids:
            if one not in self._numbers:
                self._numbers[one] = self._next_number = self._next_number + 1
                if len(self._numbers) > MOST_REQUESTS:
                    self._numbers.pop(next(iter(self._numbers)))
        numbers = [LASTING_REQUEST + self._numbers[one] for one in ids]
        return torch.tensor(numbers).to(device, non_blocking=True)

    # -- SGLang

    def _found_sglang_runner(self, module: ModuleType) -> None:
        kind, now = module.ModelRunner, self._now
        forward = kind.forward

        @wraps(forward)
        def called(runner: Any, forward_batch: Any, *args: Any, **options: Any) -> Any:
            is_draft = bool(getattr(runner, "is_draft_worker", False))
            outer, before = getattr(now, "batch", None), self._taken
            now.batch = _Draft() if is_draft else forward_batch
            try:
                result = forward(runner, forward_batch, *args, **options)
            finally:
                now.batch = outer
            if before == self._taken and not is_draft and not self._is_idle(forward_batch):
                pool = type(getattr(runner, "token_to_kv_pool", None)).__name__
                self._tensors.problem(
                    f"of a step of SGLang no KV was seen: its pool {pool} is none that is known, or it replays a "
                    "CUDA graph"
                )
            return result

        self._tensors.replace(kind, "forward", called)

    @staticmethod
    def _is_idle(batch: Any) -> bool:
        """A rank without requests, which takes part only in collectives."""
        is_idle = getattr(getattr(batch, "forward_mode", None), "is_idle", None)
        return bool(is_idle and is_idle())

    def _found_sglang_attention(self, module: ModuleType) -> None:
        kind, now = module.RadixAttention, self._now
        forward = kind.forward

        @wraps(forward)
        def called(layer: Any, q: Any, k: Any, v: Any, forward_batch: Any, *args: Any, **options: Any) -> Any:
            outer = getattr(now, "batch", None)
            if not isinstance(outer, _Draft):
                now.batch = forward_batch
            try:
                return forward(layer, q, k, v, forward_batch, *args, **options)
            finally:
                now.batch = outer

        self._tensors.replace(kind, "forward", called)

    def _found_sglang_pools(self, module: ModuleType) -> None:
        kinds = [
            kind
            for kind in list(vars(module).values())
            if isinstance(kind, type) and kind.__module__ == module.__name__
        ]
        setters = [(kind, name) for kind in kinds for name in SGLANG_SETTERS if name in vars(kind)]
        if not setters and module.__name__ == SGLANG_POOLS[0]:
            raise AttributeError(f"{module.__name__} has no class with {' or '.join(SGLANG_SETTERS)}")
        for kind, name in setters:
            method = vars(kind)[name]
            if not getattr(method, "__isabstractmethod__", False):
                self._tensors.replace(kind, name, self._writing("SGLang", method, self._sglang_set))

    def _sglang_set(self, given: dict[str, Any]) -> None:
        layer, pool = given["layer"], given["self"]
        if getattr(layer, "is_cross_attention", False):
            return  # rows of what was encoded, which are no tokens of the request
        loc = given["loc_info" if "loc_info" in given else "loc"]
        batch = getattr(self._now, "batch", None)
        if isinstance(batch, _Draft):
            return
        if batch is None:
            raise LookupError("rows were written outside a step of the model: their requests are not known")
        import torch

        if "cache_k_nope" in given:
            k = v = _latent_rows(torch, given["cache_k_nope"], given["cache_k_rope"])
        elif getattr(pool, "use_mla", hasattr(pool, "kv_lora_rank")):
            k = v = given["cache_k"]
        else:
            k, v = given["cache_k"], given["cache_v"]
        stored = getattr(pool, "dtype", None)
        if "FP4" in type(pool).__name__ or (stored is not None and stored.itemsize < k.dtype.itemsize):
            stored = "FP4" if "FP4" in type(pool).__name__ else str(stored).removeprefix("torch.")
            self._tensors.problem(
                f"SGLang's {type(pool).__name__} is {stored}: rows are taken as they are before that"
            )
        if getattr(given.get("k_scale"), "ndim", 0):
            self._tensors.problem(
                f"SGLang's {type(pool).__name__} is given scales of rows: only the rows are taken"
            )
        # As layers of a hybrid model are numbered within their pool, the layer's own number comes first.
        number = getattr(layer, "layer_id", None)
        number = given.get("layer_id_override") if number is None else number
        slots = getattr(loc, "loc", loc)
        position, requests = batch.positions, batch.req_pool_indices
        if slots.shape[0] > position.shape[0]:
            raise LookupError(f"{slots.shape[0]} rows were written in a step of {position.shape[0]} tokens")
        count = min(slots.shape[0], k.shape[0])
        lengths = getattr(batch, "extend_seq_lens", None)
        if lengths is None or batch.forward_mode.is_decode():
            request = torch.arange(count, device=requests.device) % len(requests)
        else:
            token = torch.arange(count, device=lengths.device, dtype=torch.int64)
            ends = lengths.to(torch.int64).cumsum(0)
            request = torch.searchsorted(ends, token, right=True).clamp(max=len(requests) - 1)
        own = torch.where(slots[:count] > 0, position[:count], -1)  # slot 0 takes what is only padding
        if (mask := given.get("dcp_kv_mask")) is not None:  # other ranks keep the rest
            own = torch.where(mask[:count].bool(), own, -1)
        self._take(k[:count], v[:count], number, own, requests[request])


def _step_of(runner: Any, returned: Any) -> VllmStep:
    """What is being run, as the newer runner returns it, or as the older one keeps it."""
    batch = returned if hasattr(returned, "query_start_loc") else runner.input_batch
    held = returned if batch is returned else runner
    ids = list(batch.req_ids[: batch.num_reqs])
    starts, positions = (getattr(one, "gpu", one) for one in (held.query_start_loc, held.positions))
    return VllmStep(ids, starts, positions)


def _owner(torch: Any, starts: Any, token: Any) -> Any:
    """Whose each token is, where those of each begin at `starts`."""
    return (torch.searchsorted(starts, token.to(starts.dtype), right=True) - 1).clamp(0, len(starts) - 2)


def _latent_rows(torch: Any, latent: Any, rotated: Any) -> Any:
    """[tokens, 1, width] of what latent attention keeps: the latent and, behind it, the part with positions."""
    parts = [one.reshape(one.shape[0], 1, -1) for one in (latent, rotated) if one is not None and one.numel()]
    return torch.cat(parts, -1)


def _writes(kind: type[Any], forward: Callable[..., Any]) -> bool:
    """Whether it is given what it would write, and writes by itself."""
    names = inspect.signature(forward).parameters
    return {"layer", "kv_cache", "attn_metadata"} <= set(names) and not hasattr(kind, "do_kv_cache_update")


def layer_number(name: str) -> int | None:
    """The layer that a module's name tells: of `model.layers.3.self_attn.attn` 3."""
    return next((int(part) for part in str(name).split(".") if part.isdigit()), None)
