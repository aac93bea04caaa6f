"""`dinfer bench planner`: what is swept, and what is made of the times."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dinfer.bench.link_rank import make_slow
from dinfer.bench.planner import _place, candidates_of, case_figures, cases_of, table
from dinfer.config import Config
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
    swept = {
        "by 64": {"measured_s": 1.0, "predicted_s": 0.9},
        "by 128": {"measured_s": 2.0, "predicted_s": 1.9},
    }
    found = case_figures("even", 0.99, {"measured_s": 1.1, "rounds_s": [1.1]}, swept)
    assert (found["chosen_s"], found["predicted_s"], found["best"], found["best_s"]) == (
        1.1,
        0.99,
        "by 64",
        1.0,
    )
    assert (found["near"], found["off"]) == (pytest.approx(0.1), pytest.approx(-0.1))
    assert found["swept"]["by 128"] == {"measured_s": 2.0, "predicted_s": 1.9}
    about = {"tokens": 300, "layers": 9, "world_size": 3, "threads": 1, "repeats": 2}
    more = {
        "because": ["so"],
        "links": "a net",
        "beside": {"prefill": {"predicted_s": 0.99, "measured_s": 1.1}},
    }
    told = table({**about, "cases": [{**found, **more}]})
    assert "+10.0%" in told
    assert told.partition("even:\n")[2].splitlines()[:2] == ["  so", "  links of a net"]
    assert told.splitlines()[-1].split() == ["prefill", "0.9900", "1.1000", "-10%"]


def test_plans_that_are_the_same_are_swept_once() -> None:
    """With two ranks alike, a ring is pairwise, and layers by speed are equal ones."""
    machine = replace(MACHINE, layers=(LAYER, LAYER), links=Links(tuple(MACHINE.links.speeds[:3:2])))
    default = Candidate(even_starts(8, 2), sized_lengths(64, 32), "pipelined", "pairwise")
    assert list(candidates_of(Planner(machine, 8), default)) == [
        "equal layers, pairwise, by 16",
        "equal layers, pairwise, by 32",
        "equal layers, pairwise, by 64",
    ]


def test_without_hosts_payloads_are_kept_back_and_the_result_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinfer.bench.planner.why_not", lambda: "only root can make network namespaces")
    case = cases_of(2)[2]
    with _place(Config(world_size=2), case) as place:
        assert place.pace == [(0, 1, 50e6 / 8), (1, 0, 500e6 / 8)]
        assert place.how == (
            "50 and 500 Mbit/s: payloads are kept back by dinfer, since only root can make network namespaces"
        )


def test_a_slow_rank_runs_each_layer_more_often_with_the_same_result() -> None:
    calls = list[int]()

    def layer(index: int) -> int:
        calls.append(index)
        return index + 1

    decoder = cast(Any, SimpleNamespace(layer=layer))
    make_slow(decoder, 3)
    assert decoder.layer(5) == 6
    assert calls == [5, 5, 5]
