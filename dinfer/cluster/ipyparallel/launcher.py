"""`ipcluster start -n 3 --engines=dinfer`: local engines whose id is their rank, and who know it from the start."""

import json
import os
from collections.abc import Mapping

from ipyparallel.cluster.launcher import LocalEngineLauncher, LocalEngineSetLauncher

GPU_IDS = "DINFER_GPU_IDS"
"""the GPU of each rank, such as 0,1,2: its engine then sees that one only. Not set: every engine sees them all"""

BEHIND = "DINFER_ENGINES_BEHIND"
"""JSON: by rank, the command behind which its engine is started, such as ["ip", "netns", "exec", "one"], which must
become the engine's process. Not set: none"""


def rank_environment(rank: int, world_size: int, environment: Mapping[str, str]) -> dict[str, str]:
    """What an engine's environment says beyond its parent's. Raises ValueError."""
    names = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    if not (text := environment.get(GPU_IDS, "").strip()):
        return names
    ids = [word.strip() for word in text.split(",")]
    if len(ids) != world_size or not all(word.isdigit() for word in ids):
        raise ValueError(
            f"{GPU_IDS} is {text!r}, but {world_size} engines are started; give one GPU id per engine "
            "(the same id may stand for several)."
        )
    return {**names, "CUDA_VISIBLE_DEVICES": ids[rank]}


def command_before(rank: int, environment: Mapping[str, str]) -> list[str]:
    """What stands before an engine's own command."""
    behind: list[list[str]] = json.loads(environment.get(BEHIND) or "[]")
    return behind[rank] if rank < len(behind) else []


class DinferEngineLauncher(LocalEngineLauncher):  # type: ignore[misc]
    """One engine; its set has given it its place as identifier."""

    def get_env(self) -> dict[str, str]:
        given: dict[str, str] = super().get_env()
        return {**given, **rank_environment(int(self.identifier), self.parent.n, os.environ)}

    def find_args(self) -> list[str]:
        """Asks for an id: else engines are numbered as they happen to register, and on from there after a restart."""
        before = command_before(int(self.identifier), os.environ)
        return [*before, *super().find_args(), f"--IPEngine.id={self.identifier}"]


class DinferEngineSetLauncher(LocalEngineSetLauncher):  # type: ignore[misc]
    """The engines of one cluster on this machine."""

    launcher_class = DinferEngineLauncher
    entrypoint_name = f"{__name__}.DinferEngineSetLauncher"
    """how cluster files name it: found with or without the entry point `dinfer`"""
