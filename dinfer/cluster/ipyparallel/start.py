"""Starts a cluster of dinfer's own with ipcluster, which then leaves it to itself: joined like any other."""

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dinfer.cluster.ipyparallel.ending import PREFIX, end_cluster
from dinfer.cluster.ipyparallel.errors import ClusterError
from dinfer.cluster.ipyparallel.identity import Identity
from dinfer.cluster.ipyparallel.known import Known, Record, record_path
from dinfer.cluster.ipyparallel.launcher import BEHIND, rank_environment

LAUNCHERS = {"dinfer": "dinfer.cluster.ipyparallel.launcher.DinferEngineSetLauncher"}
"""by their class, so that they are found without an entry point"""


class ClusterPlace(NamedTuple):
    """Where the processes of a cluster are to be. `address`: of this machine, at which its controller listens, "" for
    loopback; `behind`: by rank, the command behind which the engine is started (see launcher), () for none."""

    address: str = ""
    behind: Sequence[Sequence[str]] = ()


HERE = ClusterPlace()


def start_cluster(
    profile_dir: Path, n: int, engines: str, timeout: float, place: ClusterPlace = HERE
) -> Known:
    """Start controller and engines; the engines may still be on their way. Raises ClusterError.

    Engines are put behind something by the launcher `dinfer` alone.
    """
    if engines in LAUNCHERS:
        _check_gpu_ids(n)  # ipcluster would print a traceback and wait
    cluster = Known(profile_dir, f"{PREFIX}{os.getpid()}-{secrets.token_hex(3)}")
    record = Record(cluster.cluster_id, (Identity.of(os.getpid()),))
    record.write(
        record_path(profile_dir, cluster.cluster_id)
    )  # before: so that `dinfer clean` knows whose it is
    try:
        said = _ipcluster(cluster, n, engines, timeout, place)
        if said is not None:
            raise ClusterError(f"no cluster could be started. ipcluster says: {said}")
    except BaseException:
        end_cluster(cluster)
        raise
    return cluster


def last_words(cluster: Known) -> str:
    """The end of an engine's log, as the end of a message; "" where no engine has said anything."""
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
    """None when all went well, else what it said at the end."""
    command = [
        *(sys.executable, "-m", "ipyparallel.cluster", "start", f"-n={n}", "--daemonize"),
        f"--profile-dir={cluster.profile_dir}",
        f"--cluster-id={cluster.cluster_id}",
        f"--engines={LAUNCHERS.get(engines, engines)}",
        "--IPClusterStart.clean_logs=False",  # they are other clusters'
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
    except subprocess.TimeoutExpired as late:  # its output is bytes even where text was asked for
        said = b"".join(part for part in (late.stdout, late.stderr) if isinstance(part, bytes))
        return f"(not done within {timeout:g} s) {_end_of(said.decode(errors='replace'))}"
    return None if done.returncode == 0 else _end_of(done.stdout + done.stderr)


def _end_of(said: str) -> str:
    return " / ".join(said.splitlines()[-5:])


def _check_gpu_ids(n: int) -> None:
    """Raises ClusterError where DINFER_GPU_IDS does not fit `n` engines."""
    try:
        rank_environment(0, n, os.environ)
    except ValueError as error:
        raise ClusterError(str(error)) from None
