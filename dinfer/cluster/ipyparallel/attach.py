"""Joins the running cluster of a profile, or starts one."""

import contextlib
import os
from pathlib import Path
from typing import Any

from dinfer.cluster.ipyparallel.calls import wait_until
from dinfer.cluster.ipyparallel.clean import end_cluster
from dinfer.cluster.ipyparallel.cluster import Cluster
from dinfer.cluster.ipyparallel.errors import ClusterError, TooFewEngines
from dinfer.cluster.ipyparallel.identity import Identity, runs
from dinfer.cluster.ipyparallel.known import (
    STARTING_S,
    Known,
    Record,
    choose_cluster,
    choose_engines,
    engines_to_come,
    known_clusters,
    profile_folder,
    record_path,
)
from dinfer.cluster.ipyparallel.start import HERE, ClusterPlace, end_of_log, start_cluster

DEFAULT_N = 3


def attach(
    n: int | None = None,
    *,
    profile: str = "default",
    cluster_id: str | None = None,
    start: bool | None = None,
    timeout: float = 60,
    engines: str = "dinfer",
    place: ClusterPlace = HERE,
) -> Cluster:
    """The first `n` engines of a running cluster as ranks (None: all), or of a new one if none runs.

    `start=False` never starts one, `start=True` always does. `engines`: the launcher of a new cluster: dinfer, local,
    mpi or any other of ipyparallel's; `place`: where its processes run. Raises ClusterError.
    """
    profile_dir = profile_folder(profile)
    found = None if start else _running(profile_dir, cluster_id, timeout)
    if found:
        _sign(found)
        return _join(found, n, timeout)
    if start is False or cluster_id is not None:
        raise ClusterError(_none_runs(profile_dir, cluster_id, n))
    return _join_own(start_cluster(profile_dir, n or DEFAULT_N, engines, timeout, place), n, timeout)


def _running(profile_dir: Path, cluster_id: str | None, timeout: float) -> Known | None:
    """The cluster to join. Waits for a cluster that is being started."""
    known = [cluster for cluster in known_clusters(profile_dir) if cluster_id in (None, cluster.cluster_id)]
    wait_until(lambda: not any(cluster.is_coming() for cluster in known), timeout)
    return choose_cluster([(cluster, cluster.owner()) for cluster in known if cluster.is_running()])


def _sign(cluster: Known) -> None:
    """Record that this process uses a cluster that dinfer started; it takes over a cluster whose clients have ended."""
    path = record_path(cluster.profile_dir, cluster.cluster_id)
    with contextlib.suppress(OSError, ValueError):  # a user's cluster has no record
        Record.read(path).with_client(Identity.of(os.getpid())).write(path)


def _none_runs(profile_dir: Path, cluster_id: str | None, n: int | None) -> str:
    cluster = Known(profile_dir, cluster_id or "")
    stale = " (its files exist, but its controller has ended)" if cluster.client_file.exists() else ""
    command = f"ipcluster start -n {n or DEFAULT_N} {cluster.flags}".rstrip()
    return f"{cluster.name} has no running cluster{stale}. Start one with `{command}`, or let dinfer do it: start=None."


def _join_own(cluster: Known, n: int | None, timeout: float) -> Cluster:
    """Join the cluster just started; end it if that fails."""
    try:
        return _join(cluster, n, timeout)
    except TooFewEngines as error:
        log = end_of_log(cluster)
        end_cluster(cluster)
        raise ClusterError(f"not all of the {n or DEFAULT_N} engines could be started.{log}") from error
    except BaseException:
        end_cluster(cluster)
        raise


def _join(cluster: Known, n: int | None, timeout: float) -> Cluster:
    import ipyparallel

    try:
        client = ipyparallel.Client(
            str(cluster.client_file), profile_dir=str(cluster.profile_dir), timeout=min(timeout, 10)
        )
    except (OSError, TimeoutError) as error:  # something else listens there, or nothing answers
        raise ClusterError(f"the controller of {cluster.name} does not answer: {error}") from error
    try:
        wait_until(lambda: _are_there(client, cluster, n), timeout)
        ids = choose_engines(client.ids, n, cluster)
        return Cluster(cluster, client, ids, started=cluster.owner() == "me", timeout=timeout)
    except BaseException:
        client.close()
        raise


def _are_there(client: Any, cluster: Known, n: int | None) -> bool:
    """Whether enough engines have registered, or no more are starting."""
    if cluster.is_being_written() and cluster.age_s() < STARTING_S:
        return False
    to_come = engines_to_come(cluster.description(), runs, cluster.age_s())
    return len(client.ids) >= (to_come if n is None else min(n, to_come))
