"""`dinfer bench planner` on real ranks: every case is chosen for, predicted and swept; what the times are is not
judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dinfer.planner.choose import CHOICES

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]


def test_every_case_has_its_figures(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "dinfer.cli",
        "bench",
        "planner",
        "--model",
        "demo",
        "--json",
        "found.json",
    ]
    sizes = ["--tokens", "64", "--chunk-size", "16", "--repeats", "1"]
    ran = subprocess.run(
        [*command, *sizes], cwd=tmp_path, capture_output=True, text=True, timeout=580, check=False
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert [case["case"] for case in found["cases"]][0::2] == ["even", "one link 10 × slower"]
    assert "Mbit/s" in found["cases"][2]["links"]
    for case in found["cases"]:
        assert min(case["chosen_s"], case["predicted_s"], case["best_s"]) > 0
        assert case["best_s"] <= case["chosen_s"]
        assert case["best"] == "chosen" or case["best"] in case["swept"]
        assert {"prefill", "rank 0 computes", "link 0→1"} <= set(case["beside"])
        assert [line.split()[0] for line in case["because"]] == list(CHOICES)
