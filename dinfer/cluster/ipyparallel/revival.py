"""Starts an engine in the place of one that has ended: same id, network, interpreter, folder and environment."""

import contextlib
import json
import os
import signal
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dinfer.cluster.ipyparallel.calls import wait_until
from dinfer.cluster.ipyparallel.errors import ClusterError
from dinfer.cluster.ipyparallel.facts import EngineFacts
from dinfer.cluster.ipyparallel.identity import Identity, runs
from dinfer.cluster.ipyparallel.known import Known
from dinfer.cluster.ipyparallel.launcher import command_before

_OF_MPI = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "MPI_", "HYDRA_", "HYDI_")
"""what mpiexec has told the engine: no longer true, for the new one is not its child"""


def revive(cluster: Known, client: Any, facts: EngineFacts, controller: Identity, timeout: float) -> None:
    """Returns once the new engine has registered. It ends by itself when `controller` is gone. Raises ClusterError."""
    engine_id = facts.engine_id
    # A stock ipcluster ends its controller once all engines are gone, and then nobody says that they are.
    wait_until(lambda: engine_id not in client.ids or controller.state() == "gone", timeout)
    if controller.state() == "gone":
        raise ClusterError(f"the controller of {cluster.name} is gone: start the cluster again.")
    if engine_id in client.ids:
        raise ClusterError(f"the controller still takes engine {engine_id} for alive after {timeout:g} s.")
    pid = _start(cluster, facts, controller)
    try:
        wait_until(lambda: engine_id in client.ids or not runs(pid), timeout)
        if not runs(pid):
            raise ClusterError(f"a new engine {engine_id} ended at once.{_last_words(cluster, engine_id)}")
        if engine_id not in client.ids:
            late = f"a new engine {engine_id} did not register within {timeout:g} s."
            raise ClusterError(late + _last_words(cluster, engine_id))
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        raise


def _start(cluster: Known, facts: EngineFacts, controller: Identity) -> int:
    """The new process's id."""
    environment = {name: value for name, value in facts.environment.items() if not name.startswith(_OF_MPI)}
    command = [
        *command_before(facts.engine_id, facts.environment),
        *(facts.executable, "-m", "dinfer.cluster.ipyparallel.engine"),
        *(str(_log(cluster, facts.engine_id)), json.dumps(asdict(controller))),
        f"--profile-dir={cluster.profile_dir}",
        f"--cluster-id={cluster.cluster_id}",
        f"--IPEngine.id={facts.engine_id}",
    ]
    where = facts.folder if Path(facts.folder).is_dir() else None
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environment,
        cwd=where,
        check=False,
    )
    if done.returncode:
        raise ClusterError(
            f"engine {facts.engine_id} could not be started again: {done.stderr.strip()[-400:]}"
        )
    return int(done.stdout)


def _last_words(cluster: Known, engine_id: int) -> str:
    """The end of a new engine's log, as the end of a message; "" without."""
    try:
        lines = _log(cluster, engine_id).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return " Its log ends: " + " / ".join(lines[-3:]) if lines else ""


def _log(cluster: Known, engine_id: int) -> Path:
    return cluster.profile_dir / "log" / f"ipengine-{cluster.cluster_id}-again-{engine_id}.log"
