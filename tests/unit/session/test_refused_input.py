"""What cannot be meant is refused in one sentence: what was given, and what may be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dinfer.config import ConfigError
from dinfer.plan.ops import PlanError
from dinfer.run.run import Run
from dinfer.saved.format import SavedError
from dinfer.session.session import Session

IDS = list(range(1, 9))


MODEL = {"layers": 2, "tokenizer": True}
RANKS = 2


@pytest.fixture
def run(session: Session) -> Run:
    """A run of 8 tokens in 2 chunks that stands after its first."""
    run = session.prefill(IDS, chunk_size=4, paused=True)
    run.run_to(0, 1)
    return run


CALLS: dict[str, tuple[Callable[[Run], Any], type[Exception], str]] = {
    "step n=1.5": (lambda run: run.step(n=1.5), PlanError, "n is 1.5; it must be a whole number"),  # type: ignore[arg-type]
    "step n='2'": (lambda run: run.step(n="2"), PlanError, "n is '2'; it must be a whole number"),  # type: ignore[arg-type]
    "step n=True": (lambda run: run.step(n=True), PlanError, "n is True; it must be"),
    "decode": (lambda run: run.decode(2.5), PlanError, "max_new_tokens is 2.5; it must be a whole number"),  # type: ignore[arg-type]
    "absmax": (
        lambda run: run.break_at(when="absmax > 1.2.3"), PlanError, "when is 'absmax > 1.2.3'; it must be one of",
    ),
    "save kv=5": (lambda run: run.save("x", kv=5), SavedError, r"kv is 5; it must be True, False, or a list"),  # type: ignore[arg-type]
    "save kv='all'": (lambda run: run.save("x", kv="all"), SavedError, r"kv is 'all'; it must be True, False"),  # type: ignore[arg-type]
    "head": (
        lambda run: run.attention(layer=0, chunk=0, head=4), PlanError, "there is no head 4: the heads are 0 to 3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_cannot_be_meant(run: Run, name: str) -> None:
    call, kind, said = CALLS[name]
    with pytest.raises(kind, match=said):
        call(run)
    assert run.standing().state == "paused"


@pytest.mark.parametrize("given", [5, None, b"Lima"])
def test_what_is_no_prompt(session: Session, run: Run, given: Any) -> None:
    with pytest.raises(ConfigError, match=r"prompt is .*; it must be text, or a list of token ids"):
        session.prefill(given)
    assert session.run is run
    assert not run.closed
    row, _ = session.sweep([given, "Lima"], chunk_size=4, max_new_tokens=1).rows
    assert "it must be text, or a list of token ids" in row["error"]


@pytest.mark.parametrize(("given", "name"), [("Lima", "Lima"), (IDS, "8 token ids"), ([IDS], "8 token ids")])
def test_one_prompt_is_one_run(session: Session, given: Any, name: str) -> None:
    rows = session.sweep(given, chunk_size=4, max_new_tokens=1).rows
    assert [(row["prompt"], row["error"]) for row in rows] == [(name, "")]


def test_a_run_whose_ranks_do_not_answer_is_a_row(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    prefill = session.prefill

    def late(*given: Any, **chosen: Any) -> Run:
        if chosen["chunk_size"] == 8:
            raise TimeoutError("no answer from rank 1 within 120 s")
        return prefill(*given, **chosen)

    monkeypatch.setattr(session, "prefill", late)
    rows = session.sweep([IDS], chunk_size=[4, 8], max_new_tokens=1).rows
    assert [row["error"] for row in rows] == ["", "no answer from rank 1 within 120 s"]


def test_a_folder_of_the_users_home_is_meant(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run.save("~/saved") == tmp_path / "saved"
    assert (tmp_path / "saved" / "run.json").is_file()
