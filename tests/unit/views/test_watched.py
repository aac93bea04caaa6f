"""The panel of watched programs: its parts, from evidence made by hand, and that it follows a watch to its end."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dinfer.errors import NotPossible
from dinfer.verdict.completed import OpFinding
from dinfer.verdict.verdict import Verdict
from dinfer.views.panel import watched
from dinfer.views.panel.watched import WatchPanel, parts_of
from dinfer.watch.probe.records import StacksTaken, ThreadLook, WatchedProcess
from dinfer.watch.probe.rows import RowsTaken
from dinfer.watching.events import trace_of
from dinfer.watching.evidence import Evidence
from dinfer.watching.held_rows import layers_of
from dinfer.watching.kv import WatchedKv
from dinfer.watching.live import Watch, WatchMoment
from dinfer.watching.signs import signs_of
from tests.support.made_processes import SECOND, op, process
from tests.support.runs import wait_for


def evidence(*processes: WatchedProcess, now: float = 4) -> Evidence:
    ranks = dict(enumerate(processes))
    now_ns = int(now * SECOND)
    signs = {rank: signs_of(one, None, now, now_ns) for rank, one in ranks.items()}
    return Evidence(trace_of(ranks), signs, now_ns, ranks)


def hung(code: Path) -> Evidence:
    """Both ranks send first, after a block that went well; rank 0 at a line of that file."""
    frames = (ThreadLook("MainThread", 1, ((str(code), 2, "main", "send(a < b)"),), 1),)
    at: dict[str, Any] = {"file": str(code), "line": 2, "layer": 1, "chunk": 0}
    return evidence(
        process(
            0,
            op(0, "all_reduce", 1, 1.5, layer=0, chunk=0),
            op(1, "send", 2, peer=1, **at),
            heartbeat_ns=4 * SECOND,
            stacks=[StacksTaken(3 * SECOND, 0, frames)],
        ),
        process(
            1,
            op(0, "all_reduce", 1, 1.5, layer=0, chunk=0),
            op(1, "send", 2, peer=0, layer=1, chunk=0),
            heartbeat_ns=4 * SECOND,
        ),
    )


@pytest.fixture
def code(tmp_path: Path) -> Path:
    path = tmp_path / "<script>.py"
    path.write_text("import torch\nsend(a < b)\n")
    return path


def shown(found: Evidence, verdict: Verdict | None = None) -> dict[str, str]:
    return parts_of(WatchMoment("torchrun runs", found, verdict))


def test_a_hang_is_shown_with_its_ranks_lines_blocks_and_stacks(code: Path) -> None:
    found = hung(code)
    parts = shown(found, found.verdict)
    assert list(parts) == ["banner", "table", "kv", "blocks", "timeline", "links", "stacks"]
    assert "torchrun runs" in parts["banner"]
    assert 'data-severity="error"' in parts["banner"]
    assert "`send c0 l1 -&gt; 1`" in parts["banner"]
    assert "<td>✖ 0</td>" in parts["table"]
    assert "<code>2: send(a &lt; b)</code>" in parts["table"]
    assert parts["blocks"].count("l0") == parts["blocks"].count("l1") == 1
    assert "all_reduce (default)" in parts["links"]
    assert "<summary>rank 0: " in parts["stacks"]


def test_a_long_run_says_that_older_ops_are_not_counted(code: Path) -> None:
    found = hung(code)
    assert "of the last ops" not in "".join(shown(found).values())
    found.processes[0].dropped = 700
    parts = shown(found)
    assert "<td>702</td>" in parts["table"]
    for name in ("blocks", "links"):
        assert "of the last ops of each rank" in parts[name]


def test_what_programs_say_is_text_and_no_markup(code: Path) -> None:
    parts = shown(hung(code), hung(code).verdict)
    assert not any("<script" in html.lower() for html in parts.values())


def test_a_wait_that_lasts_does_not_hide_what_came_before(code: Path) -> None:
    found = hung(code)
    long = Evidence(found.trace, found.signs, 4000 * SECOND, found.processes)
    assert "cut off at the right" in shown(long)["timeline"]
    ticks = [float(text) for text in re.findall(r">([\d.]+)</text>", shown(long)["timeline"])]
    assert 0 < max(ticks) <= 1.2  # seconds: when something happened


def test_without_layers_there_is_no_map_and_without_ranks_there_is_a_line() -> None:
    bare = shown(evidence(process(0, op(0, "barrier", 1, 2)), process(1, op(0, "barrier", 1, 2))))
    assert bare["blocks"] == ""
    assert bare["stacks"] == ""
    nothing = shown(Evidence(trace_of({})))
    assert "no rank has begun yet" in nothing["table"]
    assert nothing["timeline"] == nothing["links"] == ""


@pytest.mark.parametrize("layer", [-3, 2**30])
def test_numbers_of_layers_that_cannot_be_leave_the_map_out(layer: int) -> None:
    found = evidence(process(0, op(0, "barrier", 1, 2, layer=layer)))
    assert shown(found)["blocks"] == ""


def rows(start: int, *digests: int, chunk: int = 0) -> RowsTaken:
    taken = tuple((digest, -digest % 2**64) for digest in digests)
    return RowsTaken("kv", 1, 3, chunk, start, (taken,), 0, 0, "float32", (1, 2, len(digests), 8))


def test_what_is_wrong_with_kv_is_shown_also_while_a_run_hangs(code: Path) -> None:
    found = hung(code)
    assert shown(found)["kv"] == ""
    once = [rows(0, 1, 2), rows(2, 3, 4, chunk=1)]
    held = {0: once, 1: [*once[:1], rows(2, 1, 2, chunk=1)]}
    with_kv = replace(found, kv=WatchedKv({rank: layers_of(some) for rank, some in held.items()}))
    for verdict in (None, found.verdict):
        part = shown(with_kv, verdict)["kv"]
        assert "rank 1" in part
        assert "layer 3" in part
        assert part.count('data-severity="warning"') == len(with_kv.kv.diff()) == 1
        assert "<td>4</td>" in part  # tokens of a rank


def test_kv_that_is_not_read_to_its_end_is_not_compared(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank's rows may have been read further."""
    layers = {0: layers_of([rows(0, 1, 2)]), 1: layers_of([rows(0, 1)])}
    monkeypatch.setattr(WatchedKv, "diff", lambda _: pytest.fail("it was compared"))
    part = shown(replace(hung(code), kv=WatchedKv(layers, is_behind=True)))["kv"]
    assert "compared later" in part
    assert "<td>2</td>" in part


def test_what_ended_and_is_wrong_is_shown_beside_the_verdict() -> None:
    sizes = [
        process(rank, op(0, kind, 1, 1.5, peer=1 - rank, nbytes=size, shape=(size,)), op(1, "send", 2, peer=1 - rank),
                heartbeat_ns=4 * SECOND)
        for rank, kind, size in ((0, "send", 8), (1, "recv", 16))
    ]  # fmt: skip
    found = evidence(*sizes)
    assert found.verdict.is_hung
    banner = shown(found, found.verdict)["banner"]
    assert banner.index('data-severity="error"') < banner.index('data-severity="warning"')


class MadeWatch(Watch):
    """A watch of evidence made by hand."""

    def __init__(self, found: Evidence) -> None:
        self.found, self.over = found, threading.Event()
        self.asked = threading.Event()
        super().__init__(self, show=WatchPanel)  # type: ignore[arg-type]

    evidence = property(lambda self: self.found)
    watched = property(lambda self: self)

    def ask(self, ranks: Any) -> None:
        assert list(ranks)
        self.asked.set()

    @property
    def is_over(self) -> bool:
        return self.over.is_set()

    def moment(self) -> WatchMoment:
        return WatchMoment("ended" if self.is_over else "runs", self.found, None)

    def _title(self) -> str:
        return "a watch"

    def __str__(self) -> str:
        return self._title()

    def close(self) -> None:
        """Nothing to release."""


@pytest.fixture
def made(code: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MadeWatch]:
    monkeypatch.setattr(watched, "REFRESH_S", 0.01)
    monkeypatch.setattr(watched, "SHARE", 1.0)
    found = MadeWatch(hung(code))
    yield found
    found.over.set()


def panel_of(watch: Watch) -> WatchPanel:
    panel = watch.debugger()
    assert isinstance(panel, WatchPanel)
    return panel


def test_the_panel_follows_until_the_watch_is_over_and_then_has_no_thread(made: MadeWatch) -> None:
    panel = panel_of(made)
    assert made.asked.wait(30)
    before: Mapping[str, str] = panel.parts
    made.found = evidence(process(0, op(0, "barrier", 1, 2)))
    wait_for(lambda: panel.parts["table"] != before["table"], "the new ranks are shown")
    made.over.set()
    wait_for(lambda: not panel._thread.is_alive(), "its thread has ended")
    assert "ended" in panel.parts["banner"]
    panel.close()


def test_the_panel_s_text_has_what_each_rank_does_and_the_verdict(made: MadeWatch) -> None:
    """The text is what notebooks keep where they draw nothing."""
    panel = panel_of(made)
    lines = made.found.rank_lines
    assert len(lines) > 1
    assert repr(panel) == "\n".join(["runs", *lines])
    panel.close()
    found = made.found.verdict
    assert WatchMoment("runs", made.found, found).text([]).splitlines() == [
        *lines,
        found.severity.marked(found.sentence),
    ]


def test_after_the_end_it_follows_until_all_rows_are_read(made: MadeWatch) -> None:
    layers = {0: layers_of([rows(0, 1, 2)])}
    made.found = replace(made.found, kv=WatchedKv(layers, is_behind=True))
    panel = panel_of(made)
    made.over.set()
    wait_for(lambda: "ended" in panel.parts["banner"], "the end is shown")
    made.found = replace(made.found, kv=WatchedKv(layers))
    wait_for(lambda: not panel._thread.is_alive(), "its thread has ended")
    assert "compared later" not in panel.parts["kv"]
    panel.close()


def test_many_rows_are_compared_once_the_panel_is_there(
    made: MadeWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cell that shows it does not wait for that, which takes seconds; nor does a watch that is over miss it."""
    door, compared = threading.Event(), list[str]()

    def diff(_: WatchedKv) -> list[OpFinding]:
        compared.append(threading.current_thread().name)
        assert door.wait(30)
        return []

    monkeypatch.setattr(WatchedKv, "diff", diff)
    monkeypatch.setattr("dinfer.views.panel.watched.MOST_ROWS", 2)
    made.found = replace(made.found, kv=WatchedKv({0: layers_of([rows(0, 1, 2, 3)])}))
    made.over.set()
    panel = panel_of(made)
    assert "being compared" in panel.parts["kv"]
    door.set()
    wait_for(lambda: not panel._thread.is_alive(), "its thread has ended")
    assert "being compared" not in panel.parts["kv"]
    assert compared == ["dinfer watch panel"]
    panel.close()


def test_a_panel_that_is_closed_has_no_thread_and_leaves_the_watch(made: MadeWatch) -> None:
    panel = panel_of(made)
    panel.close()
    wait_for(lambda: not panel._thread.is_alive(), "its thread has ended")
    assert not made.is_over


def test_its_output_is_a_picture_without_scripts(made: MadeWatch) -> None:
    panel = panel_of(made)
    data, _ = panel._repr_mimebundle_()
    assert data.keys() == {"text/html", "text/plain"}
    # Of the watch itself, whose text is "a watch", it asks nothing, which may take long.
    assert data["text/plain"].splitlines() == ["runs", *made.found.rank_lines]
    assert "<svg" in data["text/html"]
    panel.close()


def test_what_cannot_be_shown_is_said(made: MadeWatch, monkeypatch: pytest.MonkeyPatch) -> None:
    panel = panel_of(made)

    def fails() -> WatchMoment:
        raise OSError("the disk is full")

    monkeypatch.setattr(made, "moment", fails)
    wait_for(lambda: "the disk is full" in panel.parts["banner"], "the error is shown")
    panel.close()


def test_a_watch_without_views_says_where_to_get_them(code: Path) -> None:
    class Bare(MadeWatch):
        def __init__(self) -> None:
            super().__init__(hung(code))
            self._show = None

    with pytest.raises(NotPossible, match=r"panels need dinfer's views: make the watch by dinfer\.watch"):
        Bare().debugger()
