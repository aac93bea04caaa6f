"""What programs do that the probe must bear: it changes nothing of theirs, and goes on recording."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import dinfer
from dinfer.watch.probe import recorder
from dinfer.watch.probe.imports import ImportWatch
from dinfer.watch.probe.records import WatchedProcess
from tests.support.probed import Watched


def well(watched: Watched) -> WatchedProcess:
    """What has been recorded, by a probe that has met no problem."""
    process = watched()
    assert process.problems == []
    return process


@pytest.mark.usefixtures("fake")
def test_ranks_of_a_group_that_can_be_gone_through_once(watched: Watched) -> None:
    group = dist.new_group(map(int, ["1", "2"]), backend="fake")
    assert dist.get_process_group_ranks(group) == [1, 2]
    dist.all_reduce(torch.ones(2), group=group)
    assert [op.kind for op in well(watched).ops] == ["new_group", "all_reduce"]


@pytest.mark.usefixtures("fake")
def test_ranks_that_are_none_are_torchs_to_refuse(watched: Watched) -> None:
    with pytest.raises((TypeError, ValueError)):
        dist.new_group(["one", None])
    dist.all_reduce(torch.ones(2))
    assert [op.kind for op in well(watched).ops][-1] == "all_reduce"


@pytest.mark.usefixtures("fake")
def test_a_label_that_is_no_small_number(watched: Watched) -> None:
    """A request's id, say."""
    with dinfer.label(chunk=2**40, layer=3):
        dist.all_reduce(torch.ones(2))
    dist.all_reduce(torch.ones(2))
    assert [(op.layer, op.chunk) for op in well(watched).ops] == [(3, None), (None, None)]


@pytest.mark.usefixtures("fake")
def test_an_exception_whose_text_cannot_be_made_is_handled_while_ops_go_on(watched: Watched) -> None:
    class Silent(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    for error in (Silent(), AssertionError(torch.ones(2))):
        try:
            raise error
        except (Silent, AssertionError):
            dist.all_reduce(torch.ones(2))
    process = well(watched)
    assert len(process.ops) == 2
    assert [one.message for one in process.handled] == ["", "(Tensor)"]


@pytest.mark.usefixtures("fake")
def test_after_many_handled_exceptions_the_last_is_told(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "MOST_RAISED", 2)
    for error in [ValueError(number) for number in range(5)]:
        try:
            raise error
        except ValueError:
            dist.all_reduce(torch.ones(2))
    watched.probe.recorder.raised(RuntimeError("the end"), "exception")
    process = well(watched)
    assert len(process.handled) == 2
    assert process.exception is not None
    assert process.exception.message == "the end"


def test_all_who_ask_for_a_module_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wanted_by_two.py").write_text("value = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    imports, got = ImportWatch(), list[str]()

    def act(name: str) -> Callable[[types.ModuleType], None]:
        return lambda module: got.append(f"{name} {module.value}")

    imports.add("wanted_by_two", act("one"))
    imports.add("wanted_by_two", act("two"))
    try:
        import wanted_by_two  # type: ignore[import-not-found]  # noqa: F401
    finally:
        imports.remove()
        sys.modules.pop("wanted_by_two", None)
    assert got == ["one 3", "two 3"]
