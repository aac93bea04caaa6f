"""Starts a cluster of dinfer's own, which is then joined like any other.

`ipcluster start --daemonize` does it and not `ipyparallel.Cluster` in this process: the cluster's processes must be
nobody's children, so that engines survive a kernel that restarts, and no thread stays here to wait for them.
"""

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dinfer.cluster.ipyparallel.clean import PREFIX, end_cluster
from dinfer.cluster.ipyparallel.errors import ClusterError
from dinfer.cluster.ipyparallel.identity import Identity
from dinfer.cluster.ipyparallel.known import Known, Record, record_path
from dinfer.cluster.ipyparallel.launcher import BEHIND, rank_environment

LAUNCHERS = {"dinfer": "dinfer.cluster.ipyparallel.launcher.DinferEngineSetLauncher"}
"""by class, so that they are found without an entry point"""


class ClusterPlace(NamedTuple):
    """Where the processes of a cluster run. `address`: this machine's, at which the controller listens, "" for
    loopback; `behind`: by rank, the command that starts the engine (see launcher), () for none."""

    address: str = ""
    behind: Sequence[Sequence[str]] = ()


HERE = ClusterPlace()


def start_cluster(
    profile_dir: Path, n: int, engines: str, timeout: float, place: ClusterPlace = HERE
) -> Known:
    """Start controller and engines, which may not have registered yet when this returns. Raises ClusterError.

    Only the launcher `dinfer` honours `place.behind`.
    """
    if engines in LAUNCHERS:
        _check_gpu_ids(n)  # ipcluster would print a traceback and wait
    cluster = Known(profile_dir, f"{PREFIX}{os.getpid()}-{secrets.token_hex(3)}")
    record = Record(cluster.cluster_id, (Identity.of(os.getpid()),))
    record.write(
        record_path(profile_dir, cluster.cluster_id)
    )  # first, so that `dinfer clean` finds what is left of a start that is killed
    try:
        error = _ipcluster(cluster, n, engines, timeout, place)
        if error is not None:
            raise ClusterError(f"no cluster could be started. ipcluster reports: {error}")
    except BaseException:
        end_cluster(cluster)
        raise
    return cluster


def end_of_log(cluster: Known) -> str:
    """The end of the first engine log that has any text, as the end of a message; "" for none."""
    for path in sorted((cluster.profile_dir / "log").glob(f"ipengine-{cluster.cluster_id}-*.log")):
        lines = [
            line
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
            if line.strip("- ")
        ]
        if lines:
            return f" {path.name} ends: {' / '.join(lines[-5:])}"
    return ""


def _ipcluster(cluster: Known, n: int, engines: str, timeout: float, place: ClusterPlace) -> str | None:
    """None if it succeeded, else the end of its output."""
    command = [
        *(sys.executable, "-m", "ipyparallel.cluster", "start", f"-n={n}", "--daemonize"),
        f"--profile-dir={cluster.profile_dir}",
        f"--cluster-id={cluster.cluster_id}",
        f"--engines={LAUNCHERS.get(engines, engines)}",
        "--IPClusterStart.clean_logs=False",  # the logs of other clusters
    ]
    if place.address:
        command += [f"--ip={place.address}", f"--location={place.address}"]
    environment = {**os.environ, BEHIND: json.dumps(place.behind)} if place.behind else None
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired as late:  # its output is bytes even with text=True
        output = b"".join(part for part in (late.stdout, late.stderr) if isinstance(part, bytes))
        return f"(not done within {timeout:g} s) {_end_of(output.decode(errors='replace'))}"
    return None if done.returncode == 0 else _end_of(done.stdout + done.stderr)


def _end_of(output: str) -> str:
    return " / ".join(output.splitlines()[-5:])


def _check_gpu_ids(n: int) -> None:
    """Raises ClusterError if DINFER_GPU_IDS does not fit `n` engines."""
    try:
        rank_environment(0, n, os.environ)
    except ValueError as error:
        raise ClusterError(str(error)) from None
