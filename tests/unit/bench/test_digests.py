"""`dinfer bench digests`: figures from rounds, and a run of it on real ranks at a tiny shape."""

from __future__ import annotations

from pathlib import Path

import pytest

from dinfer.bench.prefill import bench_digests, digest_figures, digests_table
from dinfer.bench.rank import TimedPrefill
from dinfer.config import Config
from tests.support.tiny import tiny_checkpoint

ROUNDS = [
    (TimedPrefill(1.02, 0, 2.02, 0.1), TimedPrefill(1.0, 0, 2.0)),
    (TimedPrefill(2.2, 0, 2.0, 0.3), TimedPrefill(2.0, 0, 2.0)),
    (TimedPrefill(1.98, 0, 2.2, 0.2), TimedPrefill(2.0, 0, 2.0)),
]


def test_rounds_are_compared_in_pairs() -> None:
    found = digest_figures(ROUNDS)
    assert (found["median_on"], found["median_off"]) == (1.98, 2.0)
    assert found["cost"] == pytest.approx(0.02)
    assert found["costs"] == [pytest.approx(-0.01), pytest.approx(0.1)]
    assert found["cpu_cost"] == pytest.approx(0.01)
    assert found["check_share"] == pytest.approx(0.1)


def test_the_table_says_cost_target_and_the_check_apart() -> None:
    about = {"tokens": 512, "chunk_size": 128, "world_size": 2, "threads": 1, "repeats": 3}
    text = digests_table({**about, **digest_figures(ROUNDS)})
    for fact in ("+2.00%, -1.00% to +10.00%", "at most 2%", "the check before decode", "0.200 s, 10.00%"):
        assert fact in text


@pytest.mark.slow
def test_it_runs_with_and_without_in_turn(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", layers=2)
    config = Config(model_path=str(model), world_size=2, chunk_size=8, threads=1)
    found = bench_digests(config, 16, 128, 2)
    assert {name: len(took) for name, took in found["seconds"].items()} == {"on": 2, "off": 2}
    assert all(took > 0 for took in found["check_s"])
