"""`dinfer bench links` on real hosts: figures of every cell, ranks that hold the same, and nothing that is left."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dinfer.lab.hosts import do
from tests.support.hosted import needs_hosts
from tests.support.runs import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(400), needs_hosts]

SIZES = ("--model", "demo", "--tokens", "64", "--chunk-size", "16", "--repeats", "1")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dinfer.cli", "bench", "links", *SIZES, *arguments]


def namespaces() -> set[str]:
    return {line.split()[0] for line in do("ip", "netns", "list").splitlines()}


def test_every_cell_is_measured_and_predicted(tmp_path: Path) -> None:
    """At 2 Mbit/s a block of 8 KiB takes a while, so that it comes in pieces, and the links bound the run."""
    ran = subprocess.run(
        command("--rate", "1gbit,2mbit", "--hosts", "2", "--json", "found.json"),
        cwd=tmp_path, capture_output=True, text=True, timeout=380, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    cells = found["cells"]
    assert {(one["rate"], one["strategy"], one["schedule"]) for one in cells} == {
        (rate, strategy, schedule)
        for rate in ("1gbit", "2mbit")
        for strategy in ("pairwise", "ring")
        for schedule in ("pipelined", "lockstep")
    }
    for one in cells:
        assert (one["hosts"], one["codec"], one["same_kv"]) == (2, "none", True)
        assert min(one["measured_s"], one["predicted_s"], one["makespan_s"]) > 0
    assert max(link["alone"] for link in found["machines"]["2mbit"]["links"]) < 2e6 / 8 * 1.1
    # Each rank sends half of the KV, 6 layers × 64 tokens × 512 bytes: no run can be faster than its link.
    assert all(one["measured_s"] > 3 * 64 * 512 * 8 / 2.2e6 for one in cells if one["rate"] == "2mbit")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_of_one_that_is_ended(tmp_path: Path, how: signal.Signals) -> None:
    before = namespaces()
    with subprocess.Popen(command(), cwd=tmp_path, stderr=subprocess.PIPE, text=True) as bench:
        wait_for(lambda: len(namespaces() - before) >= 4, "hosts are there")
        made = namespaces() - before
        wait_for(lambda: any(do("ip", "netns", "pids", name).split() for name in made), "ranks run there")
        bench.send_signal(how)
        bench.communicate()
    assert bench.returncode != 0
    wait_for(lambda: not namespaces() & made, "they are gone")
