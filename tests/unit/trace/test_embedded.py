"""Traces inside a web page and out again, findings as plain data, and what a damaged page is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinfer.trace.events import Event
from dinfer.trace.export import TraceError
from dinfer.trace.findings import Findings, KvFinding, RankFinding, findings_of, with_findings
from dinfer.trace.read import as_columns, of_columns, read_traces, script_json
from dinfer.trace.trace import Trace
from tests.support.made_events import events, plausible

HOSTILE = "</script><script>alert(1)</script><!-- & \u2028 珀斯"


def page(*traces: Trace) -> str:
    """Some of a report."""
    return "".join(
        f'<p>x</p><script type="application/json" id="dinfer-trace-{n}">{script_json(as_columns(trace))}</script>'
        for n, trace in enumerate(traces)
    )


@given(st.lists(events(lanes=("main", "kv-in:0"), ranks=3), max_size=8))
def test_columns_hold_the_whole_trace(made: list[Event]) -> None:
    trace = Trace(tuple(plausible(made)), {"prompt": HOSTILE})
    assert of_columns(json.loads(script_json(as_columns(trace)))) == trace


def test_what_a_run_said_cannot_end_the_element() -> None:
    text = script_json({"said": HOSTILE})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"said": HOSTILE}


def test_traces_are_read_from_pages_and_from_files(tmp_path: Path) -> None:
    one = Trace((Event(0, "main", "layer", 5, 6, 7, 8),), {"model": HOSTILE})
    two = Trace((), {"model": "other"})
    (tmp_path / "report.HTML").write_text(page(one, two), encoding="utf-8")
    assert read_traces(tmp_path / "report.HTML") == [one, two]
    one.export("jsonl", tmp_path / "trace.jsonl")
    assert read_traces(tmp_path / "trace.jsonl") == [one]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("<p>no trace</p>", "holds no trace: it is no report of dinfer"),
        (page(Trace(())).replace('"columns":{', '"rows":{'), "holds a damaged trace: KeyError"),
        (page(Trace(())).replace("{", "", 1), "holds a damaged trace: JSONDecodeError"),
        (page(Trace(())).replace("columns 1", "columns 9"), "another version"),
    ],
)
def test_a_page_that_is_no_report(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    with pytest.raises(TraceError, match=told):
        read_traces(tmp_path / "page.html")


FULL = Findings(
    state="done",
    parameters={"chunk_size": 4, "layer_split": [1, 2]},
    positions=((1, 2), (3,)),
    ranks=(RankFinding(0, kv_sha256="ab", tokens=(1, 2)), RankFinding(1, error="it broke")),
    kv=KvFinding(False, "they differ", (("same", "differs"),), ({"layer": 1},)),
    breakpoints=("#1",),
    faults=("bitflip",),
    others=({"prefill_s": 1.0},),
    chunk_texts=("a", "b"),
    environment={"HOME": "/"},
)


def test_findings_travel_in_a_trace() -> None:
    trace = with_findings(Trace((), {"model": "demo"}), FULL)
    assert findings_of(of_columns(json.loads(script_json(as_columns(trace))))) == FULL
    assert trace.about["model"] == "demo"
    assert findings_of(Trace(())) == Findings()


def test_findings_of_a_later_version_are_read_as_far_as_they_are_known() -> None:
    later = {
        "state": "done",
        "moon": "full",
        "ranks": [{"rank": 0, "mood": "good"}],
        "kv": {"equal": True, "sentence": "x"},
    }
    assert Findings.of(later) == Findings(state="done", ranks=(RankFinding(0),), kv=KvFinding(True, "x"))
