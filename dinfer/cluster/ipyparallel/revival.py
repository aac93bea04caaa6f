"""Starts an engine in place of one that has ended: same id, network, interpreter, folder and environment.

ipyparallel's `Cluster.restart_engine` is not implemented (as of 9.2), and `restart_engines` ends all engines.
"""

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
"""variables set by mpiexec, which are wrong for the new engine: it is not a child of mpiexec"""


def revive(cluster: Known, client: Any, facts: EngineFacts, controller: Identity, timeout: float) -> None:
    """Return once the new engine has registered. It ends by itself when `controller` ends. Raises ClusterError."""
    engine_id = facts.engine_id
    # A stock ipcluster ends its controller once all engines have ended, and then nothing unregisters them.
    wait_until(lambda: engine_id not in client.ids or controller.state() == "gone", timeout)
    if controller.state() == "gone":
        raise ClusterError(f"the controller of {cluster.name} has ended: start the cluster again.")
    if engine_id in client.ids:
        raise ClusterError(f"the controller still lists engine {engine_id} as alive after {timeout:g} s.")
    pid = _start(cluster, facts, controller)
    try:
        wait_until(lambda: engine_id in client.ids or not runs(pid), timeout)
        if not runs(pid):
            raise ClusterError(f"the new engine {engine_id} ended at once.{_end_of_log(cluster, engine_id)}")
        if engine_id not in client.ids:
            late = f"the new engine {engine_id} did not register within {timeout:g} s."
            raise ClusterError(late + _end_of_log(cluster, engine_id))
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        raise


def _start(cluster: Known, facts: EngineFacts, controller: Identity) -> int:
    """Returns the new process's id."""
    environment = {name: value for name, value in facts.environment.items() if not name.startswith(_OF_MPI)}
    command = [
        *command_before(facts.engine_id, facts.environment),
        *(facts.executable, "-m", "dinfer.cluster.ipyparallel.engine"),
        *(str(_log(cluster, facts.engine_id)), json.dumps(asdict(controller))),
        f"--profile-dir={cluster.profile_dir}",
        f"--cluster-id={cluster.cluster_id}",
        f"--IPEngine.id={facts.engine_id}",
    ]
    folder = facts.folder if Path(facts.folder).is_dir() else None
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
        check=False,
    )
    if done.returncode:
        raise ClusterError(
            f"engine {facts.engine_id} could not be started again: {done.stderr.strip()[-400:]}"
        )
    return int(done.stdout)


def _end_of_log(cluster: Known, engine_id: int) -> str:
    """The end of the new engine's log, as the end of a message; "" for none."""
    try:
        lines = _log(cluster, engine_id).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return " Its log ends: " + " / ".join(lines[-3:]) if lines else ""


def _log(cluster: Known, engine_id: int) -> Path:
    return cluster.profile_dir / "log" / f"ipengine-{cluster.cluster_id}-again-{engine_id}.log"
