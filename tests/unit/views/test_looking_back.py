"""Time and find of runs that are not live: a saved run, its trace alone, and a run that has gone back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dinfer.saved.saved import open_saved
from dinfer.session.session import Session
from dinfer.views.cells import CellMap
from dinfer.views.find import Searched, find
from dinfer.views.panel.scrubber import TimeQuestion, answer
from dinfer.views.protocol import InspectableRun
from dinfer.views.read_only import ReadOnlyRun
from dinfer.views.recorded import Recorded, RecordedRun
from tests.support.maps import unpacked
from tests.support.saved_runs import LAYERS, done

MODEL = {"layers": LAYERS, "tokenizer": True}


def recorded(run: InspectableRun) -> Recorded:
    found = RecordedRun(run).now()
    assert found is not None
    return found


def asked(run: InspectableRun, at: int | None) -> tuple[dict[str, Any], list[bytes]]:
    return answer(TimeQuestion.of({"at": at, "bins": 20}), recorded(run), run.plan)


def test_a_saved_run_and_its_trace_show_the_moments_of_the_run(session: Session, tmp_path: Path) -> None:
    run = done(session)
    folder = run.save(tmp_path / "saved", prompt=True)
    trace = run.trace.export("jsonl", tmp_path / "trace.jsonl")
    live = recorded(run).timeline
    half = live.span // 2
    for path in (folder, trace):
        then = ReadOnlyRun(open_saved(path))
        found, buffers = asked(then, half)
        assert np.array_equal(unpacked(buffers[found["cells"]], live.shape), live.states(half))
        known = recorded(then)
        searched = Searched(then.plan, then.chunk_labels(), known.standing, known.timeline)
        expected = Searched(run.plan, then.chunk_labels(), run.standing(), live)
        for query in ("slowest", "recv kv 0>1", "layer 1 chunk 0"):
            assert find(query, searched) == find(query, expected)


def test_now_is_where_a_run_stands_that_has_gone_back(session: Session) -> None:
    run = done(session)
    run.step_back("chunk")
    now = recorded(run)
    found, _ = asked(run, now.timeline.span)
    assert found["moment"]["now"]
    assert "cells" not in found  # the page shows its own
    before = now.timeline.states(now.timeline.span - 1)
    assert (
        before != CellMap(run.plan).states(run.standing().stands)
    ).any()  # a trace does not say that it went back
    run.resume()
    run.wait(60)
    assert run.trace.events  # which waits for those that are still on their way
    timeline = recorded(run).timeline
    assert timeline.done(timeline.span) == [sum(stand.positions) for stand in run.standing().stands]
