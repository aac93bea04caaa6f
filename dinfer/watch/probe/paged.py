"""Ready-made taps for the paged KV caches of vLLM and SGLang.

Rows are digested as they are written, and told by request and position in it, never by slot: where blocks lie, and that
they move, does not matter. Requests and positions are computed on the device from what the engine has there, and go to
the host behind it; nothing waits. What is replayed by a CUDA graph runs no Python and is not seen: run eagerly.
"""

import inspect
import sys
import threading
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

from .imports import ImportWatch
from .tensors import TensorWatch

VLLM_BACKENDS = tuple(
    f"vllm.v1.attention.backends.{name}"
    for name in ("flash_attn", "triton_attn", "flex_attention", "cpu_attn")
)
SGLANG_ATTENTION = "sglang.srt.layers.radix_attention"
SGLANG_POOL = "sglang.srt.mem_cache.memory_pool"


class PagedCaches:
    """The taps of this process."""

    def __init__(self, tensors: TensorWatch, imports: ImportWatch) -> None:
        self._tensors = tensors
        self._batch = threading.local()
        for name in VLLM_BACKENDS:
            imports.add(name, self._guarded("vLLM", self._found_vllm))
        imports.add(SGLANG_ATTENTION, self._guarded("SGLang", self._found_sglang_attention))
        imports.add(SGLANG_POOL, self._guarded("SGLang", self._found_sglang_pool))

    def _guarded(self, engine: str, act: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        def found(module: ModuleType) -> None:
            try:
                act(module)
            except Exception as error:
                self._tensors.problem(
                    f"the KV cache of {engine} is not tapped: {type(error).__name__}: {error}"
                )

        return found

    def _after(
        self, engine: str, method: Callable[..., Any], take: Callable[[dict[str, Any]], None]
    ) -> Callable[..., Any]:
        """Calls a method, and then `take` with its arguments by name. The first that fails is the last."""
        is_off, signature = False, inspect.signature(method)

        @wraps(method)
        def called(*args: Any, **options: Any) -> Any:
            nonlocal is_off
            result = method(*args, **options)
            if not is_off and not self._tensors.is_off:
                try:
                    take(signature.bind(*args, **options).arguments)
                except Exception as error:
                    is_off = True
                    text = f"the KV cache of {engine} is tapped no more: {type(error).__name__}: {error}"
                    self._tensors.problem(text)
            return result

        return called

    # -- vLLM

    def _found_vllm(self, module: ModuleType) -> None:
        for kind in list(vars(module).values()):
            if not isinstance(kind, type) or kind.__module__ != module.__name__:
                continue
            update, forward = vars(kind).get("do_kv_cache_update"), vars(kind).get("forward")
            if update is not None:
                by = self._after("vLLM", update, self._vllm_updated)
                self._tensors.replace(kind, "do_kv_cache_update", by)
            elif forward is not None and kind.__name__.endswith("Impl"):  # before 0.14, which wrote there
                self._tensors.replace(kind, "forward", self._after("vLLM", forward, self._vllm_ran))

    def _vllm_updated(self, given: dict[str, Any]) -> None:
        context = sys.modules["vllm.forward_context"].get_forward_context()
        about, layer = context.attn_metadata, given["layer"]
        if isinstance(about, (list, tuple)):  # in speculative decoding the first is that of the model itself
            about = about[0]
        about = about.get(layer.layer_name) if isinstance(about, dict) else about
        self._vllm(layer, given["key"], given["value"], given["kv_cache"], given["slot_mapping"], about)

    def _vllm_ran(self, given: dict[str, Any]) -> None:
        about = given["attn_metadata"]
        slots = getattr(about, "slot_mapping", None)
        self._vllm(given["layer"], given["key"], given["value"], given["kv_cache"], slots, about)

    def _vllm(self, layer: Any, key: Any, value: Any, kv_cache: Any, slots: Any, about: Any) -> None:
        if about is None or key is None or value is None or slots is None or not kv_cache.numel():
            return  # a run that only measures memory, or attention that keeps no rows
        import torch

        count = min(slots.shape[0], key.shape[0])
        starts = about.query_start_loc
        token = torch.arange(count, device=starts.device, dtype=starts.dtype)
        request = (torch.searchsorted(starts, token, right=True) - 1).clamp(0, len(starts) - 2)
        position = about.seq_lens[request] - starts[request + 1] + token
        position = torch.where(slots[:count] >= 0, position, -1)
        first_block = about.block_table[request, 0]
        self._tensors.paged(key[:count], value[:count], layer_number(layer.layer_name), position, first_block)

    # -- SGLang

    def _found_sglang_attention(self, module: ModuleType) -> None:
        kind = module.RadixAttention
        forward, batch = kind.forward, self._batch

        @wraps(forward)
        def called(layer: Any, q: Any, k: Any, v: Any, forward_batch: Any, *args: Any, **options: Any) -> Any:
            batch.current = forward_batch
            try:
                return forward(layer, q, k, v, forward_batch, *args, **options)
            finally:
                batch.current = None

        self._tensors.replace(kind, "forward", called)

    def _found_sglang_pool(self, module: ModuleType) -> None:
        kind = module.MHATokenToKVPool
        by = self._after("SGLang", kind.set_kv_buffer, self._sglang_set)
        self._tensors.replace(kind, "set_kv_buffer", by)

    def _sglang_set(self, given: dict[str, Any]) -> None:
        layer, cache_k, cache_v = given["layer"], given["cache_k"], given["cache_v"]
        loc = given["loc_info" if "loc_info" in given else "loc"]
        batch = getattr(self._batch, "current", None)
        if batch is None:
            raise LookupError(
                "rows were written outside RadixAttention.forward: their requests are not known"
            )
        import torch

        # As layers of a hybrid model are numbered within their pool, the layer's own number comes first.
        number = getattr(layer, "layer_id", None)
        number = given.get("layer_id_override") if number is None else number
        slots = getattr(loc, "loc", loc)
        position, requests = batch.positions, batch.req_pool_indices
        count = min(slots.shape[0], cache_k.shape[0], position.shape[0])
        lengths = getattr(batch, "extend_seq_lens", None)
        if lengths is None or batch.forward_mode.is_decode():
            request = torch.arange(count, device=requests.device) % len(requests)
        else:
            token = torch.arange(count, device=lengths.device, dtype=torch.int64)
            ends = lengths.to(torch.int64).cumsum(0)
            request = torch.searchsorted(ends, token, right=True).clamp(max=len(requests) - 1)
        own = torch.where(slots[:count] > 0, position[:count], -1)  # slot 0 takes what is only padding
        self._tensors.paged(cache_k[:count], cache_v[:count], number, own, requests[request])


def layer_number(name: str) -> int | None:
    """The layer that a module's name tells: of `model.layers.3.self_attn.attn` 3."""
    return next((int(part) for part in str(name).split(".") if part.isdigit()), None)
