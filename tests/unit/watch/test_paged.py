"""The taps of vLLM's and SGLang's paged KV caches, on stand-ins with the names and parameters of their sources."""

from __future__ import annotations

import importlib
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
RUNNERS = {
    "vllm.v1.worker.gpu_model_runner": """
class GPUModelRunner:
    def _prepare_inputs(self, step):
        from types import SimpleNamespace
        self.input_batch = SimpleNamespace(req_ids=[*step.ids, "gone"], num_reqs=len(step.ids))
        self.query_start_loc = SimpleNamespace(gpu=step.starts)
        self.positions = step.positions
        return step.slots

    def execute_model(self, step, forward):
        self._prepare_inputs(step)
        return forward()
""",
    "vllm.v1.worker.gpu.model_runner": """
class GPUModelRunner:
    def prepare_inputs(self, step):
        from types import SimpleNamespace
        return SimpleNamespace(
            req_ids=step.ids, num_reqs=len(step.ids), query_start_loc=step.starts, positions=step.positions
        )

    def execute_model(self, step, forward):
        batch = self.prepare_inputs(step)
        return forward()
""",
}
VLLM_FLASHINFER = """
class FlashInferImpl:
    kv_sharing_target_layer_name = None

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output=None):
        slots = attn_metadata.slot_mapping
        pages, at = slots // kv_cache.shape[3], slots % kv_cache.shape[3]
        kv_cache[pages, 0, :, at], kv_cache[pages, 1, :, at] = key[: len(slots)], value[: len(slots)]
        return output
"""
VLLM_MLA = """
class MLAAttentionImpl:
    kv_cache_dtype = "auto"

    def do_kv_cache_update(self, kv_c_normed, k_pe, kv_cache, slot_mapping, kv_cache_dtype, k_scale):
        import torch
        rows = torch.cat([kv_c_normed, k_pe.squeeze(1)], -1)[: len(slot_mapping)]
        kv_cache.view(-1, rows.shape[-1])[slot_mapping.flatten()] = rows
"""
VLLM_MLA_BEFORE = """
class MLACommonImpl:
    def forward(self, layer, q, k_c_normed, k_pe, kv_cache, attn_metadata, output=None):
        return output
"""
SGLANG_POOL = """
class MHATokenToKVPool:
    def __init__(self, size, heads, width):
        import torch
        self.k, self.v = torch.zeros(2, size, heads, width)

    def set_kv_buffer(self, layer, loc_info, cache_k, cache_v, k_scale=None, v_scale=None, layer_id_override=None):
        loc = getattr(loc_info, "loc", loc_info)
        if k_scale is not None:
            cache_k.div_(k_scale)
        self.k[loc], self.v[loc] = cache_k, cache_v


class MHATokenToKVPoolFP4(MHATokenToKVPool):
    def set_kv_buffer(self, layer, loc_info, cache_k, cache_v, k_scale=None, v_scale=None, layer_id_override=None):
        pass


class MLATokenToKVPool:
    kv_lora_rank = 4

    def set_kv_buffer(self, layer, loc_info, cache_k, cache_v, layer_id_override=None):
        pass

    def set_mla_kv_buffer(self, layer, loc_info, cache_k_nope, cache_k_rope, layer_id_override=None):
        pass


class HybridLinearKVPool:
    def __init__(self, pool, use_mla):
        self.full_kv_pool, self.use_mla = pool, use_mla

    def set_kv_buffer(self, layer, loc_info, cache_k, cache_v, k_scale=1.0, v_scale=1.0):
        before, layer.layer_id = layer.layer_id, 0
        self.full_kv_pool.set_kv_buffer(layer, loc_info, cache_k, cache_v)
        layer.layer_id = before
"""
SGLANG_RUNNER = """
class ModelRunner:
    def __init__(self, pool, is_draft_worker=False):
        self.token_to_kv_pool, self.is_draft_worker = pool, is_draft_worker

    def forward(self, forward_batch, act):
        return act()
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
        self,
        before: Sequence[int],
        counts: Sequence[int],
        blocks: Sequence[Sequence[int]],
        pad: int = 0,
        ids: Sequence[str] = ("a", "b"),
    ) -> None:
        self.ids = list(ids[: len(counts)])
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
        self.starts = torch.tensor(
            [0, *ends, ends[-1]], dtype=torch.int32
        )  # as long as a larger batch would need it
        self.about = SimpleNamespace(
            slot_mapping=self.slots,
            query_start_loc=self.starts[:-1],
            seq_lens=torch.tensor(
                [start + count for start, count in zip(before, counts, strict=True)], dtype=torch.int32
            ),
            block_table=torch.tensor(
                [[*table, *[0] * (widest - len(table))] for table in blocks], dtype=torch.int32
            ),
        )


class Vllm:
    """A worker of vLLM: its runner, and the attention of one layer."""

    def __init__(self, impl: Any, cache: Tensor, layer: int, runner: str = "") -> None:
        self.impl, self.cache = impl, cache
        self.own = SimpleNamespace(layer_name=f"model.layers.{layer}.self_attn.attn", impl=impl)
        self.runner = sys.modules[runner].GPUModelRunner() if runner else None

    def step(self, step: Step, k: Tensor, v: Tensor) -> None:
        """As vLLM calls it: key and value are padded, slots are not, or with -1."""
        module: Any = sys.modules["vllm.forward_context"]
        name = self.own.layer_name
        context = SimpleNamespace(attn_metadata={name: step.about}, no_compile_layers={name: self.own})
        module.get_forward_context = lambda: context
        k, v = (torch.cat([one, torch.full((3, *one.shape[1:]), 7.0)]) for one in (k, v))

        def forward() -> None:
            if hasattr(self.impl, "kv_cache_dtype"):
                self.impl.do_kv_cache_update(k, v, self.cache, step.slots, "auto", 1.0)
            elif hasattr(self.impl, "do_kv_cache_update"):
                self.impl.do_kv_cache_update(self.own, k, v, self.cache, step.slots)
            else:
                self.impl.forward(self.own, k, k, v, self.cache, step.about)

        if self.runner is None:
            forward()
        else:
            self.runner.execute_model(step, forward)


@pytest.fixture(params=list(RUNNERS))
def runner(request: pytest.FixtureRequest, module: Callable[[str, str], ModuleType]) -> str:
    """Both runners of vLLM."""
    module(request.param, RUNNERS[request.param])
    return str(request.param)


@pytest.mark.parametrize("is_new", [True, False], ids=["do_kv_cache_update", "forward"])
@pytest.mark.parametrize("name", ["flash_attn", "triton_attn"])
def test_vllm_s_rows_are_told_by_request_and_position(
    name: str,
    is_new: bool,
    runner: str,
    module: Callable[[str, str], ModuleType],
    watched: Callable[..., list[RowsTaken]],
) -> None:
    module("vllm.forward_context", "")
    backend = module(f"vllm.v1.attention.backends.{name}", VLLM if is_new else VLLM_BEFORE)
    first, second, third = rows_of(5, 1), rows_of(3, 2), rows_of(2, 3)

    def run(blocks: Sequence[Sequence[int]]) -> Callable[[], None]:
        def act() -> None:
            cache = torch.zeros(2, 16, BLOCK, HEADS, WIDTH)
            vllm = Vllm(backend.FlashAttentionImpl(), cache, 2, runner)
            pad = 1 if is_new else 0
            both = [torch.cat([one, other]) for one, other in zip(first, second, strict=True)]
            vllm.step(Step([0, 0], [5, 3], blocks, pad), both[0], both[1])
            both = [torch.cat([one[:1], one[1:]]) for one in third]  # one more token of each
            vllm.step(Step([5, 3], [1, 1], blocks), both[0], both[1])
            assert torch.equal(cache[0].view(-1, HEADS, WIDTH)[blocks[0][0] * BLOCK], first[0][0])

        return act

    here, there = watched(run([[3, 5], [8]])), watched(run([[9, 1], [4]]))
    kv = WatchedKv({0: layers_of(here), 1: layers_of(there)})
    assert kv.diff() == []
    assert kv.table().rows == [("2", "0", "6", "6"), ("2", "1", "4", "4")]
    mine = [*expected(*first), *expected(third[0][:1], third[1][:1])]
    assert list(kv.layers[0][2, 0].rows.values()) == mine


def test_a_row_that_differs_in_vllm_is_named(
    runner: str, module: Callable[[str, str], ModuleType], watched: Callable[..., list[RowsTaken]]
) -> None:
    module("vllm.forward_context", "")
    backend = module("vllm.v1.attention.backends.flash_attn", VLLM)
    k, v = rows_of(6, 1)

    def run(k: Tensor, block: int) -> Callable[[], None]:
        vllm = Vllm(backend.FlashAttentionImpl(), torch.zeros(2, 16, BLOCK, HEADS, WIDTH), 0, runner)
        return lambda: vllm.step(Step([0], [6], [[block, block + 1]]), k, v)

    spoiled = k.clone()
    spoiled[4, 1, 2] += 1
    (found,) = WatchedKv({0: layers_of(watched(run(k, 2))), 1: layers_of(watched(run(spoiled, 7)))}).diff()
    assert (found.kind, found.layer) == ("rows differ", 0)
    assert "the first at token 4" in found.text


def test_vllm_s_requests_that_share_a_block_are_told_apart(
    runner: str, module: Callable[[str, str], ModuleType], watched: Callable[..., list[RowsTaken]]
) -> None:
    """The second one finds its first block in the cache, where the first one has just ended its own."""
    module("vllm.forward_context", "")
    backend = module("vllm.v1.attention.backends.flash_attn", VLLM)
    first, second, third = rows_of(4, 1), rows_of(3, 2), rows_of(2, 3)

    def act() -> None:
        vllm = Vllm(backend.FlashAttentionImpl(), torch.zeros(2, 16, BLOCK, HEADS, WIDTH), 0, runner)
        vllm.step(Step([0], [4], [[3]]), *first)
        vllm.step(Step([4], [3], [[3, 8]], ids=["b"]), *second)
        vllm.step(Step([4, 7], [1, 1], [[3, 5], [3, 8]]), *third)

    held = layers_of(watched(act))
    assert dict(held[0, 0].rows) == dict(enumerate([*expected(*first), expected(*third)[0]]))
    assert dict(held[0, 1].rows) == dict(enumerate([*expected(*second), expected(*third)[1]], start=4))


def test_without_a_runner_that_is_known_requests_go_by_their_first_block(
    module: Callable[[str, str], ModuleType], watched: Callable[..., list[RowsTaken]]
) -> None:
    module("vllm.forward_context", "")
    backend = module("vllm.v1.attention.backends.flash_attn", VLLM)
    vllm = Vllm(backend.FlashAttentionImpl(), torch.zeros(2, 16, BLOCK, HEADS, WIDTH), 0)
    k, v = rows_of(8, 1)
    held = layers_of(
        watched(
            lambda: vllm.step(Step([0, 0], [5, 3], [[3, 5], [8]]), k, v),
            ["vLLM's runner is not known: its requests"],
        )
    )
    assert [list(held[0, n].rows) for n in (0, 1)] == [[0, 1, 2, 3, 4], [0, 1, 2]]


def test_flashinfer_s_one_tensor_with_heads_before_tokens_is_read(
    runner: str, module: Callable[[str, str], ModuleType], watched: Callable[..., list[RowsTaken]]
) -> None:
    backend = module("vllm.v1.attention.backends.flashinfer", VLLM_FLASHINFER)
    module("vllm.forward_context", "")
    k, v = rows_of(6, 1)
    cache = torch.zeros(16, 2, HEADS, BLOCK, WIDTH)
    step = Step([0], [6], [[2, 7]])
    step.about = SimpleNamespace(slot_mapping=step.slots)  # it has nothing else in common with other backends
    held = layers_of(watched(lambda: Vllm(backend.FlashInferImpl(), cache, 3, runner).step(step, k, v)))
    assert list(held[3, 0].rows.values()) == expected(k, v)
    assert torch.equal(cache[7, 1, :, 1], v[5])


def test_a_layer_of_vllm_that_uses_another_s_rows_writes_none(
    runner: str, module: Callable[[str, str], ModuleType], watched: Callable[..., list[RowsTaken]]
) -> None:
    backend = module("vllm.v1.attention.backends.flashinfer", VLLM_FLASHINFER)
    module("vllm.forward_context", "")
    impl = backend.FlashInferImpl()
    impl.kv_sharing_target_layer_name = "model.layers.0.attn"
    vllm = Vllm(impl, torch.zeros(16, 2, HEADS, BLOCK, WIDTH), 3, runner)
    assert (
        watched(
            lambda: vllm.step(Step([0], [2], [[2]]), *rows_of(2, 1)), ["of a step of vLLM no KV was seen"]
        )
        == []
    )


@pytest.mark.parametrize("is_new", [True, False], ids=["do_kv_cache_update", "forward"])
def test_the_latents_of_vllm_s_mla_are_rows(
    is_new: bool,
    runner: str,
    module: Callable[[str, str], ModuleType],
    watched: Callable[..., list[RowsTaken]],
) -> None:
    module("vllm.forward_context", "")
    latent, rotated = torch.randn(6, 8), torch.randn(6, 1, 4)
    if is_new:
        impl = module("vllm.v1.attention.backend", VLLM_MLA).MLAAttentionImpl()
    else:
        impl = module("vllm.v1.attention.backends.mla.common", VLLM_MLA_BEFORE).MLACommonImpl()
    vllm = Vllm(impl, torch.zeros(16, BLOCK, 12), 3, runner)
    taken = watched(lambda: vllm.step(Step([0], [6], [[2, 7]]), latent, rotated))
    whole = torch.cat([latent[:, None], rotated], -1)
    assert list(layers_of(taken)[3, 0].rows.values()) == expected(whole, whole)
    assert taken[0].shape == (1, 1, 6, 12)


def test_a_quantised_cache_of_vllm_is_said(
    runner: str, module: Callable[[str, str], ModuleType], watched: Callable[..., list[RowsTaken]]
) -> None:
    module("vllm.forward_context", "")
    impl = module("vllm.v1.attention.backend", VLLM_MLA).MLAAttentionImpl()
    impl.kv_cache_dtype = "fp8_ds_mla"
    vllm = Vllm(impl, torch.zeros(16, BLOCK, 12), 3, runner)
    step, k, v = Step([0], [2], [[2]]), torch.randn(2, 8), torch.randn(2, 1, 4)
    assert len(watched(lambda: vllm.step(step, k, v), ["vLLM's KV cache is fp8_ds_mla: rows are taken"])) == 1


def test_a_request_of_vllm_that_is_preempted_and_run_again_is_the_same_sequence(
    runner: str, module: Callable[[str, str], ModuleType], watched: Callable[..., list[RowsTaken]]
) -> None:
    """So are positions that come again because tokens that were proposed are rejected."""
    module("vllm.forward_context", "")
    backend = module("vllm.v1.attention.backends.flash_attn", VLLM)
    k, v = rows_of(7, 1)

    def act() -> None:
        vllm = Vllm(backend.FlashAttentionImpl(), torch.zeros(2, 16, BLOCK, HEADS, WIDTH), 0, runner)
        vllm.step(Step([0], [6], [[2, 3]]), k[:6], v[:6])
        vllm.step(Step([0], [7], [[5, 6]]), k, v)  # in other blocks, from the start
        vllm.step(Step([5], [2], [[5, 6]]), k[5:], v[5:])

    layers = layers_of(watched(act))
    assert list(layers) == [(0, 0)]
    assert list(layers[0, 0].rows.values()) == expected(k, v)
    assert layers[0, 0].repeated == []


def test_of_vllm_s_requests_that_share_blocks_each_holds_what_it_computes(
    runner: str, module: Callable[[str, str], ModuleType], watched: Callable[..., list[RowsTaken]]
) -> None:
    module("vllm.forward_context", "")
    backend = module("vllm.v1.attention.backends.flash_attn", VLLM)
    k, v = rows_of(8, 1)

    def run(shares: bool) -> Callable[[], None]:
        def act() -> None:
            vllm = Vllm(backend.FlashAttentionImpl(), torch.zeros(2, 16, BLOCK, HEADS, WIDTH), 0, runner)
            vllm.step(Step([0], [5], [[2, 3]], ids=("a",)), k[:5], v[:5])
            begin = BLOCK if shares else 0
            tables = [[2 if shares else 4, 5]]
            vllm.step(Step([begin], [8 - begin], tables, ids=("b",)), k[begin:], v[begin:])

        return act

    kv = WatchedKv({0: layers_of(watched(run(True))), 1: layers_of(watched(run(False)))})
    assert kv.diff() == []
    assert kv.table().rows == [("0", "0", "5", "5"), ("0", "1", "4 behind 4 shared", "8")]


def test_a_backend_of_vllm_that_is_new_is_found_in_its_package(
    runner: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: Callable[[str, str], ModuleType],
    watched: Callable[..., list[RowsTaken]],
) -> None:
    """Also below the package, as those of latent attention lie, and imported while it is watched."""
    module("vllm.forward_context", "")
    package = module("vllm.v1.attention.backends", "")
    monkeypatch.setattr(package, "__path__", [str(tmp_path)], raising=False)
    (tmp_path / "mla").mkdir()
    (tmp_path / "mla/__init__.py").write_text("")
    (tmp_path / "mla/quantum_mla.py").write_text(VLLM_MLA)
    latent, rotated = torch.randn(2, 8), torch.randn(2, 1, 4)

    def act() -> None:
        backend = importlib.import_module("vllm.v1.attention.backends.mla.quantum_mla")
        vllm = Vllm(backend.MLAAttentionImpl(), torch.zeros(16, BLOCK, 12), 3, runner)
        vllm.step(Step([0], [2], [[2]]), latent, rotated)

    try:
        (one,) = watched(act)
    finally:
        for name in [name for name in sys.modules if name.startswith("vllm.v1.attention.backends.mla")]:
            del sys.modules[name]
    assert one.layer == 3


def test_a_step_of_vllm_of_which_nothing_is_seen_is_said(
    runner: str, watched: Callable[..., list[RowsTaken]]
) -> None:
    kind = sys.modules[runner].GPUModelRunner
    step = Step([0], [2], [[2]])
    assert (
        watched(lambda: kind().execute_model(step, lambda: None), ["of a step of vLLM no KV was seen"]) == []
    )


class OutOfMemory(RuntimeError):
    pass


def fail() -> None:
    raise OutOfMemory


def test_a_step_of_vllm_that_fails_says_nothing_of_its_backend(
    runner: str, watched: Callable[..., list[RowsTaken]]
) -> None:
    kind = sys.modules[runner].GPUModelRunner

    def act() -> None:
        with pytest.raises(OutOfMemory):
            kind().execute_model(Step([0], [2], [[2]]), fail)

    assert watched(act) == []


def test_a_step_of_sglang_that_fails_says_nothing_of_its_pool(
    module: Callable[[str, str], ModuleType], watched: Callable[..., list[RowsTaken]]
) -> None:
    memory = module("sglang.srt.mem_cache.memory_pool", SGLANG_POOL)
    running = module("sglang.srt.model_executor.model_runner", SGLANG_RUNNER)
    pool = memory.MHATokenToKVPool(64, HEADS, WIDTH)

    def act() -> None:
        with pytest.raises(OutOfMemory):
            running.ModelRunner(pool).forward(one_step(pool, [5]), fail)

    assert watched(act) == []


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


def one_step(pool: Any, counts: Sequence[int]) -> Any:
    step = Step([0] * len(counts), counts, [[2 * n + 1, 2 * n + 2] for n in range(len(counts))])
    return sglang_batch(pool, step, [4, 6], counts)


def test_both_doors_of_sglang_s_latent_pool_take_the_same_rows(
    module: Callable[[str, str], ModuleType], watched: Callable[..., list[RowsTaken]]
) -> None:
    """A model may write before attention, too: the runner knows the batch."""
    memory = module("sglang.srt.mem_cache.memory_pool", SGLANG_POOL)
    running = module("sglang.srt.model_executor.model_runner", SGLANG_RUNNER)
    latent, rotated = torch.randn(8, 1, 4), torch.randn(8, 1, 2)
    whole = torch.cat([latent, rotated], -1)
    pool, layer = memory.MLATokenToKVPool(), SimpleNamespace(layer_id=5)
    batch = one_step(pool, [5, 3])

    def act() -> None:
        runner = running.ModelRunner(pool)
        runner.forward(batch, lambda: pool.set_mla_kv_buffer(layer, batch.out_cache_loc, latent, rotated))
        runner.forward(batch, lambda: pool.set_kv_buffer(layer, batch.out_cache_loc, whole, whole[..., :4]))

    taken = watched(act)
    assert [one.digests[-1] for one in taken[:2]] == [one.digests[-1] for one in taken[2:]]
    assert list(taken[0].digests[0]) == expected(whole, whole)[:5]
    assert taken[0].layer == 5


def test_a_pool_within_a_pool_of_sglang_counts_once_with_the_layer_s_own_number(
    module: Callable[[str, str], ModuleType], watched: Callable[..., list[RowsTaken]]
) -> None:
    memory = module("sglang.srt.mem_cache.memory_pool", SGLANG_POOL)
    running = module("sglang.srt.model_executor.model_runner", SGLANG_RUNNER)
    pool = memory.HybridLinearKVPool(memory.MHATokenToKVPool(64, HEADS, WIDTH), use_mla=False)
    layer, (k, v) = SimpleNamespace(layer_id=7), rows_of(5, 1)
    batch = one_step(pool, [5])

    def act() -> None:
        running.ModelRunner(pool).forward(batch, lambda: pool.set_kv_buffer(layer, batch.out_cache_loc, k, v))

    (one,) = watched(act)
    assert (one.layer, list(one.digests[0])) == (7, expected(k, v))


def test_rows_are_taken_before_sglang_scales_them_in_place(
    module: Callable[[str, str], ModuleType], watched: Callable[..., list[RowsTaken]]
) -> None:
    memory = module("sglang.srt.mem_cache.memory_pool", SGLANG_POOL)
    running = module("sglang.srt.model_executor.model_runner", SGLANG_RUNNER)
    pool = memory.MHATokenToKVPool(64, HEADS, WIDTH)
    pool.dtype = torch.float8_e4m3fn
    layer, (k, v) = SimpleNamespace(layer_id=0), rows_of(5, 1)
    batch, given = one_step(pool, [5]), k.clone()

    def act() -> None:
        running.ModelRunner(pool).forward(
            batch, lambda: pool.set_kv_buffer(layer, batch.out_cache_loc, given, v, 2.0)
        )

    (one,) = watched(
        act, ["SGLang's MHATokenToKVPool is float8_e4m3fn: rows are taken as they are before that"]
    )
    assert list(one.digests[0]) == expected(k, v)
    assert torch.equal(pool.k[batch.out_cache_loc], k / 2)


def test_an_fp4_pool_of_sglang_is_said(
    module: Callable[[str, str], ModuleType], watched: Callable[..., list[RowsTaken]]
) -> None:
    memory = module("sglang.srt.mem_cache.memory_pool", SGLANG_POOL)
    running = module("sglang.srt.model_executor.model_runner", SGLANG_RUNNER)
    pool, layer, (k, v) = (
        memory.MHATokenToKVPoolFP4(64, HEADS, WIDTH),
        SimpleNamespace(layer_id=0),
        rows_of(5, 1),
    )
    batch = one_step(pool, [5])

    def act() -> None:
        for _ in range(2):
            running.ModelRunner(pool).forward(
                batch, lambda: pool.set_kv_buffer(layer, batch.out_cache_loc, k, v)
            )

    assert len(watched(act, ["SGLang's MHATokenToKVPoolFP4 is FP4: rows are taken"])) == 2


def test_a_pool_of_sglang_that_is_not_known_is_named_and_a_draft_s_is_none(
    module: Callable[[str, str], ModuleType], watched: Callable[..., list[RowsTaken]]
) -> None:
    memory = module("sglang.srt.mem_cache.memory_pool", SGLANG_POOL)
    running = module("sglang.srt.model_executor.model_runner", SGLANG_RUNNER)
    pool, layer, (k, v) = (
        memory.MHATokenToKVPool(64, HEADS, WIDTH),
        SimpleNamespace(layer_id=0),
        rows_of(5, 1),
    )
    batch = one_step(pool, [5])

    class CompressedPool:
        pass

    def act() -> None:
        running.ModelRunner(pool, is_draft_worker=True).forward(
            batch, lambda: pool.set_kv_buffer(layer, batch.out_cache_loc, k, v)
        )
        running.ModelRunner(CompressedPool()).forward(batch, lambda: None)

    assert watched(act, ["of a step of SGLang no KV was seen: its pool CompressedPool is none"]) == []


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
