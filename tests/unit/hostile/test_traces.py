"""Traces and reports that others have damaged or made: read, or refused with one error, within seconds and 500 MB."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dinfer
from dinfer.plan.partition import partition
from dinfer.plan.schedule import build
from dinfer.trace.export import TraceError
from dinfer.trace.findings import Findings, KvFinding, RankFinding, with_findings
from dinfer.trace.read import as_columns, read_jsonl, read_traces, script_json
from dinfer.trace.simulated import paper_trace
from dinfer.trace.summary import summary
from dinfer.trace.trace import Trace
from dinfer.views.report.page import report_html
from tests.support.hostile import LIMITED, mutated_bytes, mutated_json, read_limited, read_or_refused

PAGE = '<html><script type="application/json" id="dinfer-trace-1">{}</script></html>'

on_disk = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def trace() -> Trace:
    """A whole run, with findings."""
    plan = build(partition(layers=4, tokens=10, world_size=2, chunk_size=4), "pipelined", "ring")
    earlier = {"name": "earlier", **summary(paper_trace(plan))}
    findings = Findings(
        state="done", failure="none", ranks=(RankFinding(0, "cpu"), RankFinding(1, "cpu", tokens=(1, 2))),
        kv=KvFinding(True, "equal", (("same",) * 4,) * 2), marks=((0, 1, 2, "armed", "x"),),
        positions=tuple(tuple(1 for _ in lanes) for lanes in plan.lanes),
        plan=plan.text(), commands={"a": "b"}, others=(earlier,),
    )  # fmt: skip
    return with_findings(paper_trace(plan), findings)


TRACE = trace()
LINES = [json.dumps({"format": "dinfer trace 1", "events": len(TRACE.events), "about": TRACE.about})]
LINES += [json.dumps(event.as_dict()) for event in TRACE.events]


def look(path: Path) -> None:
    """Read it, and what is made of it without drawing."""
    for found in read_traces(path):
        summary(found)
    str(dinfer.open(path))


def test_the_whole_trace_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(LINES), encoding="utf-8")
    (tmp_path / "a.html").write_text(PAGE.format(script_json(as_columns(TRACE))), encoding="utf-8")
    assert read_jsonl(tmp_path / "a.jsonl") == TRACE
    look(tmp_path / "a.jsonl")
    look(tmp_path / "a.html")


@on_disk
@given(st.data())
def test_a_damaged_trace_is_refused_or_read(tmp_path: Path, data: st.DataObject) -> None:
    lines = list(LINES)
    if data.draw(st.booleans()):
        number = data.draw(st.just(0) | st.integers(0, len(lines) - 1))
        lines[number] = json.dumps(data.draw(mutated_json(json.loads(lines[number]))))
        text = "\n".join(lines).encode()
    else:
        text = data.draw(mutated_bytes("\n".join(lines).encode()))
    (tmp_path / "a.jsonl").write_bytes(text)
    read_or_refused(lambda: look(tmp_path / "a.jsonl"))


@on_disk
@given(st.data())
def test_a_damaged_report_is_refused_or_read(tmp_path: Path, data: st.DataObject) -> None:
    right = json.loads(script_json(as_columns(TRACE)))
    page = PAGE.format(script_json(data.draw(mutated_json(right)))).encode()
    (tmp_path / "a.html").write_bytes(page if data.draw(st.booleans()) else data.draw(mutated_bytes(page)))
    read_or_refused(lambda: look(tmp_path / "a.html"))


@on_disk
@given(st.data())
def test_what_was_read_of_a_damaged_trace_can_be_drawn(tmp_path: Path, data: st.DataObject) -> None:
    header = data.draw(mutated_json(json.loads(LINES[0]), most=1))
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps(header), *LINES[1:]]), encoding="utf-8")
    read_or_refused(lambda: report_html(read_traces(tmp_path / "a.jsonl"), plotly=""))


@pytest.mark.parametrize("wrong", [{"failure": 5}, {"ranks": 3}, {"kv": []}, {"marks": [[1]]}, []])
def test_findings_of_another_form_are_refused(tmp_path: Path, wrong: object) -> None:
    header = json.loads(LINES[0])
    header["about"]["findings"] = wrong
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps(header), *LINES[1:]]), encoding="utf-8")
    with pytest.raises(TraceError, match=r"line 1: "):
        read_jsonl(tmp_path / "a.jsonl")


@LIMITED
@pytest.mark.timeout(300)
def test_a_hostile_trace_costs_little(tmp_path: Path) -> None:
    head = '{"format": "dinfer trace 1", "about": '
    texts = {
        "nested.jsonl": head + '{"a":' * 2_000_000,
        "nested lines.jsonl": head + "{}}\n" + "[" * 5_000_000,
        "sizes.jsonl": head + '{"layers": 1000000, "tokens": 1000000, "chunk_size": 1}}\n',
        "ranks.jsonl": head
        + "{}}\n"
        + json.dumps({**TRACE.events[0].as_dict(), "rank": 9999, "layer": 99999})
        + "\n",
        "digits.jsonl": head + '{"layers": ' + "9" * 2_000_000 + "}}\n",
        "elements.html": '<script type="application/json" id="dinfer-trace-1">' * 300_000,
        "nested.html": PAGE.format("[" * 3_000_000),
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    found = read_limited(
        "from dinfer.trace.read import read_traces", "read_traces(path)", [tmp_path / name for name in texts]
    )
    assert found.keys() == texts.keys()
    assert all(said.startswith("TraceError: ") for name, said in found.items() if name != "ranks.jsonl"), (
        found
    )
