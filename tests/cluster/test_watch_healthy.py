"""Programs that are right, run under watch many times: no verdict, no finding, all ops seen.

DINFER_CLEAN_RUNS says how many runs there are in all, in turn.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import pytest

from tests.support.watched import WatchedRun, accelerate, torchrun, watch

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

RUNS = int(os.environ.get("DINFER_CLEAN_RUNS", "200"))

ENGINES = ("stage_loop", "batched_pipeline", "metadata_and_tensors")
"""programs of engines.py; the others are in healthy.py"""

BY_ACCELERATE = ("accelerated", "tp_plan")
"""that need the package"""

PROGRAMS = (
    "one_f_one_b", "interleaved", "ring_attention", "tensor_parallel", "tp_plan", "accelerated", "long_computation",
    "objects_beside_tensors", "data_parallel", *ENGINES,
)  # fmt: skip

HAS_ACCELERATE = importlib.util.find_spec("accelerate") is not None and shutil.which("mpirun") is not None


def assert_clean(run: WatchedRun, n: int) -> None:
    assert (run.status, run.told["verdict"], run.told["findings"]) == (0, None, []), run.errors
    assert "✖" not in run.errors
    assert "⚠" not in run.errors
    assert run.output.count("WELL") == n
    assert all(rank["hook"] != "none" and rank["ops"] for rank in run.told["ranks"]), run.told["ranks"]
    assert len(run.told["ranks"]) == n


def run_clean(name: str, folder: Path) -> None:
    """One run of a program that is right."""
    if name in BY_ACCELERATE and not HAS_ACCELERATE:
        pytest.skip("needs accelerate (pip install accelerate), and for its launch mpirun")
    n = 2 if name == "accelerated" else 3
    program = "engines.py" if name in ENGINES else "healthy.py"
    by_itself = name == "accelerated"
    command = accelerate(program, name, folder=folder, n=n) if by_itself else torchrun(program, name, n=n)
    assert_clean(watch(command, folder), n)


def test_a_pipeline_in_which_nothing_is_wrong_raises_no_alarm(tmp_path: Path) -> None:
    run_clean("one_f_one_b", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(RUNS))
def test_no_alarm_in_many_runs_of_programs_that_are_right(number: int, tmp_path: Path) -> None:
    run_clean(PROGRAMS[number % len(PROGRAMS)], tmp_path)
