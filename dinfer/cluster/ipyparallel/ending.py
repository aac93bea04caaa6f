"""Ends the clusters that dinfer started: every process that bears the cluster's id, and then its files."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from dinfer.cluster.ipyparallel.errors import ClusterError
from dinfer.cluster.ipyparallel.known import Known, record_path

PREFIX = "dinfer-"
"""ids of clusters that dinfer starts; no other cluster is ever ended here"""

GRACE_S = 3.0
"""between asking a process to end and killing it"""


def members(cluster: Known) -> list[psutil.Process]:
    """Controller, engines and what they have started: all inherit the id and the profile in their environment.

    Raises ValueError for a cluster that dinfer has not started.
    """
    if not cluster.cluster_id.startswith(PREFIX):
        raise ValueError(f"{cluster.name} was not started by dinfer.")
    return list(_bearers(cluster.cluster_id, str(cluster.profile_dir)))


def _bearers(cluster_id: str, profile_dir: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            found = process.environ()
            of_it = found.get("IPP_CLUSTER_ID") == cluster_id and found.get("IPP_PROFILE_DIR") == profile_dir
            if of_it and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def end_processes(cluster: Known) -> tuple[list[int], list[int]]:
    """The ids of processes ended, and of those that could not be."""
    ended: dict[int, psutil.Process] = {}
    for force in (False, True):  # what was about to be started is found in the second round
        there = members(cluster)
        ended |= {process.pid: process for process in there}
        for process in there:
            with contextlib.suppress(psutil.Error):
                process.kill() if force else process.terminate()
        psutil.wait_procs(there, timeout=GRACE_S)
    left = {process.pid for process in members(cluster)}
    return sorted(ended.keys() - left), sorted(left)


def files_of(cluster: Known) -> list[Path]:
    """Connection files, cluster file, logs, and dinfer's record, which is last."""
    security, log = cluster.profile_dir / "security", cluster.profile_dir / "log"
    found = [*security.glob(f"ipcontroller-{cluster.cluster_id}-*.json"), cluster.cluster_file]
    found += [*log.glob(f"ip*-{cluster.cluster_id}-*.log"), log / f"engines{cluster.cluster_id}.json"]
    record = record_path(cluster.profile_dir, cluster.cluster_id)
    return [path for path in [*found, record] if path.exists()]


def remove_files(cluster: Known) -> list[Path]:
    """The files removed."""
    found = files_of(cluster)
    for path in found:
        path.unlink(missing_ok=True)
    return found


def end_cluster(cluster: Known) -> tuple[list[int], list[int]]:
    """End it and remove its files, but for one that could not be ended. As `end_processes`."""
    ended, left = end_processes(cluster)
    if not left:
        remove_files(cluster)
    return ended, left


def stop_cluster(cluster: Known) -> None:
    """End any cluster: one that a user started as `ipcluster stop` does. Raises ClusterError."""
    if cluster.cluster_id.startswith(PREFIX):
        _, left = end_cluster(cluster)
        if left:
            raise ClusterError(
                f"{cluster.name}: these processes could not be ended: {', '.join(map(str, left))}."
            )
        return
    command = [sys.executable, "-m", "ipyparallel.cluster", "stop", f"--profile-dir={cluster.profile_dir}"]
    command += [f"--cluster-id={cluster.cluster_id}"] if cluster.cluster_id else []
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ClusterError(f"{cluster.name} could not be ended. ipcluster says: {done.stderr.strip()[-400:]}")
