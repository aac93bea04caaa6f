"""The folders of saved runs: written wholly or not at all, refused where something is wrong, made by others too."""

from __future__ import annotations

import errno
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import dinfer
from dinfer.files import WrittenFiles
from dinfer.plan.partition import partition
from dinfer.plan.schedule import build
from dinfer.run.report import Reporter
from dinfer.run.run import Run
from dinfer.saved import write
from dinfer.saved.format import DESCRIPTION, SavedError
from dinfer.saved.write import replacing
from dinfer.session.session import Session
from dinfer.trace.simulated import paper_trace
from dinfer.trace.trace import Trace
from dinfer.views.report.page import write_report
from tests.support.held_kv import HeldHere, plan_of
from tests.support.saved_runs import FILES, decoded

MODEL = {"layers": 4, "tokenizer": True}


@pytest.fixture(scope="module")
def run(session: Session) -> Run:
    return decoded(session)


@pytest.fixture(scope="module")
def kept(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That run, saved."""
    return run.save(tmp_path_factory.mktemp("kept") / "kept")


@pytest.fixture
def folder(kept: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return shutil.copytree(kept, tmp_path / "copy")


def look_at_all(folder: Path) -> None:
    """Read everything that is in it."""
    saved = dinfer.open(folder)
    for rank in range(3):
        saved.hidden(rank=rank, chunk=0)
        for layer in range(4):
            _ = saved.kv(layer=layer, rank=rank).k[:]
    saved.verdict()
    saved.diff()


def about(folder: Path, **changes: Any) -> None:
    """Change what run.json says; None: leave out."""
    path = folder / "run.json"
    found = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(
        json.dumps({key: value for key, value in found.items() if value is not None}), encoding="utf-8"
    )


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)


# -- reading


def test_a_whole_folder_can_be_read(folder: Path) -> None:
    look_at_all(folder)
    assert (folder / "FORMAT.md").read_text(encoding="utf-8") == DESCRIPTION


@pytest.mark.parametrize("damage", [Path.unlink, cut, flip], ids=["gone", "cut", "flipped"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(folder: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(folder / name)
    with pytest.raises(SavedError, match=f"(?s)damaged.*{name}|{name}.*damaged"):
        look_at_all(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 2}, "is of a newer dinfer: its format is version 2, and this dinfer reads up to 1. Update dinfer"),
        ({"version": None}, "says no version of its format"),
        ({"format": "other"}, 'is no saved run: its run.json does not say "format": "dinfer-run"'),
        ({"ids": None}, "is damaged: run.json: Object missing required field `ids`"),
        ({"ids": [1, 2]}, "is damaged: run.json has 2 ids, and 37 tokens in plan.txt"),
        ({"kv": {"heads": 2, "head_dim": 16, "dtype": "float33", "layers": []}}, "the dtype 'float33', which torch"),
        ({"ranks": [{"rank": 0}]}, "field `spans` - at `$.ranks[0]`"),
        ({"checkpoint": "x"}, "at `$.checkpoint`"),
    ],
)  # fmt: skip
def test_what_run_json_says_is_checked(folder: Path, changes: dict[str, Any], said: str) -> None:
    about(folder, **changes)
    with pytest.raises(SavedError) as caught:
        look_at_all(folder)
    assert said in str(caught.value)


def test_a_fault_with_an_unknown_field_is_named(folder: Path) -> None:
    fault = {"number": 1, "kind": "zero", "where": "memory", "colour": "red"}
    own = json.loads((folder / "run.json").read_text(encoding="utf-8"))["own"]
    about(folder, own={**own, "1": {**own["1"], "faults": [fault]}})
    with pytest.raises(SavedError, match=r"is damaged: run\.json has .*'colour'"):
        dinfer.open(folder).replay(1)


def test_evidence_that_is_damaged_or_missing(folder: Path) -> None:
    about(folder, evidence={"signs": []})
    with pytest.raises(SavedError, match=r"is damaged: run\.json has evidence of another form: "):
        dinfer.open(folder).verdict()
    about(folder, evidence=None)
    with pytest.raises(SavedError, match="no signs of life to work a verdict out from"):
        dinfer.open(folder).verdict()


def test_what_is_no_saved_run(tmp_path: Path) -> None:
    with pytest.raises(SavedError, match=r"there is no '.*nowhere': give a folder"):
        dinfer.open(tmp_path / "nowhere")
    with pytest.raises(SavedError, match=r"is no saved run: it has no run\.json"):
        dinfer.open(tmp_path)
    (tmp_path / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(SavedError, match=r"is damaged: run\.json is no JSON"):
        dinfer.open(tmp_path)
    (tmp_path / "some.txt").write_text("words", encoding="utf-8")
    with pytest.raises(SavedError, match="is not a trace"):
        dinfer.open(tmp_path / "some.txt")


def test_a_report_is_opened_as_far_as_it_goes(folder: Path, tmp_path: Path) -> None:
    saved = dinfer.open(folder)
    report = dinfer.open(saved.report(tmp_path / "report.html"))
    assert report.trace.events == saved.trace.events
    assert report.findings == saved.findings
    assert "a trace of " in str(report)
    for asked, what in (
        (report.kv, "KV"),
        (report.diff, "KV"),
        (report.verdict, "signs of life"),
        (lambda: report.plan, "plan"),
        (lambda: report.hidden(rank=0, chunk=0), "hidden states"),
    ):
        with pytest.raises(SavedError, match=rf"report\.html' holds a trace and findings, but no {what}"):
            asked()


# -- writing


def test_a_saved_run_is_replaced_and_nothing_else_is(run: Run, tmp_path: Path) -> None:
    target = tmp_path / "one"
    run.save(target, kv=False)
    assert run.save(target, kv=[1], hidden=False) == target
    assert sorted(path.name for path in target.iterdir()) == [
        "FORMAT.md", "digests.safetensors", "kv.layer1.safetensors", "plan.txt", "run.json", "trace.jsonl",
    ]  # fmt: skip
    (target / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(SavedError, match=r"holds notes\.txt, and is no saved run that could be replaced"):
        run.save(target)
    with pytest.raises(SavedError, match="is a file: a run is saved as a folder"):
        run.save(target / "notes.txt")
    with pytest.raises(
        SavedError, match=r"notes\.txt' is a file, so no folder can be made in it: give another"
    ):
        run.save(target / "notes.txt" / "deep" / "two")
    (tmp_path / "empty").mkdir()
    run.save(tmp_path / "empty", kv=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "one"]


def test_another_run_is_kept_and_the_new_one_numbered(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(trace: Trace, path: Path) -> Path:
        return write_report([trace], path)

    monkeypatch.setattr(run, "reporter", Reporter(write, [], list))
    target, report = tmp_path / "one", tmp_path / "report.html"
    assert (run.save(target, kv=False), run.report(report)) == (target, report)
    before = {path: path.read_bytes() for path in (target / "run.json", report)}
    # As for a run of a notebook that was restarted.
    monkeypatch.setattr(run._recorder, "written", WrittenFiles())
    capsys.readouterr()
    for _ in range(2):
        assert run.save(target, kv=False) == tmp_path / "one-2"
        assert run.report(report) == tmp_path / "report-2.html"
    said = capsys.readouterr().out.splitlines()
    assert [("one-2" in line, "report-2.html" in line) for line in said] == [(True, False), (False, True)]
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "one",
        "one-2",
        "report-2.html",
        "report.html",
    ]
    saved = dinfer.open(tmp_path / "one-2")
    assert saved.report(report) == saved.report(report) == tmp_path / "report-3.html"


def test_a_folder_that_the_system_does_not_make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", "some.part")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with (
        pytest.raises(SavedError, match=r"no folder can be made in '.*/new': Read-only file system"),
        replacing(tmp_path / "new" / "one"),
    ):
        pass


def test_what_fails_midway_leaves_all_as_it_was(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = run.save(tmp_path / "one", kv=False)
    before = {path.name: path.read_bytes() for path in target.iterdir()}

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(write, "hidden_of", fail)
    for name in ("one", "other"):
        with pytest.raises(KeyboardInterrupt):
            run.save(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before


def digest(row: bytes) -> int:
    """Of a row whose bytes make 64-bit words, as the description says it, in plain Python."""
    total = 0
    for n, (word,) in enumerate(struct.iter_unpack("<q", row), 1):
        mixed = (word + n * 0x9E3779B97F4A7C15) % 2**64
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ mixed >> shift) * factor % 2**64
        total += mixed ^ mixed >> 31
    total %= 2**64
    return total - 2**64 if total >> 63 else total


def row_digests(rows: torch.Tensor) -> torch.Tensor:
    """Of [places, 2, heads, head_dim]."""
    found = [digest(row.numpy().tobytes()) for row in rows.flatten(0, 2)]
    return torch.tensor(found).reshape(rows.shape[:3])


def test_others_can_write_one_by_its_description(tmp_path: Path) -> None:
    """Only what must be there, by hand; one rank holds another value in layer 2."""
    plan = plan_of(layers=3, tokens=10, world_size=2, chunk_size=4)
    right = HeldHere(plan)
    folder = tmp_path / "made"
    folder.mkdir()
    broken = right.kv[0][2].clone()
    broken[6, 1, 0, 3] = 9
    held = {"spans": [3] * 3, "rows": [10] * 3}
    (folder / "run.json").write_text(
        json.dumps(
            {
                "format": "dinfer-run", "version": 1, "ids": list(range(10)), "tokens": [],
                "kv": {"heads": 2, "head_dim": 4, "dtype": "float32", "layers": [2]},
                "checkpoint": {"fingerprint": "a"}, "standing": ["", ""],
                "ranks": [{"rank": rank, **held} for rank in (0, 1)],
            }
        ), encoding="utf-8",
    )  # fmt: skip
    (folder / "plan.txt").write_text(plan.text(), encoding="utf-8")
    Trace(()).export("jsonl", folder / "trace.jsonl")
    owners = plan.shape.owners
    rows = {f"rank{owners[n]}.layer{n}.rows": row_digests(right.kv[0][n]) for n in range(3)}
    other = 1 - owners[2]
    rows[f"rank{other}.layer2.rows"] = row_digests(broken)
    save_file(rows, folder / "digests.safetensors")
    values = {f"rank{owners[2]}.rows{at}": right.kv[0][2][at : at + 4].contiguous() for at in (0, 4, 8)}
    values[f"rank{other}.rows4"] = broken[4:8].contiguous()
    save_file(values, folder / "kv.layer2.safetensors")
    saved = dinfer.open(folder)
    [one] = saved.diff().differences
    assert (one.rank, one.layer, one.tensor, one.head, one.token, one.dim) == (other, 2, "V", 0, 6, 3)
    [one] = saved.diff(right).differences
    assert one.values == (9.0, float(right.kv[0][2][6, 1, 0, 3]))
    assert torch.equal(saved.kv(layer=2, rank=other).v[0, 6], broken[6, 1, 0])
    shutil.rmtree(folder)


def test_a_folder_of_dinfer_run_is_opened_as_its_trace(tmp_path: Path) -> None:
    trace = paper_trace(
        build(partition(layers=2, tokens=8, world_size=2, chunk_size=4), "pipelined", "pairwise")
    )
    trace.export("jsonl", tmp_path / "run-1" / "trace.jsonl")
    saved = dinfer.open(tmp_path / "run-1")
    assert len(saved.trace.events) == len(trace.events)
    assert saved.path == tmp_path / "run-1" / "trace.jsonl"
