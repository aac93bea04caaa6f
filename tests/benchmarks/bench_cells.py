"""How long the panel's map takes, once a plan and at each update.

Means of 100. Run as `python tests/benchmarks/bench_cells.py` from the repository's root. Not a test: times are never
asserted.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from dinfer.engine.board import Stand
from dinfer.plan.partition import partition
from dinfer.plan.schedule import build
from dinfer.views.bins import packed
from dinfer.views.cells import CellMap, cut_line


def main() -> None:
    """Time one update of three maps and print it."""
    for layers, chunks, ranks in ((36, 32, 3), (80, 64, 8), (80, 1000, 8)):
        shape = partition(layers=layers, tokens=chunks, world_size=ranks, chunk_size=1)
        plan = build(shape, "pipelined", "pairwise")
        middle = tuple(tuple(len(lane.ops) // 2 for lane in lanes) for lanes in plan.lanes)
        stands = [Stand(lanes, (True,) * len(lanes), lanes) for lanes in middle]
        begin = time.perf_counter()
        cells = CellMap(plan)
        built = time.perf_counter()
        for _ in range(100):
            states = cells.states(stands)
            cut_line(states)
            sent = packed(states)
        each = (time.perf_counter() - built) / 100
        print(
            f"{layers} x {chunks} x {ranks}: map {(built - begin) * 1e3:.1f} ms, update {each * 1e3:.2f} ms, "
            f"{len(sent):,} bytes"
        )


if __name__ == "__main__":
    main()
