"""`dinfer bench cores`: ratios by round, and what cannot be compared."""

from __future__ import annotations

import pytest

from dinfer.bench import cores_rank
from dinfer.bench.cores import (
    CHUNKED,
    DECODE,
    GENERATE,
    LOCKSTEP,
    PIPELINED,
    PLANNED,
    TARGETS,
    WHOLE,
    check_asked,
    figures,
    table,
)
from dinfer.bench.cores_rank import CoresTimes
from dinfer.config import Config, ConfigError

CONFIG = Config(model_path="demo", world_size=2, chunk_size=128)


def test_a_ratio_is_the_median_of_those_of_the_rounds() -> None:
    """A machine that computes half as fast in one round does not count as a difference between variants."""
    zero = {
        CHUNKED: [9.0, 18.0, 9.0], WHOLE: [6.0, 12.0, 6.0], PIPELINED: [10.0, 20.0, 10.0], PLANNED: [7.0, 15.0, 8.0],
        LOCKSTEP: [16.0, 32.0, 16.0], DECODE: [2.0, 4.0, 2.0], GENERATE: [3.0, 6.0, 3.0],
    }  # fmt: skip
    one = {name: [0.0] * 3 for name in zero} | {PIPELINED: [9.0, 21.0, 9.0], PLANNED: [8.0, 16.0, 8.0]}
    found = figures([CoresTimes(zero), CoresTimes(one)])
    assert found["seconds"][PIPELINED] == [10.0, 21.0, 10.0], "until the slower rank was done"
    ratios = {(ratio["variant"], ratio["over"]): ratio["ratio"] for ratio in found["ratios"]}
    assert set(ratios) == {(target.variant, target.over) for target in TARGETS}
    assert ratios[PIPELINED, CHUNKED] == pytest.approx(0.9)
    assert ratios[PLANNED, WHOLE] == pytest.approx(0.75)
    assert ratios[PIPELINED, LOCKSTEP] == pytest.approx(1.6)
    assert ratios[DECODE, GENERATE] == pytest.approx(1.5)
    sizes = {"tokens": 2048, "chunk_size": 128, "world_size": 2, "threads": 1, "new_tokens": 32, "repeats": 3}
    shown = table({**sizes, "planned": "by 128", **found})
    assert "beside one process with 2" in shown
    row = next(line for line in shown.splitlines() if line.startswith(PIPELINED) and LOCKSTEP in line)
    assert row.split()[-4:] == ["1.60", "1.52–1.60", "1.70", "no"]


def test_ranks_name_decode_as_the_table_does() -> None:
    assert (cores_rank.DECODE, cores_rank.GENERATE) == (DECODE, GENERATE)


@pytest.mark.parametrize(("world_size", "tokens", "told"), [(1, 2048, "2 ranks"), (2, 128, "two chunks")])
def test_what_has_nothing_to_compare_is_refused(world_size: int, tokens: int, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_asked(CONFIG.with_(world_size=world_size), tokens)
