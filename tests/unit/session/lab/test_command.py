"""`dinfer lab`: its exit statuses, its JSON, and what is left of one that is broken off. No cluster is started."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dinfer.cli import app
from dinfer.session.lab import lab
from dinfer.session.lab.cells import cells_of, graph_of
from dinfer.session.lab.expected import Cell, expected
from dinfer.session.lab.score import Result, Score


def right(cell: Cell) -> Result:
    wanted = expected(graph_of(cell.strategy, cell.schedule), cell)
    return Result(cell, wanted, wanted.kind, wanted.rank, f"rank {wanted.rank}: `{wanted.op}`", 0.5)


def wrong(cell: Cell) -> Result:
    return Result(cell, right(cell).expected, "", None, "", None)


def command(
    monkeypatch: pytest.MonkeyPatch, *flags: object, made: Any = right, end: BaseException | None = None
) -> Any:
    """The command with a lab in place of the real one, which ends after two cells if there is an `end`."""

    def run_lab(cells: Sequence[Cell], score: Score, say: Any, *, slow_runs: int, join: bool) -> None:
        say(f"joined {join}")
        score.clean_runs = 1 + slow_runs
        score.results += map(made, cells[:2] if end else cells)
        if end:
            raise end

    monkeypatch.setattr(lab, "run_lab", run_lab)
    return CliRunner().invoke(app, ["lab", *map(str, flags)])


def test_all_right(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "lab.json"
    done = command(monkeypatch, "--sample", 5, "--seed", 3, "--json", path, "--slow-runs", 2)
    assert (done.exit_code, done.stderr) == (0, "joined False\n")
    assert "clean runs: 3, false alarms: 0" in done.stdout
    found = json.loads(path.read_text(encoding="utf-8"))
    assert [cell["fault"] for cell in found["cells"]] == [cell.fault for cell in cells_of(3, 5)]
    assert (found["seed"], found["clean_runs"], found["false_alarms"]) == (3, 3, 0)
    assert {"processor", "cores"} <= set(found["machine"])
    assert {"Python", "torch"} <= set(found["versions"])
    assert set(found["cells"][0]) >= {
        "fault", "rank", "layer", "chunk", "strategy", "schedule", "expected", "named", "correct", "seconds",
    }  # fmt: skip


def test_a_wrong_verdict_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    done = command(monkeypatch, "--sample", 3, made=wrong)
    assert done.exit_code == 1
    assert done.stdout.count("but nothing") == 3


def test_what_was_found_is_kept_when_it_is_interrupted_or_cannot_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "lab.json"
    for end, status in ((KeyboardInterrupt(), 130), (RuntimeError("rank 1 does not come back"), 1)):
        done = command(monkeypatch, "--sample", 5, "--json", path, end=end)
        assert done.exit_code == status
        assert "not done: 3 of 5 cells" in done.stdout
        assert str(end) in done.stderr
        assert len(json.loads(path.read_text(encoding="utf-8"))["cells"]) == 2


@pytest.mark.parametrize(("flag", "name"), [("--sample", "sample"), ("--slow-runs", "slow_runs")])
def test_a_number_that_is_none(monkeypatch: pytest.MonkeyPatch, flag: str, name: str) -> None:
    done = command(monkeypatch, flag, -1)
    assert done.exit_code == 2
    assert done.stderr == f"dinfer: {name} is -1; it must be 0 or more.\n"
