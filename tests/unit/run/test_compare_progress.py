"""`run.compare` says how far it is, and an interrupt ends it on the ranks, too."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dinfer.model.reference import Forward
from dinfer.run.run import Run
from tests.support.threads import session_on_threads
from tests.support.traces import PROMPT

DEADLINE_S = 60.0


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    monkeypatch.setattr("dinfer.rank.reference.TELL_S", -1)
    with session_on_threads(2, Path("demo")) as session:
        run = session.prefill(PROMPT, chunk_size=8)
        run.wait(DEADLINE_S)
        yield run


def make_long(patch: pytest.MonkeyPatch) -> threading.Event:
    """The reference is fed its second chunk only once this is set."""
    feed, go_on = Forward.feed, threading.Event()
    fed = list[object]()

    def waiting(forward: Forward, ids: Any) -> Any:
        if fed:
            assert go_on.wait(DEADLINE_S)
        fed.append(ids)
        return feed(forward, ids)

    patch.setattr(Forward, "feed", waiting)
    return go_on


def test_a_long_one_has_a_bar_and_a_line_in_views(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dinfer.run.inspect.BAR_S", 0.0)
    go_on, said = make_long(monkeypatch), "comparing with the reference: rank 0: "
    run.on_change(lambda: go_on.set() if run.standing().message.startswith(said) else None)
    assert run.compare("reference").equal
    tokens = len(run.job.ids)
    assert f"| {tokens}/{tokens} [" in capsys.readouterr().err.rpartition("rank 0: reference: 100%")[2]
    assert run.standing().message == ""


def test_a_short_one_has_none(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run.compare("reference").equal
    assert "reference" not in capsys.readouterr().err


def test_an_interrupt_ends_it_and_the_next_one_works(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def interrupted(_: Any, reported: Any, *__: Any, **___: Any) -> Iterator[Any]:
        def show() -> None:
            if reported(0):
                go_on.set()
                raise KeyboardInterrupt

        yield show

    with monkeypatch.context() as patch:
        go_on = make_long(patch)
        patch.setattr("dinfer.run.inspect.rank_bars", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.compare("reference")
    assert run.standing().state == "done"
    assert run.standing().message == "interrupted: the run is done"
    assert run.compare("reference").equal
