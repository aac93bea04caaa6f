"""Traces for Perfetto, read by its own trace processor, in SQL.

Its Python package fetches that program from the network when it is first used. Where it cannot, TRACE_PROCESSOR may
name one that is there already; else these tests are skipped.
"""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from dinfer.plan.partition import partition
from dinfer.plan.schedule import build
from dinfer.trace.events import pairs
from dinfer.trace.simulated import paper_trace
from dinfer.trace.trace import Trace

perfetto = pytest.importorskip(
    "perfetto.trace_processor", reason="the Python package perfetto is not installed: pip install perfetto"
)
LANES = (
    "from slice join thread_track on slice.track_id = thread_track.id join thread using (utid) "
    "join process using (upid)"
)
FLOWS = "from flow join slice a on flow.slice_out = a.id join slice b on flow.slice_in = b.id"


@pytest.fixture(scope="module", params=[("pipelined", "pairwise"), ("lockstep", "ring")], ids="-".join)
def trace(request: pytest.FixtureRequest) -> Trace:
    shape = partition(layers=6, tokens=40, world_size=3, chunk_size=8)
    return paper_trace(build(shape, *request.param))


@pytest.fixture(scope="module")
def processor(trace: Trace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Perfetto's trace processor, with the exported trace loaded."""
    path = trace.export("perfetto", tmp_path_factory.mktemp("perfetto") / "trace.json")
    config = perfetto.TraceProcessorConfig(bin_path=os.environ.get("TRACE_PROCESSOR"))
    try:
        made = perfetto.TraceProcessor(trace=str(path), config=config)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"perfetto's trace processor cannot be fetched from the network: {error}")
    yield made
    made.close()


def rows(processor: Any, sql: str, *columns: str) -> Counter[tuple[Any, ...]]:
    return Counter(tuple(getattr(row, name) for name in columns) for row in processor.query(sql))


def test_nothing_is_dropped(processor: Any) -> None:
    sql = "select name, value from stats where severity in ('error', 'data_loss') and value > 0"
    assert rows(processor, sql, "name", "value") == Counter()


def test_slices_of_each_rank_and_lane_have_their_names_and_durations(processor: Any, trace: Trace) -> None:
    sql = f"select process.name as rank, thread.name as lane, slice.name as op, slice.dur as dur {LANES}"
    expected = Counter((f"rank {e.rank}", e.lane, e.name, e.busy) for e in trace.events)
    waited = [e for e in trace.events if e.waited > 0]
    expected += Counter((f"rank {e.rank}", e.lane, f"wait: {e.name}", e.waited) for e in waited)
    assert rows(processor, sql, "rank", "lane", "op", "dur") == expected


def test_slices_lie_side_by_side(processor: Any) -> None:
    assert rows(processor, "select max(depth) as deepest from slice", "deepest") == Counter([(0,)])


def test_arrows_go_from_each_send_to_its_recv(processor: Any, trace: Trace) -> None:
    sends = [event for event, recv in pairs(trace.events) if event and recv]
    expected = Counter((one.name, one.name.replace("send", "recv")) for one in sends)
    found = rows(processor, f"select a.name as sent, b.name as came {FLOWS}", "sent", "came")
    assert found == expected
