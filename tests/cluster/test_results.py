"""`dinfer run` on real processes: the KV and tokens of transformers, and all that a run leaves behind."""

from __future__ import annotations

import json
import os
import re
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dinfer.plan.ops import Op
from dinfer.plan.partition import partition
from dinfer.plan.plan import Plan
from dinfer.plan.schedule import build
from dinfer.planner.machine import MeasuredMachine
from dinfer.trace.read import read_jsonl
from dinfer.trace.trace import Trace
from tests.support.expected_tokens import Expected, expected
from tests.support.fixtures import Checkpoint, Start
from tests.support.parrot import C_LOCALE, PROMPT, check_parroted
from tests.support.parrot import CHUNK as PARROT_CHUNK
from tests.support.parrot import NEW_TOKENS as PARROT_TOKENS
from tests.support.runs import Run, run_arguments
from tests.support.twin import prompt

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

IDS = tuple(prompt(22))

FULL = """# the disk is full for a rank's log and the trace, as soon as their folder is there
import os
unbroken = os.mkdir
def mkdir(path, *given, **named):
    unbroken(path, *given, **named)
    if os.path.basename(path).startswith("run-"):
        for name in ("rank1.log", "trace.jsonl.part"):
            os.symlink("/dev/full", os.path.join(path, name))
os.mkdir = mkdir
"""
CHUNK, NEW_TOKENS = 4, 8
LAYERS, HIDDEN, KV_ROW = 7, 64, 2 * 2 * 16  # of the tiny checkpoints; a token's K and V in one layer
FLOAT_BYTES = 4
RUN_KEYS = {"prompt_tokens", "tokens", "text", "ttft_s", "plan", "ranks"}
RANK_KEYS = {
    "rank",
    "host",
    "device",
    "threads",
    "kv_sha256",
    "tokens",
    "prefill_s",
    "exposed_sync_s",
    "decode_s",
    "sent_bytes",
    "received_bytes",
}
slow = pytest.mark.slow


@dataclass(frozen=True)
class Sample:
    """One run that went to its end, and what it should have come to."""

    run: Run
    plan: Plan
    wanted: Expected
    log_level: str

    @property
    def result(self) -> dict[str, Any]:
        return self.run.result()

    @property
    def trace(self) -> Trace:
        return read_jsonl(self.run.logs / "trace.jsonl")


@pytest.fixture(
    scope="module",
    params=[
        ("qwen3", "pipelined", "pairwise", "DEBUG"),
        ("llama", "lockstep", "ring", "INFO"),
        pytest.param(("llama", "pipelined", "ring", "INFO"), marks=slow),
        pytest.param(("llama", "lockstep", "pairwise", "INFO"), marks=slow),
        pytest.param(("qwen3", "lockstep", "ring", "DEBUG"), marks=slow),
        pytest.param(("llama", "pipelined", "pairwise", "DEBUG"), marks=slow),
        pytest.param(("qwen3", "pipelined", "ring", "DEBUG"), marks=slow),
        pytest.param(("qwen3", "lockstep", "pairwise", "DEBUG"), marks=slow),
    ],
    ids="-".join,
)
def sample(
    request: pytest.FixtureRequest, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Sample]:
    """A run on three ranks; by default each part of the eight combinations is met once."""
    family, schedule, strategy, log_level = request.param
    model = checkpoint(family=family)
    arguments = run_arguments(
        model,
        prompt_ids=IDS,
        chunk_size=CHUNK,
        schedule=schedule,
        sync_strategy=strategy,
        max_new_tokens=NEW_TOKENS,
        log_level=log_level,
    )
    shape = partition(layers=LAYERS, tokens=len(IDS), world_size=3, chunk_size=CHUNK)
    run = Run(tmp_path_factory.mktemp("run"), arguments, {})
    wanted = expected(model, IDS, CHUNK, NEW_TOKENS)
    run.finish()
    yield Sample(run, build(shape, schedule, strategy), wanted, log_level)
    run.end()


def transfer_bytes(op: Op) -> int:
    """What an op carries, by the plan: float32 blocks, hidden states of a chunk, or the last one."""
    return op.tokens * (KV_ROW if op.what == "kv" else HIDDEN) * FLOAT_BYTES


def ops_of(plan: Plan, rank: int) -> Counter[tuple[str, str]]:
    """(lane, op) of a rank's part of the plan."""
    return Counter((lane.name, str(op)) for lane in plan.lanes[rank] for op in lane.ops)


def test_every_rank_ends_with_the_kv_of_transformers(sample: Sample) -> None:
    assert [rank["kv_sha256"] for rank in sample.result["ranks"]] == [sample.wanted.kv_sha256] * 3


def test_tokens_are_those_of_generate(sample: Sample) -> None:
    assert sample.result["tokens"] == sample.wanted.tokens
    assert [rank["tokens"] for rank in sample.result["ranks"]] == [sample.wanted.tokens] * 3


def test_json_holds_what_is_promised(sample: Sample) -> None:
    result = sample.result
    assert result.keys() >= RUN_KEYS
    assert result["prompt_tokens"] == len(IDS)
    assert result["plan"] == {
        "id": f"{sample.plan.id:016x}",
        "proved": True,
        "proof": result["plan"]["proof"],
    }
    assert result["text"].split() == [str(token) for token in sample.wanted.tokens]
    for number, rank in enumerate(result["ranks"]):
        assert rank.keys() >= RANK_KEYS
        assert (rank["rank"], rank["device"], rank["threads"]) == (number, "cpu", 1)
        assert rank["prefill_s"] > 0
        assert rank["decode_s"] > 0
        assert 0 < rank["ttft_s"] <= result["ttft_s"]
        assert 0 <= rank["exposed_sync_s"] <= rank["prefill_s"]


def test_ranks_send_and_receive_the_bytes_of_the_plan(sample: Sample) -> None:
    for number, rank in enumerate(sample.result["ranks"]):
        ops = [op for lane in sample.plan.lanes[number] for op in lane.ops]
        assert rank["sent_bytes"] == sum(transfer_bytes(op) for op in ops if op.kind == "send")
        assert rank["received_bytes"] == sum(transfer_bytes(op) for op in ops if op.kind == "recv")


def test_the_trace_holds_every_op_once(sample: Sample) -> None:
    trace = sample.trace
    for rank, lanes in enumerate(sample.plan.lanes):
        by_name = {lane.name: lane.ops for lane in lanes}
        mine = [event for event in trace.prefill() if event.rank == rank]
        assert all(event.index is not None for event in mine)
        seen = Counter((event.lane, str(by_name[event.lane][event.index or 0])) for event in mine)
        assert seen == ops_of(sample.plan, rank)
        for event in mine:
            op = by_name[event.lane][event.index or 0]
            assert (event.kind, event.chunk, event.layer) == (op.kind, *_unknown_as_none(op))
            assert event.ready <= event.start <= event.met <= event.end


def test_the_trace_says_that_every_rank_got_every_block(sample: Sample) -> None:
    for rank in range(3):
        matrix = sample.trace.received(rank)
        assert [len(row) for row in matrix] == [LAYERS] * len(sample.plan.shape.chunks)
        assert all(all(row) for row in matrix)


def test_each_rank_leaves_one_log(sample: Sample) -> None:
    logs = sorted(path.name for path in sample.run.logs.glob("*.log"))
    assert logs == ["rank0.log", "rank1.log", "rank2.log"]
    for rank in range(3):
        text = (sample.run.logs / f"rank{rank}.log").read_text(encoding="utf-8")
        assert re.search(rf"rank {rank} INFO .*chunk \d+: layers \d–\d computed", text)
        logged = Counter(re.findall(rf"rank {rank} DEBUG ([^:]*): waited", text))
        plan = Counter(str(op) for lane in sample.plan.lanes[rank] for op in lane.ops)
        assert logged == (plan if sample.log_level == "DEBUG" else Counter())
        assert (sample.run.logs / f"rank{rank}.err").read_text() == ""


def test_the_end_shows_ranks_and_links_and_nothing_on_stderr(sample: Sample) -> None:
    assert sample.run.finish() == 0
    assert sample.run.err == ""
    assert "proved: 3 ranks" in sample.run.out
    assert all(f"{a}→{b}" in sample.run.out for a, b in ((0, 1), (1, 2), (2, 0)))


def test_text_streams_in_whole_characters_and_flags_win_over_the_config_file(
    parrot: Path, tmp_path: Path, start: Start
) -> None:
    """A prompt file in Chinese; each of its bytes is a token."""
    (tmp_path / "prompt.txt").write_text(PROMPT, encoding="utf-8")
    values = {
        "prompt_file": "prompt.txt",
        "chunk_size": PARROT_CHUNK,
        "max_new_tokens": PARROT_TOKENS,
        "world_size": 3,
    }
    toml = "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())
    (tmp_path / "run.toml").write_text(toml, encoding="utf-8")
    run = start(parrot, environment=C_LOCALE, config="run.toml", world_size=2)
    check_parroted(run, parrot)
    assert run.result()["prompt_tokens"] == len(PROMPT.encode())
    assert len(run.result()["ranks"]) == 2
    assert ", 4 chunks) proved" in run.out


def test_what_is_auto_is_chosen_by_what_the_ranks_measure(model: Path, start: Start) -> None:
    """Chunks need not be equal, so the KV is that of transformers only in its tokens' choice."""
    auto = dict.fromkeys(("schedule", "chunk_size", "layer_split", "sync_strategy"), "auto")
    run = start(model, prompt_ids=IDS, max_new_tokens=NEW_TOKENS, world_size=2, **auto)
    assert run.finish() == 0, run.err
    found = run.result()
    chosen = found["chosen"]
    assert [line.split()[0] for line in chosen["because"]] == [*auto, "world_size"]
    assert all(line in run.out for line in chosen["because"])
    assert sum(chosen["chunks"]) == len(IDS)
    assert (found["schedule"], found["sync_strategy"]) == (chosen["schedule"], chosen["sync_strategy"])
    assert found["tokens"] == list(expected(model, IDS, CHUNK, NEW_TOKENS).tokens)
    assert len({rank["kv_sha256"] for rank in found["ranks"]}) == 1
    told = {one["of"]: one["predicted_s"] for one in found["predicted"]}
    assert told["prefill"] == pytest.approx(chosen["predicted_s"])
    assert {"rank 0 computes", "rank 1 computes", "link 0→1", "link 1→0"} <= set(told)
    assert MeasuredMachine.of(found["machine"]).hidden_bytes == HIDDEN * FLOAT_BYTES


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
def test_a_full_disk_costs_the_files_but_not_the_run(model: Path, tmp_path: Path, start: Start) -> None:
    (tmp_path / "sitecustomize.py").write_text(FULL, encoding="utf-8")
    (tmp_path / "result.json").symlink_to("/dev/full")
    environment = {
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep)
    }
    flags = {"world_size": 2, "prompt_ids": IDS, "chunk_size": CHUNK, "max_new_tokens": NEW_TOKENS}
    run = start(model, environment=environment, **flags)
    assert run.finish() == 1
    wanted = expected(model, IDS, CHUNK, NEW_TOKENS)
    assert " ".join(map(str, wanted.tokens)) in run.out
    assert re.search(
        r"the trace could not be written to logs/run-\S+/trace.jsonl: No space left on device", run.out
    )
    assert (
        len(re.findall(r"the run went on, but \d+ records could not be written to ", run.out, re.MULTILINE))
        == 1
    )
    assert re.search(
        r"could not be written to \S+/logs/run-\S+/rank1.log: No space left on device$", run.out, re.MULTILINE
    )
    assert "could not be written to result.json: No space left on device" in run.err
    assert not (run.logs / "trace.jsonl.part").is_symlink()
    assert (run.logs / "rank1.err").read_text() == ""
    assert "chunk 0: layers" in (run.logs / "rank0.log").read_text(encoding="utf-8")


def test_one_rank_needs_no_other_and_each_run_has_a_folder_of_its_own(model: Path, start: Start) -> None:
    """A port in use is replaced."""
    flags = {"world_size": 1, "prompt_ids": IDS, "chunk_size": CHUNK, "max_new_tokens": NEW_TOKENS}
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        first = start(model, master_port=port, **flags)
        (rank,) = first.result()["ranks"]
    assert re.search(rf"^port {port} is in use; the ranks meet at \d+ instead\.$", first.out, re.MULTILINE)
    assert (rank["kv_sha256"], rank["tokens"]) == expected(model, IDS, CHUNK, NEW_TOKENS)
    assert rank["sent_bytes"] == rank["received_bytes"] == 0

    before = Path(first.result()["log_dir"])
    kept = {path.name: path.read_bytes() for path in (first.folder / before).iterdir()}
    assert kept.keys() == {"rank0.log", "rank0.err", "trace.jsonl"}
    again = start(model, overwrite=True, **flags)
    after = Path(again.result()["log_dir"])
    assert after != before
    assert again.logs.resolve() == (again.folder / after).resolve()
    assert {path.name: path.read_bytes() for path in (first.folder / before).iterdir()} == kept
    refused = start(model, **flags)
    assert refused.finish() == 2
    assert "--json is 'result.json', which exists" in refused.err
    assert sorted(path.name for path in (again.folder / "logs").iterdir()) == sorted(
        [before.name, after.name, "latest"]
    )


def _unknown_as_none(op: Op) -> tuple[int | None, int | None]:
    return (None if op.chunk < 0 else op.chunk, None if op.layer < 0 else op.layer)
