"""Loading holds the weights once: views of the files, or one copy. Measures the peak memory of a new process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig

from dinfer.model.decoder import Decoder

MIB = 1024**2
ALLOWANCE = 60 * MIB  # of 190: code pages, one tensor in two dtypes, a forward of 8 tokens

PROGRAM = """
import json, resource, sys, torch
torch.set_num_threads(1)
import transformers.models.llama.modeling_llama
from dinfer.model.decoder import Decoder
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
before, own = peak(), anonymous()
decoder = Decoder.load(sys.argv[1], dtype=sys.argv[2])
total = sum(float(weight.sum()) for weight in decoder.model.parameters())  # touches every page
decoder.forward(list(range(8)), decoder.new_cache(8), 0)
weights = sum(weight.nbytes for weight in decoder.model.parameters())
print(json.dumps({"peak": peak() - before, "anonymous": anonymous() - own, "weights": weights}))
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """190 MiB of bfloat16 in shards."""
    folder = tmp_path_factory.mktemp("large")
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    model.to_empty(device="cpu")
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(0.01)
    model.save_pretrained(folder, max_shard_size="50MB")
    return folder


def measured(folder: Path, dtype: str) -> dict[str, int]:
    """Load and run once in a fresh process; return bytes."""
    command = [sys.executable, "-c", PROGRAM, str(folder), dtype]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=Path(__file__).parents[3], timeout=250
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_weights_in_the_dtype_of_the_files_are_held_once_and_shared(checkpoint: Path) -> None:
    found = measured(checkpoint, "auto")
    assert found["weights"] > 180 * MIB
    assert found["peak"] < found["weights"] + ALLOWANCE
    assert found["anonymous"] < ALLOWANCE, "none of it is this process's own"


@pytest.mark.slow  # half a GiB
def test_converted_weights_are_held_once_beside_the_page_cache(checkpoint: Path) -> None:
    found = measured(checkpoint, "float32")
    assert found["weights"] > 360 * MIB
    assert found["anonymous"] < found["weights"] + ALLOWANCE
    # The pages of the files count too while they are read; the kernel takes them back when it needs them.
    assert found["peak"] < found["weights"] * 3 // 2 + ALLOWANCE


def test_weights_edited_in_place_do_not_reach_the_file(folder: Path) -> None:
    decoder = Decoder.load(folder)
    decoder.model.get_decoder().norm.weight[0] = 77.0
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert float(file.get_tensor("model.norm.weight")[0]) != 77.0
    assert float(Decoder.load(folder).model.get_decoder().norm.weight[0]) != 77.0
