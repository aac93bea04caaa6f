"""An engine on another host: `python -m dinfer.cluster.ipyparallel.remote ARGUMENT…`, by ssh or as a task of Slurm's.

It takes its rank from the environment, and its rank is its id. ipyparallel's arguments follow.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from dinfer.cluster.ipyparallel.engine import be_engine
from dinfer.cluster.ipyparallel.launcher import STARTED_BY

GPUS = Path("/proc/driver/nvidia/gpus")
"""a folder for each NVIDIA GPU of the machine; Jetson boards, which have one, do not have it"""


def rank_names(environment: Mapping[str, str], gpus: int) -> dict[str, str]:
    """The variables of a rank, which ssh has set or Slurm names otherwise. `gpus`: how many this machine has."""
    names = {STARTED_BY: environment.get(STARTED_BY, "slurm")}
    for name, of_slurm in (("RANK", "PROCID"), ("WORLD_SIZE", "NTASKS"), ("LOCAL_RANK", "LOCALID")):
        # One that replaces an engine of a job is a task of its own, of number 0, and has its rank from that engine.
        value = environment.get(name if STARTED_BY in environment else f"SLURM_{of_slurm}")
        if value is None:
            raise SystemExit(
                f"this engine's rank is unknown: neither {name} nor SLURM_{of_slurm} is set. Start it with "
                "`ipcluster start` in a profile that `dinfer profile` has written."
            )
        names[name] = value
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    ids = list(map(str, range(gpus))) if visible is None else [one for one in visible.split(",") if one]
    if len(ids) > 1:  # one each
        names["CUDA_VISIBLE_DEVICES"] = ids[int(names["LOCAL_RANK"]) % len(ids)]
    return names


def main() -> None:
    """Become the engine."""
    names = rank_names(os.environ, len(list(GPUS.glob("*"))) if GPUS.is_dir() else 0)
    # ssh begins in the user's home, to which a relative folder belongs; the engine changes to its working folder.
    folder = os.path.abspath(os.environ.get("IPP_PROFILE_DIR", "."))
    os.environ.update(names, IPP_PROFILE_DIR=folder)
    be_engine([*sys.argv[1:], f"--IPEngine.id={names['RANK']}"])


if __name__ == "__main__":
    main()
