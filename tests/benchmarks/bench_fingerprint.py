"""How long the fingerprint of a checkpoint takes whose weights are 10 GB: only samples of them are read.

Median of 5, in seconds. Run as `python tests/benchmarks/bench_fingerprint.py` from the repository's root. Not a test:
times are never asserted.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

sys.path.insert(0, str(Path(__file__).parents[2]))


from dinfer.model.checkpoint import fingerprint
from tests.support.tiny import tiny_checkpoint

REPEATS = 5
NBYTES = 10_000_000_000
HEADER = b'{"w":{"dtype":"F32","shape":[2500000000],"data_offsets":[0,10000000000]}}'


def main() -> None:
    """One line."""
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_checkpoint(Path(folder) / "model", layers=1)
        times = []
        with (model / "model.safetensors").open("wb") as stream:
            stream.write(len(HEADER).to_bytes(8, "little") + HEADER)
            stream.truncate(8 + len(HEADER) + NBYTES)  # sparse: takes no space
        for _ in range(REPEATS):
            began = perf_counter()
            fingerprint(model)
            times.append(perf_counter() - began)
    print(f"fingerprint of {NBYTES / 1e9:.0f} GB: {median(times):.3f} s")


if __name__ == "__main__":
    main()
