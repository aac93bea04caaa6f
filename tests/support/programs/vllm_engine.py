"""Requests to a real vLLM on CPUs: `dinfer watch -- PYTHON vllm_engine.py MODEL OUT GIVEN`, where PYTHON has vLLM.
`GIVEN`, in JSON: `engine`, what `vllm.LLM` takes besides; `waves`, whose prompts (token ids) come together; `new`,
tokens of each; and `changed` [request, layer, position], a row of K that is changed before it is written.

Writes what the engine put into its KV cache: each row, as the backend's writer was handed it for the slot that vLLM's
own block manager names for that request and position in that step. With `RANK` set it is one of several data-parallel
engines, which torchrun has started; each writes to a file of its own.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}

import torch
import vllm
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLAImpl

Row = tuple[torch.Tensor, torch.Tensor]
"""K and V of one token: [heads, width] each"""


class Spy:
    """Of an engine: `held` by request, layer and position, and which requests were preempted."""

    def __init__(self, llm: Any, changed: list[Any]) -> None:
        core = llm.llm_engine.engine_core.engine_core
        self.held: dict[str, dict[str, dict[int, Row]]] = {}
        self.preempted: set[str] = set()
        self._scheduler, self._changed = core.scheduler, changed
        self._groups = core.scheduler.kv_cache_manager.coordinator.kv_cache_config.kv_cache_groups
        context = core.model_executor.driver_worker.worker.model_runner.vllm_config.compilation_config
        self._names = {id(layer.impl): name for name, layer in context.static_forward_context.items()}
        self._written: dict[str, dict[int, Row]] = {}
        self._slots: dict[str, list[int]] = {}
        """by layer, that of each token of this step"""
        CPUAttentionBackendImpl.do_kv_cache_update = self._spied(CPUAttentionBackendImpl.do_kv_cache_update)
        CPUMLAImpl.do_kv_cache_update = self._spied_latent(CPUMLAImpl.do_kv_cache_update)
        core.model_executor.execute_model = self._stepped(core.model_executor.execute_model)

    def _spied(self, write: Any) -> Any:
        def called(
            impl: Any, layer: Any, key: torch.Tensor, value: torch.Tensor, cache: Any, slots: torch.Tensor
        ) -> Any:
            self._change(layer.layer_name, key, slots)
            self._wrote(layer.layer_name, key, value, slots)
            return write(impl, layer, key, value, cache, slots)

        return called

    def _spied_latent(self, write: Any) -> Any:
        def called(
            impl: Any, latent: torch.Tensor, rotated: torch.Tensor, cache: Any, slots: Any, *more: Any
        ) -> Any:
            row = torch.cat([latent, rotated.squeeze(1)], -1)[:, None]
            self._wrote(self._names[id(impl)], row, row, slots)
            return write(impl, latent, rotated, cache, slots, *more)

        return called

    def _wrote(self, layer: str, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        rows = zip(slots.flatten().tolist(), key.clone(), value.clone(), strict=False)
        self._written.setdefault(layer, {}).update({slot: (k, v) for slot, k, v in rows})

    def _change(self, layer: str, key: torch.Tensor, slots: torch.Tensor) -> None:
        if not self._changed or f".{self._changed[1]}." not in layer:
            return
        request, _, position = self._changed
        slot = self._slot(layer, list(self._scheduler.requests)[request], position)
        key[slots.flatten() == slot] += 1

    def _slot(self, layer: str, request: str, position: int) -> int:
        tables = self._scheduler.kv_cache_manager.get_block_ids(request)
        at = next(at for at, group in enumerate(self._groups) if layer in group.layer_names)
        size = self._groups[at].kv_cache_spec.block_size
        block, within = divmod(position, size)
        return tables[at][block] * size + within if block < len(tables[at]) else -1

    def _stepped(self, execute: Any) -> Any:
        def called(scheduled: Any, *args: Any, **options: Any) -> Any:
            self._written.clear()
            result = execute(scheduled, *args, **options)
            self.preempted.update(scheduled.preempted_req_ids or ())
            for request, count in scheduled.num_scheduled_tokens.items():
                end = self._scheduler.requests[request].num_computed_tokens  # with those of this step
                for layer, rows in self._written.items():
                    held = self.held.setdefault(request, {}).setdefault(layer, {})
                    held.update({at: rows[self._slot(layer, request, at)] for at in range(end - count, end)})
            return result

        return called


def main() -> None:
    model, out, given = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    engine = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "block_size": 32,
        "max_num_seqs": 4,
    }
    engine |= {"enable_prefix_caching": False, "skip_tokenizer_init": True, **given["engine"]}
    llm = vllm.LLM(model, **engine)
    rank = int(os.environ.get("RANK", "0"))
    spy = Spy(llm, given.get("changed", []) if rank else [])
    for wave in given["waves"]:
        prompts = [{"prompt_token_ids": prompt} for prompt in wave]
        params = vllm.SamplingParams(
            max_tokens=given["new"], temperature=0, ignore_eos=True, detokenize=False
        )
        llm.generate(prompts, params, use_tqdm=False)
    torch.save({"held": list(spy.held.values()), "preempted": len(spy.preempted)}, f"{out}.{rank}")


if __name__ == "__main__":
    main()
