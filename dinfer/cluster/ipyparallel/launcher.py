"""Engines that have their rank as id and in their environment: here (`ipcluster start -n 3 --engines=dinfer`), or on
other hosts (`profiles`)."""

import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ipyparallel.cluster.launcher import (
    LocalControllerLauncher,
    LocalEngineLauncher,
    LocalEngineSetLauncher,
    SlurmEngineSetLauncher,
    SSHEngineLauncher,
    SSHEngineSetLauncher,
)
from traitlets import default

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


class DinferControllerLauncher(LocalControllerLauncher):  # type: ignore[misc]
    """A controller that looks for heartbeats every second, three times as often as by default: an engine counts as
    registered once the first has been seen. Engines are given up after the same 30 s."""

    entrypoint_name = f"{__name__}.DinferControllerLauncher"

    def find_args(self) -> list[str]:
        beats = ["--HeartMonitor.period=1000", "--HeartMonitor.max_heartmonitor_misses=30"]
        return [*super().find_args(), *beats]


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

    @default("engine_cmd")
    def _early_engine(self) -> list[str]:
        return [sys.executable, "-m", "dinfer.cluster.ipyparallel.engine"]

    entrypoint_name = f"{__name__}.DinferEngineSetLauncher"
    """its name in cluster files, which can be imported without the entry point `dinfer`"""


# -- engines on other hosts

STARTED_BY = "DINFER_STARTED_BY"
"""what started an engine on another host: "ssh HOST" or "slurm"; unset: it runs on this machine"""

UNATTENDED = "DINFER_UNATTENDED"
"""set for an ipcluster that ends once it has started the engines"""


class SSHRankLauncher(SSHEngineLauncher):  # type: ignore[misc]
    """One engine on a host, `HOST/NUMBER` by its identifier."""

    @property
    def program(self) -> list[str]:
        return [self.remote_python, "-m", "dinfer.cluster.ipyparallel.remote"]

    @default("remote_output_file")
    def _log_of_engine(self) -> str:
        return engine_log(self.remote_profile_dir, self.cluster_id, self._rank)

    @property
    def _rank(self) -> int:
        host, _, number = str(self.identifier).rpartition("/")
        return int(self.parent.first_ranks[host]) + int(number)

    def _start_waiting(self) -> None:
        """Where ipcluster ends once it has started the engines, the connections by which it waits would outlive it."""
        if not os.environ.get(UNATTENDED):
            super()._start_waiting()

    def get_env(self) -> dict[str, str]:
        """Whatever of this machine's environment the engine may need, its user sets on the host."""
        host, _, number = str(self.identifier).rpartition("/")
        given: dict[str, str] = super().get_env()
        return {
            **given,
            "RANK": str(self._rank),
            "WORLD_SIZE": str(self.parent.world_size),
            "LOCAL_RANK": number,
            "PYTHONSAFEPATH": "1",
            STARTED_BY: f"ssh {host}",
        }


class SSHRankSetLauncher(SSHEngineSetLauncher):  # type: ignore[misc]
    """ipyparallel's, where engines have their rank as id: hosts in the order of the config, then engines of a host."""

    engines: dict[str, Any]
    launcher_class = SSHRankLauncher
    entrypoint_name = f"{__name__}.SSHRankSetLauncher"

    def start(self, n: int) -> Any:
        """Start `n` engines, or as many as the hosts have."""
        engines, self.first_ranks = dict[str, Any](), dict[str, int]()
        first, wanted = 0, dict[str, Any](self.engines)
        for host, given in wanted.items():
            own = dict(given) if isinstance(given, Mapping) else {"n": given}
            own.setdefault("remote_profile_dir", remote_profile_dir(self.profile_dir, host))
            engines[host], self.first_ranks[host] = own, first
            first += own.setdefault("n", 1)
        self.engines, self.world_size = engines, min(n, first)
        return super().start(n)


def remote_profile_dir(profile_dir: str, host: str) -> str:
    """Where a host keeps the connection file, under the user's home. Each has a folder of its own, not the profile's:
    where hosts share a home, scp would empty the very file that it copies."""
    name = Path(profile_dir).name.removeprefix("profile_")
    return f".dinfer/profiles/{name}-{re.sub('[^A-Za-z0-9.-]', '-', host)}"


def engine_log(folder: str, cluster_id: str, rank: int | str) -> str:
    """What an engine says on its host, in a profile's folder there."""
    return f"{folder}/log/ipengine-{cluster_id}-{rank}.out"


class SlurmRankSetLauncher(SlurmEngineSetLauncher):  # type: ignore[misc]
    """ipyparallel's own; by this name it is known that `remote` gives each task of the job its rank."""

    entrypoint_name = f"{__name__}.SlurmRankSetLauncher"

    def __init__(self, work_dir: str = ".", config: Any = None, **kwargs: Any) -> None:
        super().__init__(work_dir=work_dir, config=config, **kwargs)
        if folder := kwargs.get("profile_dir"):  # not the folder in which the notebook is
            log = Path(folder) / "log"
            log.mkdir(parents=True, exist_ok=True)
            self.batch_file = str(batch_file(log, self.cluster_id))


def batch_file(log: Path, cluster_id: str) -> Path:
    """The script of a cluster's job, in a profile's folder of logs."""
    return log / f"slurm-{cluster_id or 'dinfer'}.sbatch"
