"""Traces for Perfetto, checked against what the trace-event format asks of each kind of event.

With Perfetto's own trace processor: test_perfetto_processor.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinfer.plan.partition import partition
from dinfer.plan.schedule import build
from dinfer.trace.events import Event
from dinfer.trace.export import TraceError, trace_events
from dinfer.trace.read import read_jsonl
from dinfer.trace.simulated import paper_trace
from dinfer.trace.trace import Trace
from dinfer.trace.transfers import transfers
from tests.support.made_events import events, in_order

PLAN = build(partition(layers=4, tokens=24, world_size=2, chunk_size=8), "pipelined", "pairwise")
ASKED = {
    "M": {"args"},
    "X": {"ts", "dur", "args", "cat"},
    "s": {"id", "ts", "cat"},
    "f": {"id", "ts", "cat", "bp"},
}
"""what each phase must have beside name, pid and tid"""


def check(made: dict[str, Any]) -> None:
    """Fails for what the format does not allow."""
    flows: dict[int, list[str]] = defaultdict(list)
    named = {(one["pid"], one["tid"]) for one in made["traceEvents"] if one["name"] == "thread_name"}
    for one in made["traceEvents"]:
        assert {"name", "pid", "tid", "ph"} | ASKED[one["ph"]] <= one.keys(), one
        assert isinstance(one["pid"], int)
        assert isinstance(one["tid"], int)
        assert one["ph"] == "M" or (one["pid"], one["tid"]) in named
        if one["ph"] == "X":
            assert one["ts"] >= 0
            assert one["dur"] >= 0
        if one["ph"] in "sf":
            flows[one["id"]].append(one["ph"])
    assert all(sorted(phases) == ["f", "s"] for phases in flows.values())


def perfetto(trace: Trace) -> dict[str, Any]:
    return trace_events(trace.events, trace.about)


def slices(made: dict[str, Any]) -> list[dict[str, Any]]:
    return [one for one in made["traceEvents"] if one["ph"] == "X"]


def test_every_op_is_a_slice_and_every_transfer_an_arrow(tmp_path: Path) -> None:
    trace = paper_trace(PLAN)
    path = trace.export("perfetto", tmp_path / "trace.json")
    made = json.loads(path.read_text(encoding="utf-8"))
    check(made)
    ops = [one for one in slices(made) if one["cat"] != "wait"]
    assert len(ops) == len(trace.events)
    assert len([one for one in made["traceEvents"] if one["ph"] == "s"]) == len(transfers(trace))
    assert made["otherData"]["schedule"] == "pipelined"
    names = {one["args"]["name"] for one in made["traceEvents"] if one["name"] == "process_name"}
    assert names == {"rank 0", "rank 1"}


def test_an_arrow_begins_in_its_send_and_ends_in_its_recv() -> None:
    made = perfetto(paper_trace(PLAN))
    by_thread = defaultdict(list)
    for one in slices(made):
        by_thread[one["pid"], one["tid"]].append((one["ts"], one["ts"] + one["dur"], one["name"].split()[0]))
    for arrow in made["traceEvents"]:
        if arrow["ph"] in "sf":
            kind = "send" if arrow["ph"] == "s" else "recv"
            spans = by_thread[arrow["pid"], arrow["tid"]]
            assert any(a - 1e-6 <= arrow["ts"] <= b + 1e-6 and name == kind for a, b, name in spans), arrow


def bound(made: dict[str, Any]) -> dict[int, dict[str, str]]:
    """By arrow, the slices at its ends as Perfetto's trace processor finds them: of each thread the one that has begun
    last, by time and then by place in the file."""
    begun: dict[tuple[int, int], str] = {}
    found: dict[int, dict[str, str]] = defaultdict(dict)
    timed = [one for one in made["traceEvents"] if one["ph"] != "M"]
    for one in sorted(timed, key=lambda one: round(one["ts"] * 1000)):
        thread = (one["pid"], one["tid"])
        if one["ph"] == "X":
            begun[thread] = one["name"]
        else:
            found[one["id"]][one["ph"]] = begun[thread]
    return found


@pytest.mark.parametrize(("schedule", "strategy"), [("pipelined", "pairwise"), ("lockstep", "ring")])
def test_an_arrow_is_bound_to_its_own_slices_where_ops_follow_at_once(schedule: str, strategy: str) -> None:
    shape = partition(layers=6, tokens=32, world_size=3, chunk_size=8)
    trace = paper_trace(build(shape, schedule, strategy))  # type: ignore[arg-type]
    found = bound(perfetto(trace))
    assert len(found) == len(transfers(trace))
    wrong = [ends for ends in found.values() if ends["s"].split()[1:] != ends["f"].split()[1:]]
    assert wrong == []
    assert {(ends["s"].split()[0], ends["f"].split()[0]) for ends in found.values()} == {("send", "recv")}


def test_a_block_that_travels_twice_has_two_arrows() -> None:
    events = [
        Event(rank, "main", kind, 10 * n, 10 * n, 10 * n, 10 * n + 10, "kv", 0, 1, 1 - rank)
        for n in range(2)
        for rank, kind in ((0, "send"), (1, "recv"))
    ]
    made = perfetto(Trace.merge([events]))
    ends = [(one["id"], one["ph"], one["ts"]) for one in made["traceEvents"] if one["ph"] in "sf"]
    assert sorted(ends) == [(0, "f", 0.009), (0, "s", 0.0), (1, "f", 0.019), (1, "s", 0.01)]


def test_no_two_slices_of_a_thread_overlap() -> None:
    made = perfetto(paper_trace(PLAN))
    ends: dict[tuple[int, int], int] = {}
    for one in sorted(slices(made), key=lambda one: (one["ts"], one["ts"] + one["dur"])):
        thread, start = (one["pid"], one["tid"]), round(one["ts"] * 1000)
        assert start >= ends.get(thread, 0), one
        ends[thread] = start + round(one["dur"] * 1000)


def test_a_wait_and_an_op_by_hand() -> None:
    event = Event(1, "kv-in:0", "recv", 1000, 2000, 5000, 9000, "kv", 2, 3, 0, 8, 64, 7)
    wait, op = slices(perfetto(Trace((event,))))
    assert (wait["name"], wait["ts"], wait["dur"]) == ("wait: recv kv c2 l3", 1.0, 3.0)
    assert (op["name"], op["ts"], op["dur"], op["cat"]) == ("recv kv c2 l3", 4.0, 4.0, "transfer")
    assert op["args"] == {"chunk": 2, "layer": 3, "peer": 0, "tokens": 8, "bytes": 64, "index": 7}


@given(st.lists(events(lanes=("main", "x"), ranks=2), max_size=10))
def test_any_trace_can_be_exported(made: list[Event]) -> None:
    check(perfetto(Trace.merge([in_order(made)])))


def test_json_lines_and_forms_that_there_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trace = paper_trace(PLAN)
    assert read_jsonl(trace.export()) == trace
    assert trace.export("perfetto") == Path("trace.perfetto.json")
    with pytest.raises(TraceError, match="cannot be exported as 'csv'; it must be one of jsonl, perfetto"):
        trace.export("csv")
