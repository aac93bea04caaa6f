"""A run cannot change what loading has fixed; the previous run then goes on."""

from __future__ import annotations

from typing import Any

import pytest

from dinfer.config import Config, ConfigError
from dinfer.job import load_call
from dinfer.session.session import Session

IDS = list(range(1, 9))


MODEL = {"layers": 2}
RANKS = 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16', but the ranks were loaded with 'float32'"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16') sets it for all runs"),
        ({"threads": 7}, "threads is 7, but the ranks were loaded with 1"),
        ({"model_path": "/another"}, "session.load('/another') sets it for all runs"),
        ({"gpu_ids": (0, 1)}, "gpu_ids=(0, 1)) sets it for all runs"),
        ({"backend": "nccl"}, "backend is nccl, but the ranks are connected by gloo"),
        ({"world_size": 1}, "world_size is 1, but this session has 2 ranks: dinfer.connect(n=1)"),
    ],
)
def test_another_one_is_refused_and_the_run_goes_on(
    session: Session, given: dict[str, Any], said: str
) -> None:
    run = session.prefill(IDS, chunk_size=4, paused=True)
    with pytest.raises(ConfigError) as refused:
        session.prefill(IDS, chunk_size=4, **given)
    assert said in str(refused.value)
    assert session.run is run
    assert run.run_to(0, 1).moved
    (row,) = session.sweep([IDS], chunk_size=4, **given).rows
    assert said.split("'")[0] in row["error"]


def test_the_same_may_be_said_again(session: Session) -> None:
    same: dict[str, Any] = {
        "world_size": 2,
        "threads": 1,
        "backend": "auto",
        "dtype": "float32",
        "gpu_ids": (),
    }
    run = session.prefill(IDS, chunk_size=4, **same)
    run.wait(60)
    assert run.kv().diff().equal
    assert run.config.dtype == session._config.dtype


@pytest.mark.parametrize(
    ("loaded", "named"),
    [
        ({}, ""),
        ({"backend": "gloo", "threads": 4}, ", threads=4"),
        ({"backend": "gloo", "gpu_ids": (0, 0, 0)}, ", gpu_ids=(0, 0, 0)"),
        ({"backend": "gloo", "gpu_ids": (0, 1, 2)}, ", gpu_ids=(0, 1, 2), backend='gloo'"),
        ({"backend": "nccl", "gpu_ids": (0, 1, 2)}, ", gpu_ids=(0, 1, 2), backend='nccl'"),
        ({"backend": "gloo", "gpu_ids": (0, 0, 0), "device_mode": "multi_node"}, ", gpu_ids=(0, 0, 0)"),
        ({"kernels": "exact"}, ", kernels='exact'"),
    ],
)
def test_the_call_that_loads_again_names_what_auto_might_not_choose(
    loaded: dict[str, Any], named: str
) -> None:
    """Where each rank has a GPU of its own, auto is NCCL on machines that have it."""
    assert load_call(Config(**loaded)) == f"session.load('demo'{named})"


def test_kernels_of_one_run_are_not_those_that_are_loaded_again(session: Session) -> None:
    run = session.prefill(IDS, chunk_size=4, kernels="exact", paused=True)
    load, prefill = [line for line in run.calls.cell().splitlines() if "session." in line][:2]
    assert run.job.load_call == load
    assert "kernels" not in load
    assert "kernels='exact'" in prefill
    run.load_again()  # type: ignore[misc]
    assert session.prefill(IDS, chunk_size=4, paused=True).config.kernels == "auto"
