"""`dinfer watch` on programs of other people's kind: they run by torchrun on gloo, unchanged, and know nothing of it.

All defects, under each launcher, are in test_watch_defects.py; what is right, in test_watch_healthy.py.
"""

import json
import sys
from pathlib import Path

import pytest

import dinfer
from tests.support.defect_list import TOLD_S, assert_in_time, assert_right, told_of
from tests.support.watched import torchrun, watch

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def test_a_hang_is_told_with_both_lines_and_explained_again_from_its_records(tmp_path: Path) -> None:
    run = watch(torchrun("defects.py", "gather_against_recv"), tmp_path, "--report", str(tmp_path / "a.html"))
    assert_right(
        told_of(run.told["verdict"], run.told["findings"], "gather_against_recv"), "gather_against_recv"
    )
    assert_in_time(run.told_s, TOLD_S)
    assert run.told["exit_status"] == run.status != 0
    assert run.told["links"][0]["messages"] == 3
    assert "0→1" in run.errors
    text = run.told["verdict"]["text"]
    assert "all_gather" in (tmp_path / "a.html").read_text()
    trace = tmp_path / "watch/trace.jsonl"
    again = watch_explained(trace, tmp_path / "again.json")
    assert again["verdict"]["kind"] == "cycle"
    assert again["verdict"]["text"] == text


def watch_explained(path: Path, told: Path) -> dict[str, dict[str, object]]:
    from typer.testing import CliRunner

    from dinfer.cli import app

    CliRunner().invoke(app, ["explain", str(path), "--json", str(told)])
    found: dict[str, dict[str, object]] = json.loads(told.read_text())
    return found


def test_a_command_in_a_notebook_is_watched_meanwhile() -> None:
    command = torchrun("defects.py", "both_send_first")
    with dinfer.watch(command, environment={"OMP_NUM_THREADS": "1"}) as watched:
        assert watched.status is None
        deadline = 120 / 0.2
        while not (verdict := watched.verdict()).is_hung and deadline:
            deadline -= 1
            with pytest.raises(TimeoutError):
                watched.wait(0.2)
        assert (verdict.kind, verdict.ranks) == ("cycle", (0, 1))
        assert "`send -> 1`" in str(watched.where())
        assert {event.kind for event in watched.trace.events} >= {"send", "recv", "all_reduce"}
        assert "DEFECT" in str(watched.output())
    assert watched.status != 0
    assert watched.verdict().kind == "cycle"  # though it was killed since


def test_the_status_is_the_commands_own(tmp_path: Path) -> None:
    run = watch([sys.executable, "-c", "import sys; print('hello'); sys.exit(7)"], tmp_path)
    assert (run.status, run.output, run.told["verdict"]) == (7, "hello\n", None)
    assert "no torch.distributed ops were seen" in run.errors


FORWARD = """
import torch, torch.distributed as dist
from transformers import AutoModelForCausalLM, DynamicCache
from dinfer.model.demo import CHECKPOINT
torch.set_num_threads(1)
dist.init_process_group("gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
if BROKEN:
    model.model.layers[2].register_forward_hook(lambda layer, given, output: output + 1)
cache = DynamicCache(config=model.config)
with torch.no_grad():
    for chunk in range(3):
        model(input_ids=torch.arange(20 + 8 * chunk, 28 + 8 * chunk)[None], past_key_values=cache)
dist.barrier()
"""


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True])
def test_a_model_is_compared_with_the_reference_from_the_command_line(broken: bool, tmp_path: Path) -> None:
    program = FORWARD.replace("BROKEN", str(broken))
    run = watch([sys.executable, "-c", program], tmp_path, "--compare")
    assert run.status == 0
    if broken:
        assert "✖ error: the compute differs: what leaves layer 2, chunk 0, token 0, on rank 0" in run.errors
    else:
        assert "equal: rank 0 computed what transformers' own forward makes, bit for bit" in run.errors
