"""`ipcluster start -n 3 --engines=dinfer`: local engines that have their rank as id and in their environment."""

import json
import os
from collections.abc import Mapping

from ipyparallel.cluster.launcher import LocalEngineLauncher, LocalEngineSetLauncher

GPU_IDS = "DINFER_GPU_IDS"
"""the GPU of each rank, such as 0,1,2, which is then the only one that its engine sees; unset: engines see all GPUs"""

BEHIND = "DINFER_ENGINES_BEHIND"
"""JSON: by rank, a command that starts the engine, such as ["ip", "netns", "exec", "one"], and must exec it;
unset: none"""


def rank_environment(rank: int, world_size: int, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that a rank's engine has beyond its parent's. Raises ValueError."""
    names = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    if not (text := environment.get(GPU_IDS, "").strip()):
        return names
    ids = [word.strip() for word in text.split(",")]
    if len(ids) != world_size or not all(word.isdigit() for word in ids):
        raise ValueError(
            f"{GPU_IDS} is {text!r}, but {world_size} engines are started; give one GPU id per engine "
            "(the same id may be given to several)."
        )
    return {**names, "CUDA_VISIBLE_DEVICES": ids[rank]}


def command_before(rank: int, environment: Mapping[str, str]) -> list[str]:
    """The words before an engine's own command."""
    behind: list[list[str]] = json.loads(environment.get(BEHIND) or "[]")
    return behind[rank] if rank < len(behind) else []


class DinferEngineLauncher(LocalEngineLauncher):  # type: ignore[misc]
    """One engine; its identifier is its rank."""

    def get_env(self) -> dict[str, str]:
        given: dict[str, str] = super().get_env()
        return {**given, **rank_environment(int(self.identifier), self.parent.n, os.environ)}

    def find_args(self) -> list[str]:
        """Requests the rank as engine id: by default, ids follow the order of registration and grow after a restart."""
        before = command_before(int(self.identifier), os.environ)
        return [*before, *super().find_args(), f"--IPEngine.id={self.identifier}"]


class DinferEngineSetLauncher(LocalEngineSetLauncher):  # type: ignore[misc]
    """The engines of one cluster on this machine."""

    launcher_class = DinferEngineLauncher
    entrypoint_name = f"{__name__}.DinferEngineSetLauncher"
    """its name in cluster files, which can be imported without the entry point `dinfer`"""
