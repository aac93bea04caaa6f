"""`dinfer bench views`: what it says; the times themselves are nobody's to assert."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dinfer.bench import views
from dinfer.bench.views import table
from dinfer.views.report.page import REPORT_FIGURES
from tests.support.threads import session_on_threads
from tests.support.traces import PROMPT


def test_a_machine_without_a_browser_is_told_that_opening_was_not_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "playwright.sync_api", None)
    monkeypatch.setattr(views, "LAYERS", 6)
    said: list[str] = []
    result = views.bench_views(1, said.append)
    lines = table(result).splitlines()
    assert said == ["figures are timed", "the report is written", "live views are timed"]
    assert [line.split()[0] for line in lines[2 : 2 + len(REPORT_FIGURES)]] == list(REPORT_FIGURES)
    live = [line for line in lines if line.startswith("live: ")]
    of_size = ["map", "opening", "moment", "strip", "search", "first"]
    assert [line.split()[1] for line in live] == [*of_size, *of_size, "inspector", "latency"]
    assert 4_000_000 < result["report"]["bytes"] < 10_000_000
    assert f"opening: {views.NEEDED}" in lines
    assert lines[-1] == f"drawing: {views.NEEDED}"


def test_opening_is_told_in_its_three_parts() -> None:
    opened = {"seen_ms": 100.0, "drawn_ms": 1500.0, "all_ms": 3000.0}
    result = {
        "machine": {"processor": "P", "cores": "2"},
        "events": 5925,
        "repeats": 3,
        "figures": {"gantt": {"ms": 100.0, "bytes": 1_000_000}},
        "report": {"write_ms": 500.0, "bytes": 6_500_000, "open": opened},
        "live": {
            "kernel": {
                "map 36 × 32 × 3": {"ms": 2.0, "bytes": 5000},
                "inspector": {"ms": 15.0, "bytes": 2_000_000},
            },
            "browser": {"map": 60.0, "inspector": 25.0},
        },
    }
    fetch = {"first": 95.4, "difference": 210.0, "again": 28.0, "bytes": 8_388_608}
    *_, fetched_line = table({**result, "fetch": fetch}).splitlines()
    for fact in ("inspector", "8 × 2048 × 128", "95 ms", "8.4 MB", "210 ms", "28 ms"):
        assert fact in fetched_line
    *_, report, opening, shown, inspector = table(result).splitlines()
    facts = {
        shown: ("live: map 36 × 32 × 3", "2.0 ms", "0.01 MB", "60"),
        inspector: ("live: inspector", "15.0 ms", "2.00 MB", "25"),
        report: ("report", "500 ms", "6.50 MB", "at most 10 MB"),
        opening: ("opening", "100 ms", "1500 ms (target: at most 2,000 ms)", "3000 ms"),
    }
    for line, some in facts.items():
        assert all(fact in line for fact in some)


def test_a_fetch_is_timed_to_its_picture_and_an_error_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    with session_on_threads(3, Path("demo")) as session:
        run = session.prefill(PROMPT, chunk_size=4)
        run.wait()
        costs = views.fetched(run, 2)
        assert costs["bytes"] == run.kv(layer=0).k[:].nbytes
        assert all(costs[name] > 0 for name in ("first", "difference", "again"))

        def lost(**_: object) -> None:
            raise RuntimeError("rank 1 is gone")

        monkeypatch.setattr(run, "kv", lost)
        with pytest.raises(RuntimeError, match="rank 1 is gone"):
            views.fetched(run, 1)
