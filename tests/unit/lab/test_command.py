"""`dinfer lab`: its exit statuses, its JSON, and what is left of one that is broken off. No cluster is started."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dinfer.cli import app
from dinfer.cluster.ipyparallel.errors import ClusterError
from dinfer.lab import lab
from dinfer.lab.cells import cells_of, graph_of
from dinfer.lab.faults import Cell, expected
from dinfer.lab.hosts import LabNetwork
from dinfer.lab.score import Result, Score
from dinfer.session.session import Session


def right(cell: Cell) -> Result:
    wanted = expected(graph_of(cell.strategy, cell.schedule), cell)
    return Result(cell, wanted, wanted.kind, wanted.rank, f"rank {wanted.rank}: `{wanted.op}`", 0.5)


def wrong(cell: Cell) -> Result:
    return Result(cell, right(cell).expected, "", None, "", None)


def command(
    monkeypatch: pytest.MonkeyPatch, *flags: object, made: Any = right, end: BaseException | None = None
) -> Any:
    """The command with a lab in place of the real one, which ends after two cells if there is an `end`."""

    def run_lab(
        cells: Sequence[Cell], score: Score, say: Any, *, slow_runs: int, join: bool, links: str
    ) -> None:
        say(f"joined {join}, links {links}")
        score.links = links
        score.clean_runs = 1 + slow_runs
        score.results += map(made, cells[:2] if end else cells)
        if end:
            raise end

    monkeypatch.setattr(lab, "run_lab", run_lab)
    return CliRunner().invoke(app, ["lab", *map(str, flags)])


def test_all_right(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "lab.json"
    done = command(monkeypatch, "--sample", 5, "--seed", 3, "--json", path, "--slow-runs", 2)
    assert (done.exit_code, done.stderr) == (0, "joined False, links auto\n")
    assert "clean runs: 3, false alarms: 0" in done.stdout
    found = json.loads(path.read_text(encoding="utf-8"))
    assert [cell["fault"] for cell in found["cells"]] == [cell.fault for cell in cells_of(3, 5)]
    assert (found["seed"], found["clean_runs"], found["false_alarms"]) == (3, 3, 0)
    assert found["links"] == "auto"
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
        done = command(monkeypatch, "--sample", 5, "--json", path, "--overwrite", end=end)
        assert done.exit_code == status
        assert "not done: 3 of 5 cells" in done.stdout
        assert str(end) in done.stderr
        assert len(json.loads(path.read_text(encoding="utf-8"))["cells"]) == 2


@pytest.mark.parametrize(("flag", "name"), [("--sample", "sample"), ("--slow-runs", "slow_runs")])
def test_a_number_that_is_none(monkeypatch: pytest.MonkeyPatch, flag: str, name: str) -> None:
    done = command(monkeypatch, flag, -1)
    assert done.exit_code == 2
    assert f"{name} is -1" in done.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--sample", "0"], ("sample is 0", "nothing to run", "--slow-runs")),
        (["--links", "cables"], ("'cables'", "auto, namespaces, transport")),
        (["--links", "namespaces", "--join"], ("namespaces", "the cluster was joined")),
    ],
)
def test_what_cannot_be_done_is_refused_at_once(flags: list[str], words: tuple[str, ...]) -> None:
    done = CliRunner().invoke(app, ["lab", *flags])
    assert done.exit_code == 2
    assert all(word in done.stderr for word in words)


@pytest.mark.parametrize(
    ("links", "join", "why", "said"),
    [
        ("auto", False, "needs root", "links: in the transport (needs root)"),
        ("auto", True, "", "links: in the transport (the cluster was joined)"),
        ("transport", False, "", "links: in the transport (as requested)"),
        ("auto", False, "", "links: network namespaces"),
        ("namespaces", False, "", "links: network namespaces"),
    ],
)
def test_what_links_are_broken_in_is_said_first(
    monkeypatch: pytest.MonkeyPatch, links: str, join: bool, why: str, said: str
) -> None:
    """And known to the JSON, and to the session."""
    network, given = LabNetwork("hub", (), "10.77.0.1"), list[LabNetwork | None]()

    @contextmanager
    def lab_session(*, join: bool, network: LabNetwork | None) -> Iterator[Session]:
        given.append(network)
        raise ClusterError(f"no cluster, join {join}")
        yield

    monkeypatch.setattr(lab, "why_not", lambda: why)
    monkeypatch.setattr(lab, "hosts", lambda count: nullcontext(network if count == 3 else None))
    monkeypatch.setattr(lab, "lab_session", lab_session)
    score, told = Score(0, 0), list[str]()
    with pytest.raises(ClusterError, match=f"join {join}"):
        lab.run_lab([], score, told.append, join=join, links=links)
    assert told == [said]
    in_network = said == "links: network namespaces"
    assert given == [network if in_network else None]
    assert score.as_dict()["links"] == ("namespaces" if in_network else "transport")
