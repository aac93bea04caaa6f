"""What cannot be meant is refused in one sentence: what was given, and what may be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dinfer
from dinfer.arguments import CallError
from dinfer.config import ConfigError
from dinfer.errors import ModelError, NotPossible
from dinfer.plan.ops import PlanError
from dinfer.run.run import Run
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
    "step n=1.5": (lambda run: run.step(n=1.5), CallError, "n is 1.5; it must be a whole number"),  # type: ignore[arg-type]
    "step n='2'": (lambda run: run.step(n="2"), CallError, "n is '2'; it must be a whole number"),  # type: ignore[arg-type]
    "step n=True": (lambda run: run.step(n=True), CallError, "n is True; it must be"),
    "decode": (lambda run: run.decode(2.5), CallError, "max_new_tokens is 2.5; it must be a whole number"),  # type: ignore[arg-type]
    "run_to chunk='a'": (
        lambda run: run.run_to("a", 1), PlanError, "chunk is 'a'; it must be a whole number from 0 to 1",  # type: ignore[arg-type]
    ),
    "run_to layer=1.5": (
        lambda run: run.run_to(0, 1.5), PlanError, r"layer is 1\.5; it must be a whole number from 0 to 1",  # type: ignore[arg-type]
    ),
    "diff('reference')": (
        lambda run: run.kv().diff("reference"), CallError,  # type: ignore[arg-type]
        r'other is \'reference\'; .*run\.compare\("reference"\) compares with transformers',
    ),
    "absmax": (
        lambda run: run.break_at(when="absmax > 1.2.3"), PlanError, "when is 'absmax > 1.2.3'; it must be one of",
    ),
    "save kv=5": (lambda run: run.save("x", kv=5), CallError, r"kv is 5; it must be True or False or a list"),  # type: ignore[arg-type]
    "save kv='all'": (lambda run: run.save("x", kv="all"), CallError, "kv is 'all'; it must be True or False"),  # type: ignore[arg-type]
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
    with pytest.raises((ConfigError, CallError), match=r"prompt is .*; it must be text"):
        session.prefill(given)
    with pytest.raises(CallError, match=r"prompts is .*; it must be text"):
        session.sweep([given, "Lima"], chunk_size=4, max_new_tokens=1)
    assert session.run is run
    assert not run.closed


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


def test_without_a_checkpoint_there_is_no_run() -> None:
    with dinfer.connect("threads", 1) as session:
        with pytest.raises(
            NotPossible, match=r'no checkpoint is loaded: session\.load\(.*session\.load\("demo"\)'
        ):
            session.prefill(IDS)
        assert session.spec is None


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"chunk": [4]}, r"unknown parameter 'chunk'\. Did you mean chunk_size\?"),
        ({"chunk_size": [4, 0]}, "chunk_size is 0; it must be at least 1"),
        ({"pause": True}, r"unknown parameter 'pause'\. Did you mean paused\?"),
        ({"paused": ["x"]}, "paused is 'x'; it must be True or False"),
        ({"sync_strategy": "rings"}, r"must be one of pairwise, ring.*Did you mean ring\?"),
    ],
)
def test_a_sweep_refuses_what_no_run_can_have(
    session: Session, parameters: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        session.sweep(IDS, **parameters)


def test_a_sweep_takes_what_prefill_takes(session: Session) -> None:
    (row,) = session.sweep(IDS, paused=True, max_new_tokens=1).rows
    assert not row["error"]


@pytest.mark.parametrize("n", ["3", 0, 2.0, True, 10_000, 10**400])
def test_a_number_of_ranks_that_is_none(n: Any) -> None:
    with pytest.raises(
        (ConfigError, CallError), match=r"n is .*; it must be (a whole number|from 1 to 9999)"
    ):
        dinfer.connect("threads", n)


@pytest.mark.parametrize(
    "given", [{"profile": "lab"}, {"cluster_id": "a"}, {"start": True}, {"start": False}, {"take": True}]
)
def test_threads_take_nothing_of_a_cluster(given: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match=rf"{next(iter(given))} is .*, but ranks that are threads have no cluster"
    ):
        dinfer.connect("threads", 2, **given)


@pytest.mark.parametrize("name", ["", " "])
def test_no_name_is_not_the_working_folder(session: Session, name: str) -> None:
    with pytest.raises(ModelError, match="no folder is given, but an empty name"):
        session.load(name)


def test_a_prompt_may_be_in_a_file(session: Session, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("ab\n", encoding="utf-8")
    run = session.prefill(prompt_file=str(tmp_path / "prompt.txt"), paused=True)
    assert run.job.ids == session.prefill("ab", paused=True).job.ids
    with pytest.raises(ConfigError, match=r"prompt_file '.*no-such' cannot be read: No such file"):
        session.prefill(prompt_file=str(tmp_path / "no-such"))
    with pytest.raises(ConfigError, match="prompt and prompt_file are given, but a run has one prompt"):
        session.prefill("ab", prompt_file=str(tmp_path / "prompt.txt"))


def test_a_place_of_ranks_that_there_is_not() -> None:
    with pytest.raises(ConfigError, match=r"'thread' is no place for ranks; .*\. Did you mean threads\?"):
        dinfer.connect("thread")


def test_what_can_only_be_meant_one_way_needs_no_name(run: Run) -> None:
    assert str(run.kv(0)) == str(run.kv(layer=0))
    assert str(run.hidden(0, 1)) == str(run.hidden(chunk=0, layer=1))
    assert str(run.attention(0, 0)) == str(run.attention(layer=0, chunk=0))


def test_token_ids_may_be_given_by_the_name_that_errors_use(session: Session) -> None:
    assert session.prefill(prompt_ids=[5, 17, 3], paused=True).job.ids == (5, 17, 3)
    with pytest.raises(ConfigError, match="prompt is None"):
        session.prefill()


def test_tab_offers_what_is_made_for_users(session: Session, run: Run) -> None:
    def offered(thing: object) -> list[str]:
        return [name for name in dir(thing) if not name.startswith("_")]

    assert offered(run) == [
        "at", "attention", "bisect", "break_at", "breakpoints", "calls", "closed", "compare", "config", "corrupt",
        "decode", "edited", "failure", "faults", "go_to", "graft", "hang", "hidden", "inject", "kv", "message", "name",
        "pause", "plan", "play", "prediction", "replay", "report", "restart", "resume", "resume_back", "run_to", "save",
        "severity", "sha256", "source", "standing", "step", "step_back", "stretch", "text", "tokens", "trace", "undo",
        "verdict", "wait", "where", "world_size",
    ]  # fmt: skip
    assert offered(session) == [
        "close", "debugger", "listen_for_debugger", "load", "log", "measure", "prefill", "recover", "run", "runs",
        "spec", "sweep", "watch", "world_size",
    ]  # fmt: skip


def test_whatever_a_cell_ends_with_is_short(session: Session, run: Run) -> None:
    things = [
        session,
        run,
        run.plan,
        run.job,
        run.trace,
        run.config,
        run.where(),
        run.verdict(),
        run.kv(),
        session.spec,
    ]
    for thing in [*things, run.kv().diff(), run.standing(), run.source(), run.faults, run.breakpoints]:
        assert repr(thing).count("\n") < 30, type(thing)
        assert len(repr(thing)) < 2000, type(thing)
