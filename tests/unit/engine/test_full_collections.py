"""Full garbage collections wait while lanes run, and no longer."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from dinfer.engine.ops import HANDLERS
from dinfer.model.decoder import Decoder
from tests.support.twin import prompt, twin

IDS = prompt(10)


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_they_wait_while_any_lane_runs(small: Decoder, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    usual, seen = gc.get_threshold(), set[int]()
    layer = HANDLERS["layer"]

    def looking(*given: Any) -> Any:
        seen.add(gc.get_threshold()[2])
        return layer(*given)

    monkeypatch.setitem(HANDLERS, "layer", looking)
    with twin(small, world_size=2, chunk_size=4, backend=backend) as made:
        for engine in made.engines:
            engine.prepare(IDS)
        assert gc.get_threshold() == usual  # they stand at their limits
        made.all(lambda engine: engine.prefill_phase())
        assert min(seen) > 1_000_000
        assert gc.get_threshold() == usual


def test_a_rank_that_fails_holds_them_no_longer(small: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = gc.get_threshold()
    with twin(small, world_size=2, chunk_size=4) as made:
        fleet = made.prepare(IDS)
        monkeypatch.setattr(made.engines[1].executor.state, "layer", None)
        made.go(fleet)
        with pytest.raises(RuntimeError):
            fleet.wait(lambda _: False, 30)
    assert gc.get_threshold() == usual
