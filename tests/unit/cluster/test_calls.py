"""Answers by rank, with futures instead of engines."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from dinfer.cluster.ipyparallel.calls import Calls, call_expression, evaluate
from dinfer.cluster.ipyparallel.errors import RankError, RankGone, RankSilent
from dinfer.cluster.ipyparallel.facts import VERSIONS


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
    assert eval(VERSIONS).keys() == {"python", "dinfer", "cuda", "hidden"}


def test_a_file_that_hides_a_package_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "msgspec.py").touch()
    (tmp_path / "numpy").mkdir()  # not a package: hides nothing
    monkeypatch.chdir(tmp_path)
    assert eval(VERSIONS)["hidden"] == []
    monkeypatch.syspath_prepend("")
    assert eval(VERSIONS)["hidden"] == [str(tmp_path / "msgspec.py")]


@pytest.mark.parametrize("function", ["os.getpid", "os:", ":getpid", "os:getpid()", "os;x:getpid"])
def test_a_function_is_named_by_its_module(function: str) -> None:
    with pytest.raises(ValueError, match="must be module:function"):
        call_expression(function, [])


def test_arguments_survive_json() -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        call_expression("os:listdir", [object()])
