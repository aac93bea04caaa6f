"""`session.runs`: runs that are over go on answering from what was kept of them, and are compared with one another."""

from __future__ import annotations

import gc
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import dinfer
from dinfer.cli import app
from dinfer.cluster.lease import RunOver
from dinfer.errors import NoSuch
from dinfer.plan.ops import PlanError
from dinfer.run.kept import PREFIX
from dinfer.run.run import Run
from dinfer.session.runs import SessionRuns
from dinfer.session.session import Session
from dinfer.severity import Severity
from dinfer.temporary import LOCK
from tests.support.fixtures import fresh_session
from tests.support.threads import session_on_threads
from tests.support.twin import prompt

MODEL = {"layers": 6, "tokenizer": True}
IDS = tuple(prompt(22))
OTHER = tuple(prompt(23))
DEADLINE_S = 120.0

session = fresh_session


def done(session: Session, **parameters: Any) -> Run:
    run = session.prefill(IDS, chunk_size=8, max_new_tokens=4, **parameters)
    run.wait(DEADLINE_S)
    return run


def broken(session: Session, **parameters: Any) -> Run:
    """A run with one bit of one block flipped on rank 2."""
    run = session.prefill(IDS, chunk_size=8, max_new_tokens=4, paused=True, **parameters)
    run.inject("bitflip", rank=2, layer=3, chunk=1, head=1, token=9)
    run.resume()
    run.wait(DEADLINE_S)
    return run


# -- a run that is over answers


def test_a_run_that_is_over_answers_as_before(session: Session) -> None:
    old = broken(session)
    old.decode(3)
    live, tokens, text, trace = old.kv().diff(), old.tokens, old.text, old.trace
    verdict = str(old.verdict())
    done(session)
    assert old.closed
    kept = old.kv().diff()
    assert {(d.rank, d.layer, d.chunk, d.tensor) for d in kept.differences} == {
        (d.rank, d.layer, d.chunk, d.tensor) for d in live.differences
    }
    assert kept.first
    assert live.first
    assert kept.first.origin == live.first.origin
    assert (kept.first.rank, kept.first.layer, kept.first.chunk, kept.first.token) == (2, 3, 1, 9)
    assert (old.tokens, old.text) == (tokens, text)
    assert old.trace.events == trace.events
    assert str(old.verdict()) == verdict
    assert "rank 0 holds 24" in str(old.kv())


def test_what_was_taken_of_it_before_answers_too(session: Session) -> None:
    old = done(session)
    kv = old.kv()
    done(session)
    assert kv.diff().equal


def test_only_what_needs_values_is_refused_in_one_sentence(session: Session) -> None:
    old = done(session)
    done(session)
    with pytest.raises(RunOver, match=r"run 1 is over, and only digests were kept of its KV: .*keep=True"):
        _ = old.kv(layer=1).k[0, :2]
    for call in (old.sha256, lambda: old.hidden(0, 1), lambda: old.attention(0, 0), lambda: old.replay(0)):
        with pytest.raises(RunOver, match="this run is over"):
            call()


def test_values_are_kept_where_asked_for(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    old = done(session, keep=True)
    before, sums = old.kv(layer=4, rank=1).v[:, :].clone(), old.sha256()
    new = done(session)
    said = capsys.readouterr().out
    assert old.kept
    assert old.kept.folder
    assert f"run 1 keeps its KV, {old.kept.nbytes / (1 << 10):.0f} KiB, in {old.kept.folder}" in said
    assert old.kv(layer=4, rank=1).v[:, :].equal(before)
    assert old.sha256() == sums
    assert new.kv().diff(old).equal
    folder = old.kept.folder
    session.runs.limit = 1
    del old
    gc.collect()
    assert not folder.exists(), "its folder goes with the run"


def test_what_a_killed_session_has_kept_goes_and_what_is_held_stays(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left = tmp_path / f"{PREFIX}left"
    left.mkdir()
    (left / LOCK).touch()
    runs = [done(session, keep=True) for _ in range(2)]
    done(session)
    assert not left.exists()
    folders = [run.kept.folder for run in runs if run.kept and run.kept.folder]
    assert {folder.parent for folder in folders} == set(tmp_path.iterdir())
    assert len(folders) == 2
    session.runs.limit = 1
    del runs
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_hung_keeps_its_verdict(session: Session) -> None:
    old = session.prefill(IDS, chunk_size=8, schedule="batched", unsafe=True)
    with pytest.raises(RuntimeError, match="deadlock"):
        old.wait(DEADLINE_S)
    told = old.verdict()
    done(session)
    assert old.closed
    assert (old.verdict().kind, old.verdict().sentence) == (told.kind, told.sentence)
    assert "deadlock" in str(session.runs)


def test_the_first_nan_is_known_of_a_run_that_is_over(session: Session) -> None:
    old = session.prefill(IDS, chunk_size=8, paused=True)
    old.inject("nan", layer=2, chunk=0, where="compute")
    old.resume()
    old.wait(DEADLINE_S)
    told = str(old.where()).split("not finite")[1]
    done(session)
    assert str(old.where()).split("not finite")[1] == told
    assert "NaN" in old.kv().diff().verdict or "not finite" in str(session.runs)


def test_it_is_saved_without_values_and_opened(
    session: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = broken(session)
    old.decode(3)
    first, tokens = old.kv().diff().first, old.tokens
    done(session)
    saved = dinfer.open(old.save(tmp_path / "old"))
    assert "saved without hidden states and values of KV, which were not kept" in capsys.readouterr().out
    found = saved.diff().first
    assert first
    assert found
    assert (found.rank, found.layer, found.chunk, found.token) == (first.rank, first.layer, first.chunk, 9)
    assert list(saved.source().subject.ids[len(IDS) :]) == tokens
    assert saved.findings.state == "done"
    with pytest.raises(RunOver, match="only digests were kept"):
        old.save(tmp_path / "values", kv=[1])


def test_kept_values_are_saved(session: Session, tmp_path: Path) -> None:
    old = done(session, keep=True)
    value = old.kv(layer=1).k[0, 3].clone()
    done(session)
    saved = dinfer.open(old.save(tmp_path / "old"))
    assert saved.kv(layer=1).k[0, 3].equal(value)


def test_its_report_says_how_it_ended(model: Path, tmp_path: Path) -> None:
    with dinfer.connect("threads", n=3) as session:
        session.load(str(model), threads=1)
        old = done(session)
        done(session)
        saved = dinfer.open(old.report(tmp_path / "old.html"))
    assert saved.findings.state == "done"
    assert saved.findings.kv
    assert saved.findings.kv.equal


def test_the_last_run_of_a_closed_session_answers(model: Path) -> None:
    with session_on_threads(3, model) as session:
        run = done(session)
    assert run.kv().diff().equal
    assert session.runs["run 1"] is run


def test_one_that_had_not_begun_says_so(session: Session) -> None:
    old = session.prefill(IDS, chunk_size=8, paused=True)
    done(session)
    with pytest.raises(PlanError, match="no block is on ranks"):
        old.kv().diff()


# -- the list


def test_runs_are_listed_and_named(session: Session) -> None:
    assert str(session.runs) == "no runs yet: session.prefill(…) makes one"
    first = done(session)
    second = session.prefill(IDS, chunk_size=4, sync_strategy="ring", paused=True)
    assert [run.name for run in session.runs] == ["run 1", "run 2"]
    assert session.runs[1] is session.runs["run 1"] is session.runs["1"] is session.runs[-2] is first
    assert session.runs[-1] is session.runs[2] is second is session.run
    lines = str(session.runs).splitlines()
    assert lines[1].split("  ")[0] == "run 1"
    assert re.search(r"digests, \d+ KiB", lines[1])
    assert "paused" in lines[2]
    assert "ring" in lines[2]
    assert "on the ranks" in lines[2]
    assert "<table>" in session.runs._repr_html_()


def test_the_oldest_are_dropped_by_name(session: Session) -> None:
    session.runs.limit = 2
    runs = [done(session) for _ in range(3)]
    assert [run.name for run in session.runs] == ["run 2", "run 3"]
    assert "1 older run was dropped" in str(session.runs)
    with pytest.raises(
        NoSuch, match=r"run 1 was dropped, since the last 2 are kept .* there are run 2, run 3"
    ):
        _ = session.runs[1]
    assert runs[0].kv().diff().equal, "a variable still holds it"


def test_memory_is_bounded(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    old = done(session)
    done(session)
    assert old.kept
    monkeypatch.setattr("dinfer.session.runs.MOST_BYTES", old.kept.nbytes)
    done(session)
    assert [run.name for run in session.runs] == ["run 2", "run 3"]


@pytest.mark.parametrize("which", [0, 9, "run 9", "last", 1.5, -7])
def test_what_is_no_run_of_the_list(session: Session, which: object) -> None:
    done(session)
    with pytest.raises(NoSuch, match=r"there is no run .*; there are run 1"):
        _ = session.runs[which]  # type: ignore[index]


@pytest.mark.parametrize("limit", [0, True, "8"])
def test_a_limit_that_is_none(limit: object) -> None:
    with pytest.raises(NoSuch, match=r"limit is .*; it must be a whole number"):
        SessionRuns().limit = limit  # type: ignore[assignment]


def test_digests_of_alike_ranks_are_kept_once(session: Session) -> None:
    old = done(session)
    done(session)
    config = old.kv().source().subject
    assert old.kept
    assert old.kept.nbytes == len(IDS) * 6 * 2 * config.kv_heads * 8


# -- two of them


def test_equal_runs_are_compared(session: Session) -> None:
    old = done(session)
    old.decode(4)
    new = done(session, sync_strategy="ring")
    new.decode(4)
    found = session.runs.compare(2, 1)
    assert found.equal
    assert found.kv
    assert "this run and run 1 hold the same" in found.kv.verdict
    assert "the same new tokens, the first 4" in str(found)
    rows = {name: cells for name, *cells in found.rows}
    assert rows["sync strategy"] == ["ring", "pairwise", "≠"]
    assert rows["state"] == ["done", "done", ""]
    assert rows["new tokens"] == ["4", "4", ""]
    assert "took" in found.time


def test_the_first_block_that_differs_is_named(session: Session) -> None:
    broken(session)
    done(session)
    done(session)
    found = session.runs.compare("run 1", "run 2")
    assert not found.equal
    assert found.first_block == (1, 3)
    assert "KV differs, first at block c1 l3; rank 2 of run 1 differs" in str(found)
    assert session.runs[2].compare(session.runs[3]).equal


def test_a_saved_run_is_compared(session: Session, tmp_path: Path) -> None:
    old = done(session)
    old.decode(3)
    saved = dinfer.open(old.save(tmp_path / "old"))
    new = done(session)
    new.decode(4)
    found = new.compare(saved)
    assert found.equal
    assert found.table().columns[2] == "saved run 'old'"


def test_runs_of_other_prompts_are_compared_but_for_their_kv(session: Session) -> None:
    done(session)
    new = session.prefill(OTHER, chunk_size=8)
    new.wait(DEADLINE_S)
    found = new.compare(session.runs[1])
    assert found.kv is None
    assert "KV was not compared: this run and run 1 are of different prompts" in str(found)
    assert "whose times cannot be compared" in str(found)


def test_what_cannot_be_compared_with(session: Session) -> None:
    run = done(session)
    with pytest.raises(PlanError, match=r"'run 1' cannot be compared with: .*session\.runs\[1\]"):
        run.compare("run 1")


def test_other_new_tokens_are_an_error_where_kv_cannot_be_compared(session: Session) -> None:
    old = done(session)
    old.decode(3)
    new = session.prefill(OTHER, chunk_size=8, max_new_tokens=3)
    new.decode(3)
    found = new.compare(old)
    assert found.kv is None
    assert found.first_token is not None
    assert found.severity == Severity.ERROR
    assert [severity for severity, _ in found.said()] == [Severity.NOTE, Severity.ERROR]
    alike = replace(found, first_token=None)
    assert alike.severity == Severity.NOTE


def test_a_report_of_two_saved_runs_says_where_their_kv_differs(session: Session, tmp_path: Path) -> None:
    old = broken(session)
    old.decode(3)
    old.save(tmp_path / "one")
    new = done(session)
    new.decode(3)
    new.save(tmp_path / "two")
    folders = [str(tmp_path / name) for name in ("one", "two")]
    made = CliRunner().invoke(app, ["report", *folders, "-o", str(tmp_path / "both.html")])
    assert made.exit_code == 0, made.output
    page = (tmp_path / "both.html").read_text(encoding="utf-8")
    said = re.findall(r'<p class="between"><b class="mark" data-severity="(\w+)">.*?</b> (.*?)</p>', page)
    assert said[0][0] == "error"
    assert "KV differs, first at block c1 l3; rank 2 of saved run" in said[0][1]
    assert "new token" in said[1][1]
