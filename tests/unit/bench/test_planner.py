"""`dinfer bench planner`: what is swept, and what is made of the times."""

from __future__ import annotations

from itertools import permutations
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dinfer.bench.link_rank import make_slow
from dinfer.bench.planner import candidates_of, case_figures, cases_of, table
from dinfer.planner.choose import Candidate, Planner, even_starts, sized_lengths
from dinfer.planner.costs import LayerCost
from dinfer.planner.machine import Links, LinkSpeed, MeasuredMachine

LAYER = LayerCost(1e-3, 0, 1e-4, 0)
MACHINE = MeasuredMachine(
    (LAYER, LAYER.times(2), LAYER),
    Links(tuple(LinkSpeed(*pair, 1e-4, 1e8, 5e7) for pair in permutations(range(3), 2))),
    64,
    128,
)


def test_the_machines_are_even_and_uneven() -> None:
    assert [(case.slow, case.link) for case in cases_of(3)] == [((), None), ((1, 2, 1), None), ((), (0, 1))]


def test_every_plan_of_the_sweep_is_of_the_whole_prompt() -> None:
    default = Candidate(even_starts(9, 3), sized_lengths(300, 64), "pipelined", "pairwise")
    found = candidates_of(Planner(MACHINE, 9), default)
    assert all(sum(one.lengths) == 300 for one in found.values())
    assert found["equal layers, ring, by 64"] == Candidate((0, 3, 6), (64,) * 4 + (44,), "pipelined", "ring")
    assert found["layers by speed, pairwise, by 16"].starts == (0, 4, 6)
    assert len({*found["equal layers, pairwise, quadratic rule"].lengths}) > 1


def test_a_case_says_how_near_the_choice_is_and_how_far_the_prediction() -> None:
    seconds = {"chosen": 1.1, "by 64": 1.0, "by 128": 2.0}
    found = case_figures("even", 0.99, seconds, {"by 64": 0.9, "by 128": 1.9})
    assert (found["chosen_s"], found["predicted_s"], found["best"], found["best_s"]) == (
        1.1,
        0.99,
        "by 64",
        1.0,
    )
    assert (found["near"], found["off"]) == (pytest.approx(0.1), pytest.approx(-0.1))
    assert found["swept"]["by 128"] == {"measured_s": 2.0, "predicted_s": 1.9}
    about = {"tokens": 300, "layers": 9, "world_size": 3, "threads": 1, "repeats": 2}
    told = table({**about, "cases": [{**found, "because": ["so"]}], "skipped": {"one link": "needs root"}})
    assert "+10.0%" in told
    assert told.endswith("even:\n  so\nleft out: one link: needs root")


def test_a_slow_rank_runs_each_layer_more_often_with_the_same_result() -> None:
    calls = list[int]()

    def layer(index: int) -> int:
        calls.append(index)
        return index + 1

    decoder = cast(Any, SimpleNamespace(layer=layer))
    make_slow(decoder, 3)
    assert decoder.layer(5) == 6
    assert calls == [5, 5, 5]
