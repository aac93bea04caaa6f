"""Trace, JSON and table are made from what the ranks reported."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from dinfer.cli.root import keep_json
from dinfer.cluster.ranks import RankState
from dinfer.config import Config
from dinfer.engine.corruption import Corruption
from dinfer.engine.finite import NonFinite
from dinfer.job import Job, prepare
from dinfer.launch.runner import ProgressLines, conclude
from dinfer.messages import BatchResult, BlockCorrupt, Edited, FirstNonFinite, StoreOpened
from dinfer.run.report import findings_of_result
from dinfer.run.result import merge, result_of, table
from dinfer.trace.events import Event
from tests.support.tiny import tiny_checkpoint

S = 1_000_000_000
CHANGED = "rank 1 received a changed V of block c0 l1 from rank 0: the block changed on the way or before it was sent"


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By default the trace is written below the working folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Two layers, two tokens, two ranks."""
    model = tiny_checkpoint(tmp_path_factory.mktemp("model"), layers=2)
    return prepare(Config(world_size=2, threads=1, model_path=str(model), prompt_ids=(1, 2)))


@pytest.fixture
def ranks() -> list[RankState]:
    """Rank 0 computes for a second and sends for two; rank 1 receives for two."""
    result = BatchResult(
        host="h", device="cpu", threads=1, dtype="float32", kernels="exact", kv_sha256="ab", tokens=(4,), plan_id=1,
        decode_s=0.5, lost_events=0, log_trouble="", stopped="max_new_tokens",
    )  # fmt: skip
    layer = Event(0, "main", "layer", 0, 0, 0, 1 * S, chunk=0, layer=0)
    send = Event(0, "main", "send", 1 * S, 1 * S, 2 * S, 4 * S, "kv", 0, 0, peer=1, bytes=6_000_000)
    recv = Event(1, "main", "recv", 0, 0, 2 * S, 4 * S, "kv", 0, 0, peer=0, bytes=6_000_000)
    return [RankState(events=[layer, send], result=result), RankState(events=[recv], result=result)]


def result(job: Job, ranks: list[RankState]) -> dict[str, Any]:
    """What --json would hold."""
    return result_of(job, ranks, merge(job, [state.events for state in ranks]), "four")


def test_the_trace_holds_all_events_and_describes_the_run(job: Job, ranks: list[RankState]) -> None:
    trace = merge(job, [state.events for state in ranks])
    assert [event.rank for event in trace.events] == [0, 0, 1]
    assert trace.about["plan_id"] == f"{job.plan.id:016x}"
    assert (trace.about["world_size"], trace.about["tokens"], trace.about["stages"]) == (2, 2, [0, 1])


def note(rank: int) -> BlockCorrupt:
    """What a rank says of a block that came to it changed."""
    return BlockCorrupt(Corruption(rank, 0, 1, "V", 64, peer=0).as_dict())


def test_changed_blocks_are_in_the_result_in_words_and_as_fields(job: Job, ranks: list[RankState]) -> None:
    assert result(job, ranks)["corrupt"] == []
    ranks[1].notes += [Edited(()), note(1)]
    (found,) = result(job, ranks)["corrupt"]
    assert found["text"] == CHANGED
    assert (found["rank"], found["chunk"], found["layer"], found["peer"]) == (1, 0, 1, 0)
    assert json.loads(json.dumps(found)) == found


def test_nan_is_in_the_result_on_the_terminal_and_in_the_report(job: Job, ranks: list[RankState]) -> None:
    assert result(job, ranks)["nonfinite"] is None
    first = NonFinite(0, "layer", 0, 0, "V", "Inf", token=1)
    later = NonFinite(1, "layer", 0, 1, "K", "NaN", token=0)
    ranks[0].notes.append(FirstNonFinite(first.as_dict()))
    ranks[1].notes.append(FirstNonFinite(later.as_dict()))
    for rank in (0, 1):
        ranks[rank].events.append(Event(rank, "decode", "nonfinite", 0, 0, 0, 0, "kv", chunk=0, layer=rank))
    found = result(job, ranks)
    text = "first Inf in V of c0 l0, token 1, computed by rank 0; 1 block since"
    assert found["nonfinite"]["text"] == text
    assert NonFinite.of(found["nonfinite"]["first"]) == first
    assert [(one["rank"], one["layer"]) for one in found["nonfinite"]["blocks"]] == [(0, 0), (1, 1)]
    assert json.loads(json.dumps(found)) == found
    findings = findings_of_result(job, found)
    assert findings.nonfinite == text
    assert [mark[:4] for mark in findings.marks] == [(0, 0, 0, "nonfinite"), (1, 0, 1, "nonfinite")]
    out = io.StringIO()
    conclude(job, ranks, ProgressLines(job, out), None)
    assert f"warning: not finite: {text}" in out.getvalue()


def test_what_the_user_chose_to_record_is_a_warning_at_the_end_and_no_error(
    job: Job, ranks: list[RankState]
) -> None:
    assert ranks[0].result
    ranks[1].result = replace(ranks[0].result, kv_sha256="cd")
    out = io.StringIO()
    with pytest.raises(RuntimeError, match="the ranks hold different KV after prefill"):
        conclude(job, ranks, ProgressLines(job, out), None)
    ranks[1].notes = [note(1)] * 5
    assert len(conclude(job, ranks, ProgressLines(job, out), None)["corrupt"]) == 5
    assert out.getvalue().endswith("; and 2 more\n")
    assert f"✖ error: {CHANGED}; " in out.getvalue()


@pytest.mark.parametrize("text", ["", "471."])
def test_another_port_is_said_on_a_line_of_its_own_also_after_text_has_begun(
    tmp_path: Path, ranks: list[RankState], text: str
) -> None:
    """A short run may be over before its ranks' reports are looked at."""
    model = tiny_checkpoint(tmp_path, layers=2)
    config = Config(world_size=2, threads=1, model_path=str(model), prompt_ids=(1, 2), master_port=29500)
    show = ProgressLines(prepare(config), out := io.StringIO())
    show.on_text(text)
    ranks[0].store = StoreOpened(40001)
    show.progress(ranks)
    assert "port 29500 is in use; the ranks meet at 40001 instead." in out.getvalue().splitlines()


def test_the_result_holds_figures_of_every_rank(job: Job, ranks: list[RankState]) -> None:
    found = result(job, ranks)
    assert (found["prompt_tokens"], found["tokens"], found["text"]) == (2, [4], "four")
    assert found["plan"]["proved"]
    first, second = found["ranks"]
    assert (first["rank"], first["compute_s"], first["exposed_sync_s"], first["prefill_s"]) == (0, 1, 2, 4)
    assert (first["sent_bytes"], first["received_bytes"]) == (6_000_000, 0)
    assert (second["sent_bytes"], second["received_bytes"], second["waiting_s"]) == (0, 6_000_000, 2)


def test_the_table_has_a_line_for_each_rank_and_link(job: Job, ranks: list[RankState]) -> None:
    lines = table(result(job, ranks)).splitlines()
    figures = [4.0, 1.0, 2.0, 0.5, 1.0, 2.0, 6.0, 0.0]
    assert lines[1].split() == ["0", "cpu", *(f"{figure:.3f}" for figure in figures)]
    assert lines[-3].split() == ["0→1", "1", "6.000", "2000.00", "3"]
    assert lines[-1] == "1 new token; stopped because max_new_tokens is reached"


def test_json_is_utf_8_and_reads_back(job: Job, ranks: list[RankState], tmp_path: Path) -> None:
    found = {**result(job, ranks), "text": "中🙂"}
    keep_json(found, str(tmp_path / "r.json"))
    text = (tmp_path / "r.json").read_text(encoding="utf-8")
    assert "中🙂" in text
    assert json.loads(text) == json.loads(json.dumps(found))
