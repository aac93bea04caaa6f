"""How many ranks a prompt is worth, by simulation."""

from __future__ import annotations

from itertools import permutations

import pytest

from dinfer.planner.choose import CHOICES, Candidate, Planner, even_lengths, even_starts
from dinfer.planner.costs import LayerCost
from dinfer.planner.machine import Links, LinkSpeed, MeasuredMachine
from dinfer.planner.ranks import of_ranks, ranks_told

LAYER = LayerCost(1e-3, 1e-8, 1e-4, 1e-8)


def machine(speeds: tuple[float, ...], wire: float) -> MeasuredMachine:
    """Ranks whose layers take so many times as long, on links of `wire` bytes per second."""
    links = tuple(
        LinkSpeed(*pair, 2e-4, wire, wire / len(speeds)) for pair in permutations(range(len(speeds)), 2)
    )
    return MeasuredMachine(tuple(LAYER.times(times) for times in speeds), Links(links), 1024, 2048)


def told(of: MeasuredMachine, layers: int = 6, tokens: int = 256) -> str:
    ranks = len(of.layers)
    planner = Planner(of, layers)
    default = Candidate(even_starts(layers, ranks), even_lengths(tokens, 4), "pipelined", "pairwise")
    return ranks_told(planner, planner.choose(default, CHOICES), CHOICES)


def test_fast_links_are_worth_all_ranks() -> None:
    assert told(machine((1, 1, 1), 1e9)).startswith(
        "world_size 3: fewer ranks are not faster here; 2 ranks (0, 1)"
    )


def test_slow_links_are_worth_one_rank_the_fastest() -> None:
    text = told(machine((2, 1, 2), 1e5))
    assert text.startswith("world_size 3: 1 rank (1) would take ")
    assert text.endswith("so world_size 1 would be faster for this prompt.")  # on the command line, too


def test_one_rank_is_told_nothing() -> None:
    assert told(machine((1,), 1e9)) == ""


def test_a_part_of_a_machine_keeps_its_ranks_and_their_links() -> None:
    whole = machine((1, 2, 3), 1e6)
    part = of_ranks(whole, (0, 2))
    assert part.layers == (whole.layers[0], whole.layers[2])
    assert [(one.source, one.target) for one in part.links.speeds] == [(0, 1), (1, 0)]
    assert part.links.by_link[1, 0].alone == whole.links.by_link[2, 0].alone
    with pytest.raises(KeyError):
        part.links.by_link[0, 2]
