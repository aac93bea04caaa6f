"""`dinfer explain` and `dinfer verify` on records of other people's code."""

import json
from pathlib import Path

from typer.testing import CliRunner, Result

from dinfer.cli import app
from dinfer.trace.flight import GROUPS, groups_as_dict
from dinfer.trace.trace import Trace
from tests.support.made_ops import MadeOps

DUMPS = Path(__file__).parent / "trace/flight"


def dinfer(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def dumps(name: str, folder: Path) -> Path:
    for rank, dump in json.loads((DUMPS / f"{name}.json").read_text()).items():
        (folder / f"trace_rank_{rank}").write_text(json.dumps(dump))
    return folder


def traced(ops: MadeOps, path: Path) -> Path:
    trace = Trace.merge([ops.events], **{GROUPS: groups_as_dict(ops.groups)})
    return trace.export("jsonl", path)


def test_dumps_are_explained_and_written(tmp_path: Path) -> None:
    folder = tmp_path / "dumps"
    folder.mkdir()
    dumps("never_sent", folder)
    told, page = tmp_path / "told.json", tmp_path / "report.html"
    answer = dinfer("explain", folder, "--json", told, "--report", page)
    assert answer.exit_code == 1, answer.output
    assert "missing send: rank 1" in answer.stdout
    found = json.loads(told.read_text())
    assert (found["verdict"]["kind"], found["verdict"]["ranks"]) == ("never sent", [1])
    assert found["verdict"]["text"] in answer.stdout
    assert [one["kind"] for one in found["findings"]] == ["other shape"]
    assert [(one["source"], one["target"], one["messages"]) for one in found["links"]] == [
        (0, 1, 8),
        (1, 0, 5),
    ]
    assert found["exit_status"] is None
    assert "missing send: rank 1" in page.read_text()
    again = dinfer("explain", page)
    assert (again.exit_code, again.stdout.splitlines()[0]) == (1, answer.stdout.splitlines()[0])


def test_where_nothing_is_wrong_the_verdict_is_null(tmp_path: Path) -> None:
    folder = tmp_path / "dumps"
    folder.mkdir()
    dumps("healthy", folder)
    told = tmp_path / "told.json"
    answer = dinfer("explain", folder, "--json", told)
    assert (answer.exit_code, answer.stdout.splitlines()[0]) == (0, "the run is done")
    found = json.loads(told.read_text())
    assert (found["verdict"], found["findings"]) == (None, [])


def test_a_trace_keeps_tensors_groups_and_lines(tmp_path: Path) -> None:
    ops = MadeOps(3)
    ops.group("pair", 0, 1)
    ops.message(0, 1, group="pair", shape=(2, 3))
    ops.recv(1, 0, open=True, group="pair", layer=3, chunk=1)
    ops.add(0, "all_reduce", open=True)
    answer = dinfer("explain", traced(ops, tmp_path / "a.jsonl"))
    assert answer.exit_code == 1
    assert "`recv c1 l3 <- 0` ([4] float32, group pair) at rank1.py:2" in answer.stdout
    assert "rank 2" in answer.stdout


def test_what_holds_nothing_to_explain_is_refused(tmp_path: Path) -> None:
    answer = dinfer("explain", tmp_path)
    assert answer.exit_code == 2
    assert "no watch folder, flight-recorder dump or trace" in answer.stderr
    missing = dinfer("explain", tmp_path / "none")
    assert (missing.exit_code, "none" in missing.stderr) == (2, True)


def test_a_recorded_order_is_verified_with_sends_that_wait(tmp_path: Path) -> None:
    ops = MadeOps(2)
    for rank in (0, 1):
        ops.send(rank, 1 - rank)
    for rank in (0, 1):
        ops.recv(rank, 1 - rank)
    path = traced(ops, tmp_path / "a.jsonl")
    assert dinfer("explain", path).exit_code == 0  # it did end
    answer = dinfer("verify", path)
    assert answer.exit_code == 1
    assert (
        "refuted: with sends that wait for their recvs: deadlock: rank 0 is in `send -> 1`" in answer.stdout
    )
    found = json.loads(dinfer("verify", path, "--json").stdout)
    assert (found["proved"], found["kind"], found["ranks"]) == (False, "cycle", [0, 1])


def test_a_pipeline_schedule_is_verified(tmp_path: Path) -> None:
    path = tmp_path / "schedule.csv"
    path.write_text("0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0B0\n1RECV_F0,1F0,1RECV_F1,1B0,1SEND_B0,1F1\n")
    answer = dinfer("verify", path)
    assert (answer.exit_code, answer.stdout[:17]) == (0, "proved: 2 ranks, ")
    path.write_text("0F0,0SEND_F0\n1F0\n")
    assert dinfer("verify", path).exit_code == 1
    path.write_text("0F0,0SEND\n")
    assert dinfer("verify", path).exit_code == 2


def test_a_checkpoint_that_is_none_is_refused_before_the_command_runs(tmp_path: Path) -> None:
    answer = CliRunner().invoke(
        app, ["watch", "--compare", "--checkpoint", str(tmp_path / "no"), "--", "false"]
    )
    assert answer.exit_code == 2
    assert "--checkpoint is" in answer.stderr
    assert CliRunner().invoke(app, ["watch", "--checkpoint", "demo", "--", "false"]).exit_code == 2
