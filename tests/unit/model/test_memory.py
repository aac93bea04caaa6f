"""Memory: needs computed by hand, free memory on several systems, and the remedies in messages."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from dinfer.errors import ModelError
from dinfer.model import memory
from dinfer.model.checkpoint import Spec, check
from dinfer.model.decoder import Decoder
from dinfer.model.memory import MemoryDemand, check_memory, free, need, out_of_memory_text, size_text
from tests.support.tiny import tiny_checkpoint

GIB = 1024**3

# 36 layers of: q 2560x4096, k and v 2560x1024, o 4096x2560, MLP 3 x 2560x9728, norms 2 x 2560 and 2 x 128;
# an embedding of 151936x2560, shared with the head; a last norm.
QWEN3_4B = Spec(
    path=Path("/nowhere"),
    model_type="qwen3",
    layers=36,
    hidden_size=2560,
    heads=32,
    kv_heads=8,
    head_dim=128,
    vocab_size=151_936,
    max_positions=40_960,
    model_positions=40_960,
    length_dependent=False,
    dtype="bfloat16",
    tokenizer=True,
    weight_bytes=8_044_936_192,
    stored_dtype="bfloat16",
    parameters=4_022_468_096,
    intermediate_size=9728,
    fingerprint="",
)


def set_free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Let `size` bytes be free on every device."""
    monkeypatch.setattr(memory, "free", lambda _: size)


def refusal(monkeypatch: pytest.MonkeyPatch, available: int, dtype: str, tokens: int, **asked: Any) -> str:
    """Return what check_memory says of Qwen3-4B with so much free."""
    set_free(monkeypatch, available)
    with pytest.raises(ModelError) as caught:
        check_memory(MemoryDemand(QWEN3_4B, dtype, tokens, **asked))
    return str(caught.value)


def test_qwen3_4b_by_hand() -> None:
    one_layer = need(QWEN3_4B, "bfloat16", 1).kv_bytes // 36
    assert one_layer == 2 * 8 * 128 * 2 == 4 * 1024
    assert need(QWEN3_4B, "auto", 1).kv_bytes == 144 * 1024
    thousand = need(QWEN3_4B, "bfloat16", 1000)
    assert thousand.kv_bytes == 147_456_000
    assert thousand.hidden_bytes == 1000 * 2560 * 2 == 5_120_000
    assert thousand.weights_bytes == 8_044_936_192
    assert thousand.total == 8_044_936_192 + 147_456_000 + 5_120_000
    twice = need(QWEN3_4B, "float32", 1000)
    assert twice.total == 2 * thousand.total


def test_working_memory_of_a_chunk_by_hand() -> None:
    hidden = need(QWEN3_4B, "bfloat16", 1000, chunk_size=100).hidden_bytes
    numbers_of_a_token = 4 * 2560 + 2 * 40 * 128 + 3 * 9728
    assert hidden == 5_120_000 + 100 * numbers_of_a_token * 2 + 100 * 1000 * 3
    assert need(QWEN3_4B, "auto", 50, 100) == need(QWEN3_4B, "auto", 50, 50), "no chunk exceeds the prompt"


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_need_is_what_a_decoder_takes(tmp_path: Path, family: str) -> None:
    path = tiny_checkpoint(tmp_path, family, layers=2, num_experts=4)
    for dtype in ("auto", "bfloat16"):
        decoder, wanted = Decoder.load(path, dtype), need(check(path), dtype, 100)
        assert wanted.weights_bytes == sum(weight.nbytes for weight in decoder.model.parameters())
        assert wanted.kv_bytes == sum(decoder.new_cache(100).tensor(layer).nbytes for layer in range(2))


def test_a_lossy_codec_keeps_the_exact_kv_of_the_largest_stage() -> None:
    plain, coded = need(QWEN3_4B, "bfloat16", 1000), need(QWEN3_4B, "bfloat16", 1000, stages=5)
    assert coded.exact_bytes == 8 * 1000 * 2 * 8 * 128 * 2  # 36 layers in 5 stages: 8 in the largest
    assert coded.total == plain.total + coded.exact_bytes
    assert "KV before its codec 31.2 MiB" in str(coded)
    assert (
        MemoryDemand(QWEN3_4B, "auto", 1000, 2, stages=5).bytes()
        > MemoryDemand(QWEN3_4B, "auto", 1000, 2).bytes()
    )


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ModelError, match="dtype 'int4' is unknown; give one of float64, float32"):
        need(QWEN3_4B, "int4", 1)


def test_enough_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    set_free(monkeypatch, need(QWEN3_4B, "bfloat16", 1000).total)
    check_memory(MemoryDemand(QWEN3_4B, "bfloat16", 1000))


def test_ranks_on_a_cpu_share_weights_only_where_they_are_views_of_the_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = need(QWEN3_4B, "bfloat16", 1000)
    set_free(monkeypatch, one.weights_bytes + 3 * (one.kv_bytes + one.hidden_bytes))
    check_memory(MemoryDemand(QWEN3_4B, "bfloat16", 1000, 3))
    for dtype, device in (("bfloat16", "cuda:0"), ("float16", "cpu")):
        with pytest.raises(ModelError, match="at most 1 rank here"):
            check_memory(MemoryDemand(QWEN3_4B, dtype, 1000, 3, device))


def test_the_refusal_says_what_was_asked_what_is_free_and_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = refusal(monkeypatch, 10 * GIB, "bfloat16", 40_960, device="cuda:0")
    # weights 7.49 + KV 144 KiB x 40,960 = 5.625 + hidden 5 KiB x 40,960 = 0.195
    assert said.startswith(
        "1 rank on cuda:0 with 40,960 tokens in bfloat16 need 13.3 GiB; "
        "10.0 GiB are free, 3.3 GiB too little."
    )
    assert "weights 7.5 GiB, KV 5.6 GiB, hidden states 200.0 MiB" in said
    longest = (10 * GIB - 8_044_936_192) // (149 * 1024)
    assert f"One of these would be enough: prompt and new tokens together at most {longest:,}, " in said
    assert f"{40_960 - longest:,} fewer." in said
    assert "dtype" not in said
    assert "chunk_size" not in said


def test_each_single_change_that_helps_is_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    said = refusal(monkeypatch, 10 * GIB, "float32", 2000)
    assert "One of these would be enough: dtype bfloat16 (needs 7.8 GiB)." in said
    fits = 2 * 8_044_936_192 + 2 * 149 * 1024 * 10_000 + 10 * 1024**2
    said = refusal(monkeypatch, fits, "float32", 10_000, chunk_size=2000)
    chunk = 10 * 1024**2 // (49_664 * 4 + 10_000 * 5)
    assert f"chunk_size at most {chunk} instead of 2,000" in said
    said = refusal(monkeypatch, 20 * GIB, "bfloat16", 1000, ranks=3, device="cuda:0")
    assert "at most 2 ranks here" in said


def test_where_nothing_helps_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said = refusal(monkeypatch, GIB, "float32", 1000)
    assert said.endswith("No single change is enough: use a smaller model, or a machine with more memory.")
    assert "One copy of the weights is for all" in refusal(monkeypatch, GIB, "bfloat16", 1000, ranks=2)


def test_graphs_are_counted_on_a_gpu_and_can_be_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    on_card: dict[str, Any] = {"device": "cuda:0", "graphs": True}
    bare = MemoryDemand(QWEN3_4B, "bfloat16", 1000, device="cuda:0").bytes()
    wanted = MemoryDemand(QWEN3_4B, "bfloat16", 1000, **on_card)
    assert wanted.bytes() - bare == 36 * memory.GRAPH_BYTES == wanted.of_a_rank.graphs_bytes
    said = refusal(monkeypatch, bare + memory.GRAPH_BYTES, "bfloat16", 1000, **on_card)
    assert "graphs 648.0 MiB" in said
    assert "kernels exact (slower, needs 7.6 GiB)" in said
    assert "kernels exact" not in refusal(monkeypatch, bare - 1, "bfloat16", 1000, **on_card)


def test_sizes_in_words() -> None:
    texts = [size_text(size) for size in (12, 144 * 1024, 5 * 1024**2, 1536 * 1024**3)]
    assert texts == ["12 bytes", "144.0 KiB", "5.0 MiB", "1,536.0 GiB"]


def machine(root: Path, cgroup: str = "", **files: str) -> Path:
    """Write a /proc and /sys with files under /sys/fs/cgroup ("__" for "/")."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        file = root / "sys/fs/cgroup" / name.replace("__", "/").replace("memory_", "memory.")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


@pytest.fixture
def available(monkeypatch: pytest.MonkeyPatch) -> int:
    """The system has 1000 KiB available."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1_024_000))
    return 1_024_000


def test_free_is_what_the_system_has_available(tmp_path: Path, available: int) -> None:
    assert free("cpu", machine(tmp_path)) == available


@pytest.mark.parametrize(
    ("limit", "expected"), [("max", 1_024_000), ("700000", 700_000 - 500_000 + 40_000), ("400000", 0)]
)
@pytest.mark.usefixtures("available")
def test_a_lower_limit_of_cgroup_v2_counts(tmp_path: Path, limit: str, expected: int) -> None:
    stat = "anon 460000\ninactive_file 40000\n"
    files = {"a__memory_max": limit, "a__memory_current": "500000", "a__memory_stat": stat}
    assert free("cpu", machine(tmp_path, "0::/a/b\n", a__b__memory_max="max", **files)) == expected


@pytest.mark.usefixtures("available")
def test_a_container_sees_the_top_of_cgroup_v1_only(tmp_path: Path) -> None:
    files = {
        "memory__memory_limit_in_bytes": "600000\n",
        "memory__memory_usage_in_bytes": "100000\n",
        "memory__memory_stat": "total_inactive_file 1000\n",
    }
    root = machine(tmp_path, "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n", **files)
    assert free("cpu", root) == 501_000


def test_this_machine_and_a_device_that_is_not_there() -> None:
    assert free("cpu") > 0
    with pytest.raises(ModelError, match="device 'cuda:77' cannot be asked for its free memory"):
        free("cuda:77")


def test_memory_that_ran_out_is_told_with_what_would_save_it() -> None:
    one = MemoryDemand(QWEN3_4B, "float32", 8000, 1, "cuda:0", 2048)
    text = out_of_memory_text(one, asked=2 * GIB, available=GIB // 2)
    assert text.startswith("Out of memory on cuda:0: 2.0 GiB was asked for, 512.0 MiB were free. ")
    assert "weights 15.0 GiB, KV 2.2 GiB, hidden states " in text
    assert "One of these would save the missing 1.5 GiB: dtype bfloat16 (needs " in text
    longest = text.split("prompt and new tokens together at most ")[1].split()[0]
    length = int(longest.strip(",;").replace(",", ""))
    assert one.bytes(tokens=length) <= one.bytes() - 3 * GIB // 2 < one.bytes(tokens=length + 1)


def test_free_memory_that_is_not_to_be_had_counts_as_missing() -> None:
    """A limit of the process, or no piece large enough: all that was asked for has to be saved."""
    one = MemoryDemand(QWEN3_4B, "bfloat16", 8000, 1, "cpu", 4096)
    text = out_of_memory_text(one, asked=100 * 2**20, available=50 * GIB)
    assert "save the missing 100.0 MiB" in text
    assert "chunk_size at most " in text
    assert "dtype" not in text


def test_where_nothing_is_enough_or_known_it_says_so() -> None:
    one = MemoryDemand(QWEN3_4B, "bfloat16", 100, 1, "cpu", 100)
    assert "No single change saves the missing 1,024.0 GiB: lower chunk_size" in out_of_memory_text(
        one, asked=1024 * GIB, available=None
    )
    text = out_of_memory_text(one, asked=None, available=GIB)
    assert "an unknown amount was asked for, 1.0 GiB were free" in text
    assert text.endswith("Lower chunk_size or max_new_tokens, shorten the prompt, or use dtype bfloat16.")
