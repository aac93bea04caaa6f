"""Answers by rank, with futures instead of engines."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from dinfer.cluster.ipyparallel.calls import Calls, EngineCondition, call_expression, evaluate
from dinfer.cluster.ipyparallel.errors import RankError, RankGone, RankSilent
from dinfer.cluster.ipyparallel.facts import VERSIONS
from dinfer.version import __version__


class RemoteError(Exception):
    """As ipyparallel's."""

    def __init__(self, ename: str, evalue: str) -> None:
        super().__init__(evalue)
        self.ename, self.evalue, self.traceback = ename, evalue, "Traceback …"


def answered(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    if isinstance(value, Exception):
        future.set_exception(value)
    else:
        future.set_result(value)
    return future


def calls(**futures: Future[Any]) -> Calls:
    """r0=…, r1=…"""
    by_rank = {int(name[1:]): future for name, future in futures.items()}
    return Calls(by_rank, {rank: f"rank {rank}" for rank in by_rank})


def test_answers_come_in_the_order_of_ranks() -> None:
    assert calls(r0=answered("a"), r1=answered("b")).result(1) == ["a", "b"]


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (RemoteError("ValueError", "no"), RankError, r"^rank 1: ValueError: no$"),
        (RemoteError("EngineError", "Engine 1 died"), RankGone, r"^rank 1 ended during a call"),
        (1, RankSilent, r"^rank 0 has not answered within 0\.01 s\."),
    ],
)
def test_the_first_that_fails_is_named(given: object, kind: type[RankError], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        calls(r0=Future(), r1=answered(given)).result(0.01)
    assert caught.value.traceback == ("Traceback …" if kind is RankError else "")


@pytest.mark.parametrize(
    ("condition", "silent", "given_up"),
    [
        (
            "runs",
            "it is busy, most likely with a %%px cell",
            "has lost its connection to the cluster during a call",
        ),
        ("stopped", "its process is stopped. `kill -CONT`", "is stopped (by SIGSTOP or a debugger)"),
        ("gone", "its process has ended", "ended during a call"),
    ],
)
def test_dead_stopped_and_busy_are_told_apart(condition: EngineCondition, silent: str, given_up: str) -> None:
    ended = answered(RemoteError("EngineError", "Engine 1 died"))
    made = Calls({0: Future(), 1: ended}, {0: "rank 0", 1: "rank 1"}, lambda _: condition)
    late, gone = made.result(0.01, check=False)
    assert isinstance(late, RankSilent)
    assert isinstance(gone, RankGone)
    assert f"rank 0 has not answered within 0.01 s: {silent}" in str(late)
    assert f"rank 1 {given_up}" in str(gone)
    assert "session.recover()" in str(late)
    assert "session.recover()" in str(gone)


def test_a_failure_is_not_waited_for() -> None:
    with pytest.raises(RankError):
        calls(r0=Future(), r1=answered(RemoteError("ValueError", "no"))).result()


def test_unchecked_errors_stand_in_their_places() -> None:
    given = calls(r0=answered(1), r1=answered(RemoteError("KeyError", "'x'")), r2=Future())
    first, second, third = given.result(0.01, check=False)
    assert first == 1
    assert isinstance(second, RankError)
    assert isinstance(third, RankSilent)
    assert not given.done()


class Gone:
    """A client that has no engines."""

    ids: tuple[int, ...] = ()


def test_an_engine_that_has_ended_is_not_asked() -> None:
    with pytest.raises(RankGone, match=r"^rank 2 \(engine 4\) has ended\."):
        evaluate(Gone(), "1", {2: 4}, {2: "rank 2 (engine 4)"}).result(0)


def test_a_call_is_text() -> None:
    assert eval(call_expression("os.path:join", ["a", "b\"'\\"])) == "a/b\"'\\"
    assert eval(call_expression("json:dumps", [{"x": [1, None, True]}])) == '{"x": [1, null, true]}'
    assert eval(VERSIONS).keys() == {"python", "dinfer", "cuda", "hidden", "stuck", "host", "torch", "cpu"}


def test_a_file_that_hides_a_package_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "msgspec.py").touch()
    (tmp_path / "numpy").mkdir()  # not a package: hides nothing
    monkeypatch.chdir(tmp_path)
    assert eval(VERSIONS)["hidden"] == []
    monkeypatch.syspath_prepend("")
    assert eval(VERSIONS)["hidden"] == [str(tmp_path / "msgspec.py")]


def facts_of_an_engine_in(folder: Path) -> dict[str, Any]:
    """What an engine that was started by hand in that folder tells: Python takes modules from there first."""
    code = f"import sys; sys.path.insert(0, ''); print(__import__('json').dumps({VERSIONS}))"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=250, check=True, cwd=folder
    )
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


def test_a_file_that_hides_a_module_of_python_is_seen_where_it_matters(tmp_path: Path) -> None:
    (tmp_path / "turtle.py").write_text("", encoding="utf-8")  # nothing takes it
    (tmp_path / "mine.py").write_text("raise ImportError", encoding="utf-8")
    whole = facts_of_an_engine_in(tmp_path)
    assert (whole["hidden"], whole["dinfer"]) == ([], __version__)
    (tmp_path / "calendar.py").write_text("", encoding="utf-8")  # taken, which nobody may notice for long
    assert facts_of_an_engine_in(tmp_path)["hidden"] == [str(tmp_path / "calendar.py")]
    (tmp_path / "dataclasses.py").write_text("", encoding="utf-8")
    broken = facts_of_an_engine_in(tmp_path)
    assert {"no dinfer", "no torch"} & broken.keys()
    assert {Path(file).name for file in broken["hidden"]} == {"dataclasses.py"}
    for name in ("calendar.py", "dataclasses.py"):
        (tmp_path / name).unlink()
    (tmp_path / "tempfile.py").write_text("raise OSError", encoding="utf-8")
    assert "tempfile.py" in {Path(file).name for file in facts_of_an_engine_in(tmp_path)["hidden"]}


@pytest.mark.parametrize("function", ["os.getpid", "os:", ":getpid", "os:getpid()", "os;x:getpid"])
def test_a_function_is_named_by_its_module(function: str) -> None:
    with pytest.raises(ValueError, match="must be module:function"):
        call_expression(function, [])


def test_arguments_survive_json() -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        call_expression("os:listdir", [object()])


def test_a_file_that_hides_a_module_and_does_not_end_is_named(tmp_path: Path) -> None:
    """Else the engine would be told as busy with a cell."""
    waiting = "import threading\nthreading.Event().wait()\n"
    (tmp_path / "calendar.py").write_text(waiting, encoding="utf-8")
    assert facts_of_an_engine_in(tmp_path)["stuck"] == str(tmp_path / "calendar.py")


def test_files_beside_it_that_hide_an_installed_package_are_named_before_they_are_imported(
    tmp_path: Path,
) -> None:
    (tmp_path / "regex.py").write_text("while True: pass", encoding="utf-8")
    (tmp_path / "tqdm").mkdir()
    (tmp_path / "tqdm" / "__init__.py").touch()
    (tmp_path / "mine.py").touch()  # hides nothing
    hidden = [str(tmp_path / "regex.py"), str(tmp_path / "tqdm" / "__init__.py")]
    assert facts_of_an_engine_in(tmp_path)["hidden"] == hidden
