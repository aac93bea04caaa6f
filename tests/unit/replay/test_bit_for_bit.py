"""Thirty recorded runs: each rank alone gives the same hidden states, KV and tokens, bit for bit, however stepped."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.replays import replayed_trial

SAMPLE = (0, 1, 2)
"""one that was stepped, one that was paused while it ran, one that decoded"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("seed", SAMPLE)
def test_each_rank_alone_is_the_run_bit_for_bit(folder: Path, seed: int) -> None:
    print(replayed_trial(seed, folder))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
def test_each_rank_of_thirty_runs_is_the_run_bit_for_bit(folder: Path, seed: int) -> None:
    print(replayed_trial(seed, folder))
