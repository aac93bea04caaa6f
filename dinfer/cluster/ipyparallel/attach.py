"""Joins the running cluster of a profile, or starts one.

`ipcluster start --daemonize` starts it and not `ipyparallel.Cluster` in this process: the cluster's processes must be
nobody's children, so that engines survive a kernel that restarts, and no thread stays here to wait for them.
"""

import contextlib
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from IPython.paths import get_ipython_dir

from dinfer.cluster.ipyparallel.calls import wait_until
from dinfer.cluster.ipyparallel.clean import PREFIX, end_cluster
from dinfer.cluster.ipyparallel.cluster import Cluster
from dinfer.cluster.ipyparallel.errors import ClusterError, TooFewEngines
from dinfer.cluster.ipyparallel.identity import Identity
from dinfer.cluster.ipyparallel.known import (
    STARTING_S,
    Known,
    Record,
    choose_cluster,
    choose_engines,
    engines_to_come,
    known_clusters,
)
from dinfer.cluster.ipyparallel.launcher import (
    BEHIND,
    UNATTENDED,
    DinferControllerLauncher,
    DinferEngineSetLauncher,
    rank_environment,
)
from dinfer.cluster.ipyparallel.profiles import Profile
from dinfer.cluster.ipyparallel.reach import check_hosts, why_not_started
from dinfer.cluster.ranks import DEFAULT_N
from dinfer.rank.process import exists

HOST_S = 20.0
"""how much longer a start may take for each engine on another host: ssh connects several times"""


class ClusterPlace(NamedTuple):
    """Where the processes of a cluster run. `address`: this machine's, at which the controller listens, "" for
    loopback; `behind`: by rank, the command that starts the engine (see launcher), () for none."""

    address: str = ""
    behind: Sequence[Sequence[str]] = ()


def attach(
    n: int | None = None,
    *,
    profile: str = "default",
    cluster_id: str | None = None,
    start: bool | None = None,
    timeout: float = 60,
    place: ClusterPlace | None = None,
) -> Cluster:
    """The first `n` engines of a running cluster as ranks, or of a new one if none runs. By default, as many as a
    profile that `dinfer profile` has written starts, else 3.

    `start=False` never starts one, `start=True` always does; `place`: where the processes of a new one run. Raises
    ClusterError.
    """
    profile_dir = Path(get_ipython_dir(), f"profile_{profile}")  # ipyparallel's; it need not exist
    profiled = Profile.read(profile_dir)
    n = n or (profiled.n if profiled else DEFAULT_N)
    me = Identity.of(os.getpid())
    known = [] if start else known_clusters(profile_dir)
    known = [cluster for cluster in known if cluster_id in (None, cluster.cluster_id)]
    wait_until(lambda: not any(cluster.is_coming() for cluster in known), timeout)
    found = choose_cluster([(cluster, cluster.owner()) for cluster in known if cluster.is_running()])
    if found:
        left = Record.read(found.record_file) if found.owner() == "nobody" else None
        # It takes over a cluster that dinfer started and whose clients have ended.
        with contextlib.suppress(OSError, ValueError):  # a user's cluster has no record
            Record.read(found.record_file).with_client(me).write(found.record_file)
        try:
            return _join(found, n, timeout, was_left=left is not None)
        except TooFewEngines as error:
            # One that has any engine is kept: that may have weights and a paused run. Without, all have ended with
            # their client, as those on other hosts do, and only a controller is left.
            if error.engines or left is None or start is False or cluster_id is not None:
                if left:
                    left.write(
                        found.record_file
                    )  # this process has not joined: the next attempt is as the first
                raise
            end_cluster(found)
            print(
                f"{found.name} was left, and its engines have ended: it is ended, and a new one is started",
                flush=True,
            )
    if start is False or cluster_id is not None:
        cluster = Known(profile_dir, cluster_id or "")
        stale = " (its files exist, but its controller has ended)" if cluster.client_file.exists() else ""
        command = f"ipcluster start -n {n} {cluster.flags}".rstrip()
        none = f"{cluster.name} has no running cluster{stale}."
        raise ClusterError(f"{none} Start one with `{command}`, or let dinfer do it: start=None.{_hiding()}")
    if profiled:
        profiled.check_size(n)
        check_hosts(profiled, n)
        timeout += HOST_S * n
    own = Known(profile_dir, f"{PREFIX}{os.getpid()}-{secrets.token_hex(3)}")
    try:
        rank_environment(0, n, os.environ)  # ipcluster would print a traceback and wait
    except ValueError as error:
        raise ClusterError(str(error)) from None
    # First, so that `dinfer clean` finds what is left of a start that is killed.
    Record(own.cluster_id, (me,)).write(own.record_file)
    try:
        _start(own, n, timeout, place or ClusterPlace(), profiled)
        return _join(own, n, timeout)
    except TooFewEngines as error:
        why = why_not_started(profiled, own, n) if profiled else ""
        why = why or _end_of_log(own)
        end_cluster(own)
        raise ClusterError(f"not all of the {n} engines could be started.{why}") from error
    except BaseException:
        end_cluster(own)
        raise


def _hiding() -> str:
    """The files here that keep `ipcluster start` from starting in this folder, as the end of a message; "" for none."""
    found = [path.name for path in sorted(Path().glob("*.py")) if path.stem in sys.stdlib_module_names]
    if not found:
        return ""
    return (
        f" A cluster that is started by hand in {Path.cwd()} takes {', '.join(found)} for the module of Python of that "
        "name, and may not start: rename it, or set PYTHONSAFEPATH=1 for ipcluster."
    )


def _start(cluster: Known, n: int, timeout: float, place: ClusterPlace, profiled: Profile | None) -> None:
    """Start controller and engines, which may not have registered yet when this returns. Raises ClusterError."""
    command = [
        *(sys.executable, "-m", "ipyparallel.cluster", "start", f"-n={n}", "--daemonize"),
        f"--profile-dir={cluster.profile_dir}",
        f"--cluster-id={cluster.cluster_id}",
        "--IPClusterStart.clean_logs=False",  # the logs of other clusters
        f"--Cluster.controller_launcher_class={DinferControllerLauncher.entrypoint_name}",
        "--Cluster.delay=0",  # engines are started once the controller's files are there
    ]
    if not profiled:  # whose config says it
        command.append(
            f"--engines={DinferEngineSetLauncher.entrypoint_name}"
        )  # by class, without an entry point
    if place.address:
        command += [f"--ip={place.address}", f"--location={place.address}"]
    # Controller and engines take no types.py or queue.py of the working folder for Python's own. The user's modules are
    # found there all the same: IPython adds the folder, behind the standard library.
    environment = {**os.environ, "PYTHONSAFEPATH": "1", UNATTENDED: "1"}
    if place.behind:
        environment[BEHIND] = json.dumps(place.behind)
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment,
        )
        late, output = "", done.stdout + done.stderr
        if done.returncode == 0:
            return
    except subprocess.TimeoutExpired as error:  # its output is bytes even with text=True
        late = f"(not done within {timeout:g} s) "
        parts = [part for part in (error.stdout, error.stderr) if isinstance(part, bytes)]
        output = b"".join(parts).decode(errors="replace")
    end = " / ".join(output.splitlines()[-5:])
    raise ClusterError(f"no cluster could be started. ipcluster reports: {late}{end}")


def _end_of_log(cluster: Known) -> str:
    """The end of the first engine log that has any text, as the end of a message; "" for none."""
    for path in sorted((cluster.profile_dir / "log").glob(f"ipengine-{cluster.cluster_id}-*.log")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if lines := [line for line in text.splitlines() if line.strip("- ")]:
            return f" {path.name} ends: {' / '.join(lines[-5:])}"
    return ""


def _join(cluster: Known, n: int, timeout: float, *, was_left: bool = False) -> Cluster:
    """`was_left`: its client has ended. Raises ClusterError."""
    import ipyparallel

    try:
        client = ipyparallel.Client(
            str(cluster.client_file), profile_dir=str(cluster.profile_dir), timeout=min(timeout, 10)
        )
    except (OSError, TimeoutError) as error:  # something else listens there, or nothing answers
        raise ClusterError(f"the controller of {cluster.name} does not answer: {error}") from error

    def are_there() -> bool:
        """Whether the first engines have registered, or no more are starting: who starts late keeps its rank."""
        if cluster.is_being_written() and cluster.age_s() < STARTING_S:
            return False
        if set(range(n)) <= set(client.ids):
            return True
        to_come = engines_to_come(cluster.description(), exists, cluster.age_s(), was_left=was_left)
        return len(client.ids) >= to_come

    try:
        wait_until(are_there, timeout)
        ids = choose_engines(client.ids, n, cluster)
        return Cluster(cluster, client, ids, started=cluster.owner() == "me", timeout=timeout)
    except BaseException:
        client.close()
        raise
