"""`dinfer bench` on real ranks: every variant and case is timed; what the times are is not judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


def bench(folder: Path, *arguments: str) -> str:
    """What it printed; figures are in figures.json."""
    command = [
        sys.executable,
        "-m",
        "dinfer.cli",
        "bench",
        "--model",
        "demo",
        "--json",
        "figures.json",
        *arguments,
    ]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_two_strategies_are_compared_case_by_case(tmp_path: Path) -> None:
    sizes = ("--tokens", "24,48", "--chunk-size", "8,16", "--repeats", "2")
    told = bench(tmp_path, "--compare", "pairwise,ring", *sizes, "--plot", "plot.html")
    found = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert [(case["tokens"], case["chunk_size"]) for case in found["cases"]] == [
        (24, 8),
        (24, 16),
        (48, 8),
        (48, 16),
    ]
    for case in found["cases"]:
        assert [len(rounds) for rounds in case["seconds"].values()] == [2, 2]
        assert all(took > 0 for rounds in case["seconds"].values() for took in rounds)
        assert all(
            0 <= case["exposed_sync_s"][name] <= max(case["seconds"][name]) for name in case["seconds"]
        )
    assert found["verdict"] in told
    assert "plot: plot.html" in told
    assert (tmp_path / "plot.html").is_file()


@pytest.mark.slow
def test_all_variants_are_timed_side_by_side(tmp_path: Path) -> None:
    told = bench(tmp_path, "--tokens", "24", "--chunk-size", "8", "--repeats", "1")
    found = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert list(found["medians"]) == [
        "one process",
        "pipelined, no sync",
        "pipelined, pairwise",
        "pipelined, ring",
        "lockstep, pairwise",
        "lockstep, ring",
    ]
    assert all(name in told for name in found["medians"])
