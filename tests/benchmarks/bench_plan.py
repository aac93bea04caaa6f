"""How long it takes to build and verify a large plan: 8 ranks, 64 chunks, 80 layers.

Medians of 5, in CPU seconds of one core. Run as `python tests/benchmarks/bench_plan.py` from the repository's root.
Not a test: times are never asserted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import process_time

sys.path.insert(0, str(Path(__file__).parents[2]))

from dinfer.plan.cut import Cuts
from dinfer.plan.partition import partition
from dinfer.plan.schedule import SCHEDULES, STRATEGIES, build
from dinfer.plan.verify import verify

REPEATS = 5
SHAPE = partition(layers=80, tokens=64 * 512, world_size=8, chunk_size=512)


def seconds(call: Callable[[], object]) -> float:
    """The median CPU time of one call: what else runs on the machine does not count."""
    times = []
    for _ in range(REPEATS):
        begun = process_time()
        call()
        times.append(process_time() - begun)
    return median(times)


def main() -> None:
    """A line for each schedule and strategy."""
    print(f"{'schedule':<12}{'sync':<10}{'ops':>8}{'build s':>9}{'verify s':>9}{'sum s':>9}{'cuts s':>9}")
    for schedule in SCHEDULES:
        for strategy in STRATEGIES:
            plan = build(SHAPE, schedule, strategy)
            built = seconds(lambda: build(SHAPE, schedule, strategy))  # noqa: B023 - called at once
            verified = seconds(lambda: verify(plan))  # noqa: B023
            proved = verify(plan).proved
            cuts = seconds(lambda: Cuts(plan).chain("layer")) if proved else float("nan")  # noqa: B023
            ops = sum(1 for _ in plan.places())
            times = "".join(f"{time:9.3f}" for time in (built, verified, built + verified, cuts))
            print(f"{schedule:<12}{strategy:<10}{ops:8}{times}")


if __name__ == "__main__":
    main()
