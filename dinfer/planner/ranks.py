"""How many of the measured ranks a prompt is worth: the planner's choice on all of them beside its choice on fewer."""

from collections.abc import Iterable
from dataclasses import replace

from dinfer.display import numbers_text
from dinfer.planner.choose import OPS, SLACK, Candidate, Chosen, Planner, even_starts
from dinfer.planner.machine import MeasuredMachine


def ranks_told(planner: Planner, chosen: Chosen, free: Iterable[str]) -> str:
    """Whether fewer ranks would be faster, in a sentence; "" for one rank. `free`: what may differ, as in `choose`.

    Of each number of ranks, those with the fastest layers are tried. The number cannot be chosen once ranks have been
    measured, so this is advice, and for the command line as for a session.
    """
    count, wanted = len(planner.machine.layers), tuple(free)
    if count == 1:
        return ""
    best_s, best = min(_fastest(planner, chosen.candidate, size, wanted) for size in range(1, count))
    few = f"{len(best)} rank{'s' * (len(best) > 1)} ({numbers_text(best)})"
    if best_s < chosen.predicted_s * (1 - SLACK):
        return (
            f"world_size {count}: {few} would take {best_s:.4g} s instead of {chosen.predicted_s:.4g} s, so "
            f"world_size {len(best)} would be faster for this prompt."
        )
    return f"world_size {count}: fewer ranks are not faster here; {few} would take {best_s:.4g} s."


def _fastest(
    planner: Planner, candidate: Candidate, size: int, free: tuple[str, ...]
) -> tuple[float, tuple[int, ...]]:
    """Seconds on the `size` ranks with the fastest layers, and which these are."""
    costs = planner.machine.layers
    kept = tuple(sorted(sorted(range(len(costs)), key=lambda rank: costs[rank].seconds(0, 128))[:size]))
    smaller = Planner(of_ranks(planner.machine, kept), planner.layers, OPS // len(costs))
    default = replace(candidate, starts=even_starts(planner.layers, size))
    return smaller.choose(default, free).predicted_s, kept


def of_ranks(machine: MeasuredMachine, kept: tuple[int, ...]) -> MeasuredMachine:
    """The machine with these ranks alone, numbered from 0."""
    number = {rank: n for n, rank in enumerate(kept)}
    links = tuple(
        one._replace(source=number[one.source], target=number[one.target])
        for one in machine.links.speeds
        if one.source in number and one.target in number
    )
    return replace(
        machine,
        layers=tuple(machine.layers[rank] for rank in kept),
        links=replace(machine.links, speeds=links),
        measured={},
    )
