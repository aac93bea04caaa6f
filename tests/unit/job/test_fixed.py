"""A run cannot change what loading has fixed; the previous run then goes on."""

from __future__ import annotations

from typing import Any

import pytest

from dinfer.config import ConfigError
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
