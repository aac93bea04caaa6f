"""What a session tells of its runs: findings, what is left out unless asked for, runs that have failed; on threads."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import dinfer
from dinfer.cluster.threads import LocalRanks
from dinfer.config import Config
from dinfer.errors import NotPossible
from dinfer.files import FolderError
from dinfer.run.report import Done, commands, machine, parameters, versions
from dinfer.run.run import Run
from dinfer.session.session import Session
from dinfer.trace.findings import Findings, findings_of
from dinfer.trace.trace import Trace
from tests.support.runs import wait_for
from tests.support.threads import engines

PROMPT = "The code of Lima is 471. What is the code of Lima? The code of Lima is"


class Written:
    """In place of views: keeps what it is to write."""

    def __init__(self) -> None:
        self.traces: list[Trace] = []

    def __call__(self, trace: Trace, path: Path) -> Path:
        self.traces.append(trace)
        return path

    @property
    def findings(self) -> Findings:
        """Of the last one."""
        return findings_of(self.traces[-1])


@pytest.fixture
def written() -> Written:
    return Written()


@pytest.fixture
def session(written: Written) -> Iterator[Session]:
    """Two ranks with the demo model."""
    with Session(LocalRanks(2), write=written) as made:
        yield made.load("demo", threads=1)


def done(session: Session, **parameters: Any) -> Run:
    """A run at the end of its prefill."""
    run = session.prefill(PROMPT, chunk_size=8, **parameters)
    run.wait(60)
    return run


def test_a_run_that_went_well(session: Session, written: Written) -> None:
    run = done(session)
    run.decode(3)
    assert run.report("some.html") == Path("some.html")
    found = written.findings
    assert (found.state, found.failure, found.proved) == ("done", "", True)
    assert [rank.kv_sha256 for rank in found.ranks] == run.sha256()
    assert [rank.tokens for rank in found.ranks] == [tuple(run.tokens)] * 2
    assert found.positions == tuple(tuple(len(lane.ops) for lane in lanes) for lanes in run.plan.lanes)
    assert found.parameters["chunk_size"] == 8
    assert found.versions["torch"]
    assert found.plan == ""  # shape and schedule say all of it
    assert written.traces[-1].events == run.trace.events
    assert len(list(run.trace.prefill())) == sum(len(lane.ops) for lanes in run.plan.lanes for lane in lanes)


def test_prompt_text_and_environment_only_where_asked_for(
    session: Session, written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DINFER_SECRET", "hush hush")
    run = done(session)
    run.decode(2)
    run.report()
    assert not any(word in repr(written.traces[-1].about) for word in ("Lima", "hush hush"))
    assert (written.findings.prompt, written.findings.text, written.findings.environment) == (
        None,
        None,
        None,
    )
    run.report(prompt=True, environment=True)
    found = written.findings
    assert (found.prompt, found.text) == (PROMPT, run.text)
    assert "".join(found.chunk_texts) == PROMPT
    assert PROMPT in found.commands["In a notebook"]
    assert found.environment
    assert found.environment["DINFER_SECRET"] == "hush hush"


def test_a_report_into_no_folder_is_refused_at_once(
    session: Session, written: Written, tmp_path: Path
) -> None:
    run = session.prefill(PROMPT, chunk_size=8, paused=True)
    calls: list[object] = []
    run._recorder.findings = calls.append  # type: ignore[assignment]
    (tmp_path / "file").touch()
    with pytest.raises(
        FolderError, match=rf"^'{tmp_path}/file' is no folder, so nothing can be written into it$"
    ):
        run.report(tmp_path / "file" / "new" / "x.html")
    with pytest.raises(FolderError, match=r"is a folder, and a file is to be written: add its name$"):
        run.report(tmp_path)
    with pytest.raises(
        NotPossible, match=r"^a report is an HTML page, and 'r\.pdf' ends in \.pdf: give a name that"
    ):
        run.report(tmp_path / "r.pdf")
    assert (calls, written.traces) == ([], [])


def test_a_run_that_stands_midway_says_where_and_why(session: Session, written: Written) -> None:
    run = session.prefill(PROMPT, chunk_size=8, paused=True)
    run.break_at(layer=2, chunk=1)
    run.resume()
    run.wait(60)
    run.report()
    found = written.findings
    assert found.state == "paused"
    assert found.breakpoints == ("#1: after layer 2, chunk 1",)
    assert found.hits == ("stopped at #1: after layer 2, chunk 1",)
    assert [rank.kv_sha256 for rank in found.ranks] == ["", ""]
    assert [rank.tokens for rank in found.ranks] == [None, None]
    assert found.positions == tuple(stand.positions for stand in run.standing().stands)


def test_a_report_waits_until_a_free_run_stands(session: Session, written: Written) -> None:
    session.prefill(PROMPT, chunk_size=4).report()
    assert written.findings.state == "done"
    assert len({rank.kv_sha256 for rank in written.findings.ranks}) == 1


def test_a_run_that_failed_is_reported_with_its_error(
    session: Session, written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = session.prefill(PROMPT, chunk_size=8, paused=True)
    run.step("layer")
    broken = engines(session)[1].decoder  # type: ignore[attr-defined]

    def fail(*_: object, **__: object) -> None:
        raise ValueError("the layer has <b>broken</b>")

    monkeypatch.setattr(type(broken), "layer", fail)
    run.resume()
    wait_for(lambda: bool(run.failure), "the failure is known")
    run.report()
    found = written.findings
    assert found.state == "failed"
    assert "the layer has <b>broken</b>" in found.failure
    assert any("ValueError: the layer has <b>broken</b>" in rank.error for rank in found.ranks)
    assert [rank.kv_sha256 for rank in found.ranks] == ["", ""]


def test_the_log_of_a_run_holds_nothing_of_other_runs(session: Session, written: Written) -> None:
    first = session.prefill(PROMPT, chunk_size=8, paused=True)
    first.step("layer")
    assert session.recover()  # which is told of the run that it ended
    second = session.prefill("another prompt", chunk_size=4)
    second.wait(60)
    second.report()
    assert [line.split(" ", 1)[1] for line in written.findings.log] == ["run: 14 tokens, pipelined, pairwise"]
    lines = " ".join(session.log)
    assert "loaded demo" in lines
    assert "all ranks have met" in lines


def test_what_a_run_was_stopped_by_is_in_its_log(session: Session, written: Written) -> None:
    run = session.prefill(PROMPT, chunk_size=8, paused=True)
    run.break_at(layer=2, chunk=1)
    run.resume()
    run.wait(60)
    wait_for(lambda: any("stopped at #1" in line for line in session.log), "the news has come")
    run.report()
    assert any("stopped at #1: after layer 2, chunk 1" in line for line in written.findings.log)


def test_earlier_runs_of_the_same_prompt_stand_beside(session: Session, written: Written) -> None:
    done(session, sync_strategy="ring")
    session.prefill("another prompt", chunk_size=4).wait(60)
    run = session.prefill(PROMPT, chunk_size=8, paused=True)
    run.run_to(0, 1)  # not ended, so nothing to compare with
    done(session, sync_strategy="pairwise").report()
    (other,) = written.findings.others
    assert (other["sync_strategy"], other["name"]) == ("ring", "run 1 of this session")
    assert other["prefill_s"] > 0


def test_a_plan_of_the_user_s_own_is_kept_as_text(session: Session, written: Written) -> None:
    edited = session.prefill(PROMPT, chunk_size=8, paused=True, schedule="lockstep").plan.text()
    edited = edited.replace("lane main", "lane mine")
    session.prefill(PROMPT, plan=edited).report()
    assert written.findings.plan == edited


def test_a_session_without_views_says_so() -> None:
    with Session(LocalRanks(1)) as session:
        run = session.load("demo", threads=1).prefill([5, 6, 7])
        with pytest.raises(RuntimeError, match="made without views"):
            run.report()


# -- commands that give it again


def test_commands_have_what_differs_from_the_default() -> None:
    config = Config(
        model_path="my model",
        prompt=PROMPT,
        schedule="lockstep",
        layer_split=(1, 2),
        unsafe=True,
        log_dir="x",
    )
    told = commands(config, Done(new_tokens=50), prompt=False)
    assert told["In a terminal"] == (
        "dinfer run --model-path 'my model' --world-size 3 --layer-split 1,2 --chunk-size 128 --sync-strategy pairwise "
        "--schedule lockstep --unsafe --prompt '…'"
    )
    assert told["In a notebook"].splitlines() == [
        "import dinfer",
        "session = dinfer.connect(n=3)",
        "session.load('my model')",
        "run = session.prefill('…', layer_split=(1, 2), chunk_size=128, sync_strategy='pairwise', schedule='lockstep', "
        "unsafe=True)",
        "run.wait(); run.decode(50)",
    ]


def again(session: Session, command: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The run that the command for a notebook makes, in this session."""
    monkeypatch.setattr(dinfer, "connect", lambda **_: session)
    space: dict[str, Any] = {}
    exec(command, space)
    run = space["run"]
    assert isinstance(run, Run)
    return run


def test_faults_and_tokens_come_again(
    session: Session, written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = session.prefill(PROMPT, chunk_size=8, paused=True)
    run.inject("bitflip", layer=1, chunk=1, tensor="V", head=1, token=9, dim=3, bit=20, where="wire")
    run.inject("permute", layer=0, chunk=0, seed=4)
    run.resume()
    run.wait(60)
    run.decode(3)
    run.report(prompt=True)
    assert next(iter(written.findings.commands)) == "In a terminal, without what was broken or edited"
    sums, tokens, armed = run.sha256(), run.tokens, [str(one.fault) for one in run.faults]
    assert len(set(sums)) > 1
    other = again(session, written.findings.commands["In a notebook"], monkeypatch)
    assert (other.sha256(), other.tokens) == (sums, tokens)
    assert [str(one.fault) for one in other.faults] == armed


def test_breakpoints_and_a_plan_of_the_user_s_own_come_again(
    session: Session, written: Written, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    edited = session.prefill(PROMPT, chunk_size=8, paused=True, schedule="lockstep").plan.text()
    run = session.prefill(PROMPT, plan=edited.replace("lane main", "lane mine"), paused=True)
    run.break_at(layer=2, chunk=1)
    run.break_at(rank=0, op="send", when="absmax > 1e9")
    run.resume()
    run.wait(60)
    run.report(prompt=True)
    assert list(written.findings.commands) == ["In a notebook"]
    cut = [stand.positions for stand in run.standing().stands]
    (tmp_path / "plan.txt").write_text(written.findings.plan)
    monkeypatch.chdir(tmp_path)
    other = again(session, written.findings.commands["In a notebook"], monkeypatch)
    assert other.plan.text() == run.plan.text()
    assert [stand.positions for stand in other.standing().stands] == cut
    assert [*map(str, other.breakpoints)] == [*map(str, run.breakpoints)]


def test_edits_are_said_not_to_come_again() -> None:
    told = commands(Config(prompt=PROMPT), Done(edited=True), prompt=False)
    assert told["In a notebook"].splitlines()[-1] == "# what was edited by hand is not repeated by this"


@pytest.mark.parametrize(
    "prompt", [{"prompt": "it's; $(rm x)"}, {"prompt_ids": (5, 6)}, {"prompt_file": "p.txt"}]
)
def test_commands_give_the_same_config_again(
    prompt: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shell's command through the command line itself, and the notebook's as Python."""
    from dinfer.cli import app, run

    config = Config.of(
        {**prompt, "world_size": 2, "dtype": "float32", "gpu_ids": (0, 1), "temperature": 0.5, "chat": True}
    )
    told = commands(config, Done(), prompt=True)
    seen: list[Config] = []
    monkeypatch.setattr(run, "_run_here", lambda config, *_: seen.append(config))
    ran = CliRunner().invoke(app, shlex.split(told["In a terminal"])[1:])
    assert (ran.exit_code, seen) == (0, [config])
    compile(told["In a notebook"], "notebook", "exec")


def test_parameters_are_those_of_the_run_without_its_prompt() -> None:
    found = parameters(Config(prompt=PROMPT))
    assert found["max_new_tokens"] == 50
    assert not {"prompt", "prompt_ids", "log_dir", "master_port"} & found.keys()


def test_machine_and_versions_are_told() -> None:
    assert all(machine().values())
    assert {"Python", "dinfer", "torch", "plotly"} <= versions().keys()
