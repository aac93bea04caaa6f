"""The taps of vLLM's and SGLang's paged KV caches, on stand-ins with the names and parameters of their sources."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dinfer.watch.probe.digests import token_digests
from dinfer.watch.probe.paged import layer_number
from dinfer.watch.probe.reading import read
from dinfer.watch.probe.rows import RowsTaken, read_rows
from dinfer.watch.probe.start import Probe
from dinfer.watching.held_rows import layers_of
from dinfer.watching.kv import WatchedKv

HEADS, WIDTH, BLOCK = 2, 4, 4

VLLM = """
class FlashAttentionImpl:
    attn_type = "decoder"

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output=None):
        return output

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping):
        slots = slot_mapping[slot_mapping >= 0]
        kv_cache[0].view(-1, *key.shape[1:])[slots] = key[: len(slot_mapping)][slot_mapping >= 0]
        kv_cache[1].view(-1, *key.shape[1:])[slots] = value[: len(slot_mapping)][slot_mapping >= 0]
"""
VLLM_BEFORE = """
class FlashAttentionImpl:
    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output=None, output_scale=None):
        slots = attn_metadata.slot_mapping
        kv_cache[0].view(-1, *key.shape[1:])[slots] = key[: len(slots)]
        kv_cache[1].view(-1, *key.shape[1:])[slots] = value[: len(slots)]
        return output
"""
SGLANG_POOL = """
class MHATokenToKVPool:
    def __init__(self, size, heads, width):
        import torch
        self.k, self.v = torch.zeros(2, size, heads, width)

    def set_kv_buffer(self, layer, loc_info, cache_k, cache_v, k_scale=None, v_scale=None, layer_id_override=None):
        loc = getattr(loc_info, "loc", loc_info)
        self.k[loc], self.v[loc] = cache_k, cache_v
"""
SGLANG_ATTENTION = """
class RadixAttention:
    def __init__(self, layer_id):
        self.layer_id = layer_id

    def forward(self, q, k, v, forward_batch, save_kv_cache=True, **kwargs):
        forward_batch.token_to_kv_pool.set_kv_buffer(self, forward_batch.out_cache_loc, k, v)
        return q
"""


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], ModuleType]:
    """Makes a module, as if it were installed."""

    def made(name: str, source: str) -> ModuleType:
        found = ModuleType(name)
        found.__spec__ = ModuleSpec(name, None)
        exec(source, found.__dict__)
        monkeypatch.setitem(sys.modules, name, found)
        return found

    return made


@pytest.fixture
def watched(tmp_path: Path) -> Callable[..., list[RowsTaken]]:
    """Runs something under watch; the rows that were taken. `problems`: what is said of them."""
    numbers = itertools.count()

    def run(act: Callable[[], object], problems: Sequence[str] = ()) -> list[RowsTaken]:
        folder = tmp_path / str(next(numbers))
        probe = Probe(folder)
        try:
            act()
        finally:
            probe.stop()
        if not folder.exists():  # nothing was recorded
            return []
        (process,) = read(folder)
        assert len(process.problems) == len(problems)
        assert all(part in text for part, text in zip(problems, process.problems, strict=True))
        return read_rows(folder, process)

    return run


def expected(k: Tensor, v: Tensor) -> list[tuple[int, int]]:
    """Digests of [tokens, heads, width]."""
    mask = 2**64 - 1
    both = zip(*(token_digests(one.transpose(0, 1)).tolist() for one in (k, v)), strict=True)
    return [(one & mask, other & mask) for one, other in both]


def rows_of(tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    found = torch.randn(2, tokens, HEADS, WIDTH, generator=torch.manual_seed(seed))
    return found[0], found[1]


class Step:
    """One step of an engine: some requests, each with `counts` new tokens behind `before`, in these blocks."""

    def __init__(
        self, before: Sequence[int], counts: Sequence[int], blocks: Sequence[Sequence[int]], pad: int = 0
    ) -> None:
        self.slots = torch.tensor(
            [
                table[(start + n) // BLOCK] * BLOCK + (start + n) % BLOCK
                for start, count, table in zip(before, counts, blocks, strict=True)
                for n in range(count)
            ]
            + [-1] * pad
        )
        self.positions = torch.tensor(
            [start + n for start, count in zip(before, counts, strict=True) for n in range(count)] + [0] * pad
        )
        widest = max(map(len, blocks))
        ends = torch.tensor(counts).cumsum(0).tolist()
        self.about = SimpleNamespace(
            slot_mapping=self.slots,
            query_start_loc=torch.tensor([0, *ends], dtype=torch.int32),
            seq_lens=torch.tensor(
                [start + count for start, count in zip(before, counts, strict=True)], dtype=torch.int32
            ),
            block_table=torch.tensor(
                [[*table, *[0] * (widest - len(table))] for table in blocks], dtype=torch.int32
            ),
        )


def in_vllm(impl: Any, step: Step, k: Tensor, v: Tensor, cache: Tensor, layer: int, is_new: bool) -> None:
    """As vLLM calls it: key and value are padded, slots are not, or with -1."""
    module: Any = sys.modules["vllm.forward_context"]
    own = SimpleNamespace(layer_name=f"model.layers.{layer}.self_attn.attn")
    context = SimpleNamespace(attn_metadata={own.layer_name: step.about})
    module.get_forward_context = lambda: context
    k, v = (torch.cat([one, torch.full((3, HEADS, WIDTH), 7.0)]) for one in (k, v))
    if is_new:
        impl.do_kv_cache_update(own, k, v, cache, step.slots)
    else:
        impl.forward(own, k, k, v, cache, step.about)


@pytest.mark.parametrize("is_new", [True, False], ids=["do_kv_cache_update", "forward"])
@pytest.mark.parametrize("name", ["flash_attn", "triton_attn"])
def test_vllm_s_rows_are_told_by_request_and_position(
    name: str,
    is_new: bool,
    module: Callable[[str, str], ModuleType],
    watched: Callable[..., list[RowsTaken]],
) -> None:
    module("vllm.forward_context", "")
    backend = module(f"vllm.v1.attention.backends.{name}", VLLM if is_new else VLLM_BEFORE)
    first, second, third = rows_of(5, 1), rows_of(3, 2), rows_of(2, 3)

    def run(blocks: Sequence[Sequence[int]]) -> Callable[[], None]:
        def act() -> None:
            impl, cache = backend.FlashAttentionImpl(), torch.zeros(2, 16, BLOCK, HEADS, WIDTH)
            pad = 1 if is_new else 0
            both = [torch.cat([one, other]) for one, other in zip(first, second, strict=True)]
            in_vllm(impl, Step([0, 0], [5, 3], blocks, pad), both[0], both[1], cache, 2, is_new)
            both = [torch.cat([one[:1], one[1:]]) for one in third]  # one more token of each
            in_vllm(impl, Step([5, 3], [1, 1], blocks), both[0], both[1], cache, 2, is_new)
            assert torch.equal(cache[0].view(-1, HEADS, WIDTH)[blocks[0][0] * BLOCK], first[0][0])

        return act

    here, there = watched(run([[3, 5], [8]])), watched(run([[9, 1], [4]]))
    kv = WatchedKv({0: layers_of(here), 1: layers_of(there)})
    assert kv.diff() == []
    assert kv.table().rows == [("2", "0", "6", "6"), ("2", "1", "4", "4")]
    mine = [*expected(*first), *expected(third[0][:1], third[1][:1])]
    assert list(kv.layers[0][2, 0].rows.values()) == mine


def test_a_row_that_differs_in_vllm_is_named(
    module: Callable[[str, str], ModuleType], watched: Callable[..., list[RowsTaken]]
) -> None:
    module("vllm.forward_context", "")
    backend = module("vllm.v1.attention.backends.flash_attn", VLLM)
    k, v = rows_of(6, 1)

    def run(k: Tensor, block: int) -> Callable[[], None]:
        return lambda: in_vllm(
            backend.FlashAttentionImpl(), Step([0], [6], [[block, block + 1]]), k, v,
            torch.zeros(2, 16, BLOCK, HEADS, WIDTH), 0, True,
        )  # fmt: skip

    spoiled = k.clone()
    spoiled[4, 1, 2] += 1
    (found,) = WatchedKv({0: layers_of(watched(run(k, 2))), 1: layers_of(watched(run(spoiled, 7)))}).diff()
    assert (found.kind, found.layer) == ("rows differ", 0)
    assert "the first at token 4" in found.text


def test_a_profiling_run_of_vllm_takes_nothing(
    module: Callable[[str, str], ModuleType], watched: Callable[..., list[RowsTaken]]
) -> None:
    module("vllm.forward_context", "")
    backend = module(
        "vllm.v1.attention.backends.flash_attn", VLLM_BEFORE.replace("slots = ", "return;slots = ")
    )
    own = SimpleNamespace(layer_name="model.layers.0.attn")
    k, v = rows_of(2, 1)
    impl = backend.FlashAttentionImpl()
    assert watched(lambda: impl.forward(own, k, k, v, torch.zeros(0), None)) == []


class Mode:
    def __init__(self, decodes: bool) -> None:
        self._decodes = decodes

    def is_decode(self) -> bool:
        return self._decodes


def sglang_batch(pool: Any, step: Step, requests: Sequence[int], counts: Sequence[int] | None) -> Any:
    return SimpleNamespace(
        token_to_kv_pool=pool,
        out_cache_loc=step.slots,
        positions=step.positions,
        req_pool_indices=torch.tensor(requests),
        extend_seq_lens=None if counts is None else torch.tensor(counts, dtype=torch.int32),
        forward_mode=Mode(counts is None),
    )


@pytest.mark.parametrize("is_wrapped", [False, True], ids=["loc", "KVWriteLoc"])
def test_sglang_s_rows_are_told_by_request_and_position(
    is_wrapped: bool, module: Callable[[str, str], ModuleType], watched: Callable[..., list[RowsTaken]]
) -> None:
    memory = module("sglang.srt.mem_cache.memory_pool", SGLANG_POOL)
    attention = module("sglang.srt.layers.radix_attention", SGLANG_ATTENTION)
    (k1, v1), (k2, v2) = rows_of(8, 1), rows_of(2, 2)

    def run(blocks: Sequence[Sequence[int]], requests: Sequence[int]) -> Callable[[], None]:
        def act() -> None:
            layer, pool = attention.RadixAttention(1), memory.MHATokenToKVPool(64, HEADS, WIDTH)
            prefill = sglang_batch(pool, Step([0, 0], [5, 3], blocks), requests, [5, 3])
            decode = sglang_batch(pool, Step([5, 3], [1, 1], blocks), requests, None)
            for batch, k, v in ((prefill, k1, v1), (decode, k2, v2)):
                if is_wrapped:
                    batch.out_cache_loc = SimpleNamespace(loc=batch.out_cache_loc, swa_loc=None)
                layer.forward(k, k, v, batch)

        return act

    here, there = watched(run([[3, 5], [8]], [4, 6])), watched(run([[9, 1], [4]], [1, 2]))
    kv = WatchedKv({0: layers_of(here), 1: layers_of(there)})
    assert kv.diff() == []
    assert kv.table().rows == [("1", "0", "6", "6"), ("1", "1", "4", "4")]
    assert list(kv.layers[0][1, 1].rows.values()) == [*expected(k1[5:], v1[5:]), *expected(k2[1:], v2[1:])]


def test_a_request_that_has_the_number_of_one_before_is_another_sequence(
    module: Callable[[str, str], ModuleType], watched: Callable[..., list[RowsTaken]]
) -> None:
    memory = module("sglang.srt.mem_cache.memory_pool", SGLANG_POOL)
    attention = module("sglang.srt.layers.radix_attention", SGLANG_ATTENTION)

    def act() -> None:
        layer, pool = attention.RadixAttention(0), memory.MHATokenToKVPool(64, HEADS, WIDTH)
        for seed in (1, 2):
            k, v = rows_of(3, seed)
            layer.forward(k, k, v, sglang_batch(pool, Step([0], [3], [[2]]), [5], [3]))

    assert [len(one.digests) for one in watched(act)] == [1, 2]


def test_a_pool_that_is_written_outside_attention_says_so(
    module: Callable[[str, str], ModuleType], watched: Callable[..., list[RowsTaken]]
) -> None:
    memory = module("sglang.srt.mem_cache.memory_pool", SGLANG_POOL)
    module("sglang.srt.layers.radix_attention", SGLANG_ATTENTION)
    pool = memory.MHATokenToKVPool(8, HEADS, WIDTH)
    k, v = rows_of(2, 1)

    def act() -> None:
        for _ in range(2):
            pool.set_kv_buffer(SimpleNamespace(layer_id=0), torch.tensor([1, 2]), k, v)

    assert watched(act, ["the KV cache of SGLang is tapped no more"]) == []
    assert torch.equal(pool.k[1:3], k)


def test_a_source_that_has_changed_is_left_alone_and_said(
    module: Callable[[str, str], ModuleType], watched: Callable[..., list[RowsTaken]]
) -> None:
    module("sglang.srt.mem_cache.memory_pool", "class OtherPool: pass")
    assert watched(lambda: None, ["the KV cache of SGLang is not tapped: AttributeError"]) == []


@pytest.mark.parametrize(
    ("name", "layer"),
    [("model.layers.3.self_attn.attn", 3), ("transformer.h.11.attn", 11), ("encoder.attn", None)],
)
def test_the_layer_that_a_module_s_name_tells(name: str, layer: int | None) -> None:
    assert layer_number(name) == layer
