"""Cells of a notebook that run in a watched process."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dinfer.watch.probe.cells import Cells
from dinfer.watch.probe.reading import read
from dinfer.watch.probe.recorder import OpRecorder
from dinfer.watch.probe.records import WatchedProcess


class Events:
    """As IPython's: what was registered is called by name."""

    def __init__(self) -> None:
        self.called: dict[str, list[Any]] = {}

    def register(self, name: str, call: Any) -> None:
        self.called.setdefault(name, []).append(call)

    def unregister(self, name: str, call: Any) -> None:
        self.called[name].remove(call)

    def trigger(self, name: str) -> None:
        for call in self.called[name]:
            call()


def test_the_last_cell_and_what_ended_it(tmp_path: Path) -> None:
    events = Events()
    recorder = OpRecorder(tmp_path)
    shell = SimpleNamespace(events=events, last_execution_result=None)
    at_ends: list[str] = []
    cells = Cells(recorder, shell, lambda: at_ends.append(process().cell))

    def process() -> WatchedProcess:
        (found,) = read(tmp_path)
        return found

    assert process().cell == "ended"
    events.trigger("pre_execute")
    assert process().cell == "running"
    try:
        raise ValueError("a shape")
    except ValueError as error:
        shell.last_execution_result = SimpleNamespace(error_in_exec=error)
        events.trigger("post_execute")
    found = process()
    assert found.cell == "ended"
    assert found.cell_raised
    assert (found.cell_raised.type, found.cell_raised.message) == ("ValueError", "a shape")
    assert found.cell_raised.file == __file__
    assert found.exception is None
    events.trigger("pre_execute")
    shell.last_execution_result = SimpleNamespace(error_in_exec=None)
    events.trigger("post_execute")
    assert (process().cell, process().cell_raised) == ("ended", None)
    assert at_ends == ["running", "running"]  # what a cell did is written before its end is
    cells.remove()
    assert not any(events.called.values())
    recorder.close()
