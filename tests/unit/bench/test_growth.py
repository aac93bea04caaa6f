"""`dinfer bench growth`: its rows, and the figures of a case."""

from __future__ import annotations

import pytest

from dinfer.bench.growth import CHUNKS, LAYERS, PROMPTS, RANKS, case_of, rows_of, table
from dinfer.bench.growth_rank import GrowthTimes
from dinfer.config import Config

CONFIG = Config(model_path="demo", world_size=2, chunk_size=128)


def test_one_size_grows_at_a_time() -> None:
    rows = rows_of(CONFIG, 2048, 8)
    by_table = {
        name: [row for row in rows if row.grows == name] for name in ("prompt", "chunk", "ranks", "layers")
    }
    assert [row.tokens for row in by_table["prompt"]] == list(PROMPTS)
    assert [row.chunk_size for row in by_table["chunk"]] == list(CHUNKS)
    assert [row.world_size for row in by_table["ranks"]] == list(RANKS)
    assert [row.layers for row in by_table["layers"]] == list(LAYERS)
    usual = {"tokens": 2048, "chunk_size": 128, "world_size": 2, "layers": 8}
    for rows_of_table in by_table.values():
        for row in rows_of_table:
            assert sum(row._asdict()[name] != value for name, value in usual.items()) <= 1
    assert [row.schedule for row in rows if row.grows == "schedule"] == ["pipelined", "lockstep"]


def test_no_rank_is_without_a_layer_and_no_chunk_longer_than_the_prompt() -> None:
    rows = rows_of(CONFIG, 100, 4)
    assert max(row.world_size for row in rows) == 4
    assert {row.chunk_size for row in rows if row.grows == "chunk"} == {32, 64}


def test_an_op_costs_what_the_layers_alone_do_not() -> None:
    row = rows_of(CONFIG, 2048, 8)[0]
    zero = GrowthTimes(60, [1.0, 2.0, 4.0], [0.9, 0.9, 0.9], [0.8, 0.8, 0.8])
    one = GrowthTimes(40, [1.5, 1.0, 3.0], [0.5, 0.7, 0.5], [0.4, 0.4, 0.4])
    case = case_of(row, [zero, one])
    assert case["seconds"] == [1.5, 2.0, 4.0]
    assert (case["median_s"], case["ops"]) == (2.0, 100)
    assert case["per_op_ms"] == pytest.approx(2.0)  # 0.2 s of 100 ops in two of three rounds
    shown = table({"model": {"hidden_size": 256}, "threads": 1, "repeats": 3, "cases": [case]})
    assert "512" in shown
    assert "2.000" in shown
