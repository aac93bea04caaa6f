"""Ends clusters: one, with all its processes and files; and, for `dinfer clean`, all whose client has ended.

`ipcluster clean` would not do: it removes the logs and connection files of every cluster, running or not.
"""

import contextlib
import json
import logging
import os
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from IPython.paths import get_ipython_dir

from dinfer.cluster.ipyparallel.errors import ClusterError
from dinfer.cluster.ipyparallel.known import Known, Record, record_paths
from dinfer.cluster.ipyparallel.launcher import batch_file, engine_log, remote_profile_dir
from dinfer.cluster.ipyparallel.profiles import ASK_S, Asked, Profile, ssh_words

PREFIX = "dinfer-"
"""ids of clusters that dinfer starts; `end_cluster` and `clean` end no others"""

GRACE_S = 3.0
"""between SIGTERM and SIGKILL"""


def members(cluster: Known) -> list[psutil.Process]:
    """Controller, engines and their children: all inherit the cluster's id and profile in their environment.

    Raises ValueError for a cluster that dinfer did not start.
    """
    _check_own(cluster)
    found, wanted = [], (cluster.cluster_id, str(cluster.profile_dir))
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            names = process.environ()
            of_it = (names.get("IPP_CLUSTER_ID"), names.get("IPP_PROFILE_DIR")) == wanted
            if of_it and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _check_own(cluster: Known) -> None:
    """Raises ValueError for a cluster that dinfer did not start."""
    if not cluster.cluster_id.startswith(PREFIX):
        raise ValueError(f"{cluster.name} was not started by dinfer.")


def files_of(cluster: Known) -> list[Path]:
    """Connection files, cluster file, logs, Slurm's script, and, last, dinfer's record."""
    security, log = cluster.profile_dir / "security", cluster.profile_dir / "log"
    found = [*security.glob(f"ipcontroller-{cluster.cluster_id}-*.json"), cluster.cluster_file]
    found += [*log.glob(f"ip*-{cluster.cluster_id}-*.log"), log / f"engines{cluster.cluster_id}.json"]
    found += [
        *cluster.profile_dir.glob(engine_log(".", cluster.cluster_id, "*")),
        batch_file(log, cluster.cluster_id),
    ]
    return [path for path in [*found, cluster.record_file] if path.exists()]


def end_cluster(cluster: Known) -> tuple[list[int], list[int], list[Path]]:
    """End its processes, those on other hosts first, and, if all have ended, remove its files. Returns the ids of the
    processes here that ended, and of those that did not, and the files. Raises ValueError for a cluster that dinfer did
    not start."""
    _check_own(cluster)
    end_remote(cluster)
    ended: dict[int, psutil.Process] = {}
    for force in (False, True):  # the second round finds processes that were just starting
        there = members(cluster)
        ended |= {process.pid: process for process in there}
        for process in there:
            with contextlib.suppress(psutil.Error):
                process.kill() if force else process.terminate()
        psutil.wait_procs(there, timeout=GRACE_S)
    left = {process.pid for process in members(cluster)}
    files = [] if left else files_of(cluster)
    for path in files:
        path.unlink(missing_ok=True)
    return sorted(ended.keys() - left), sorted(left), files


END_REMOTE = """
for signal in TERM 0 KILL; do
    left=30
    while [ $left -gt 0 ]; do
        found=$(grep -lzFx IPP_CLUSTER_ID={id} /proc/[0-9]*/environ 2>/dev/null)
        [ -n "$found" ] || break 2
        for environ in $found; do
            process=${{environ#/proc/}}
            kill -$signal ${{process%/environ}} 2>/dev/null
        done
        [ $signal = 0 ] || break
        left=$((left - 1))
        sleep 0.1
    done
done
rm -f {folder}/security/ipcontroller-{id}-*.json {folder}/log/ipengine-{id}-*.out
"""
"""run by sh on a host: ends all processes of a cluster there, and removes its key and logs. One grep reads the
environments of all processes: two commands for each would take longer on a busy host than the script has."""


def end_remote(cluster: Known) -> None:
    """End a cluster's engines on other hosts, as far as a profile of dinfer's has started them. A host that cannot be
    reached is left: its engines end once they have heard nothing of the controller for minutes."""
    try:
        profile = Profile.read(cluster.profile_dir)
    except ClusterError:
        return
    if profile is None:
        return
    if profile.kind == "slurm":
        with contextlib.suppress(
            OSError, subprocess.TimeoutExpired
        ):  # the job has the cluster's id as its name
            subprocess.run(["scancel", f"--name={cluster.cluster_id}"], capture_output=True, timeout=ASK_S)
        return
    asked = []
    for host in profile.hosts:
        folder = shlex.quote(remote_profile_dir(str(cluster.profile_dir), host.name))
        script = END_REMOTE.format(id=shlex.quote(cluster.cluster_id), folder=folder)
        words = [*ssh_words(host.name, profile.ssh_args), "sh", "-s"]
        with contextlib.suppress(OSError):
            asked.append(Asked(words, script))
    for one in asked:
        one.answer(ASK_S)


def stop_cluster(cluster: Known) -> None:
    """End any cluster; one that a user started as `ipcluster stop` does. Raises ClusterError."""
    if cluster.cluster_id.startswith(PREFIX):
        _, left, _ = end_cluster(cluster)
        if left:
            pids = ", ".join(map(str, left))
            raise ClusterError(f"{cluster.name}: these processes could not be ended: {pids}.")
        return
    import ipyparallel

    try:
        ipyparallel.Cluster.from_file(str(cluster.cluster_file), log_level=logging.ERROR).stop_cluster_sync()
    except Exception as error:  # whatever the cluster's launchers raise
        raise ClusterError(f"{cluster.name} could not be ended: {error}") from error


# -- dinfer clean


@dataclass(frozen=True)
class FoundCluster:
    """A cluster that dinfer started. `done`: "ended", "would be ended", "left alone" or "not ended"."""

    cluster_id: str
    profile: str
    done: str
    why: str
    processes: tuple[int, ...] = ()
    files: int = 0

    def __str__(self) -> str:
        text = f"{self.cluster_id} (profile {self.profile}): {self.done}: {self.why}"
        if not self.files:
            return text
        processes = f"{len(self.processes)} process{'' if len(self.processes) == 1 else 'es'}"
        return f"{text}; {processes} and {self.files} file{'' if self.files == 1 else 's'}"


def clean(profile_dirs: Sequence[Path] | None = None, *, dry_run: bool = False) -> list[FoundCluster]:
    """Look at every profile of this user. A cluster whose client runs, or may run elsewhere, is left alone."""
    if profile_dirs is None:
        profile_dirs = sorted(path for path in Path(get_ipython_dir()).glob("profile_*") if path.is_dir())
    return [_treat(path, dry_run) for folder in profile_dirs for path in record_paths(folder)]


def report(found: Sequence[FoundCluster], as_json: bool) -> tuple[str, int]:
    """The text to print, and the exit status: 1 if a cluster could not be ended or its record not be read."""
    status = int(any(item.done == "not ended" for item in found))
    if as_json:
        return json.dumps([asdict(item) for item in found], indent=1), status
    return "\n".join(map(str, found)) or "no cluster that dinfer started", status


def _treat(path: Path, dry_run: bool) -> FoundCluster:
    """End the cluster of a record, if its clients have ended."""
    profile_dir = path.parent.parent
    profile = Known(profile_dir, "").profile
    try:
        record = Record.read(path)
        if not record.cluster_id.startswith(PREFIX):
            raise ValueError(f"{record.cluster_id!r} is not the id of a cluster that dinfer started")
    except (OSError, ValueError) as error:
        return FoundCluster(path.stem, profile, "not ended", f"its record cannot be read: {error}")
    cluster = Known(profile_dir, record.cluster_id)
    user = next((client for client in record.clients if client.state() != "gone"), None)
    if user:
        how = "still runs"
        if user.state() != "alive":
            how = f"is on {user.host}, in another container or machine"
        return FoundCluster(cluster.cluster_id, profile, "left alone", f"its client {user.pid} {how}")
    why = f"its client {', '.join(str(client.pid) for client in record.clients)} has ended"
    if dry_run:
        there = tuple(sorted(process.pid for process in members(cluster)))
        return FoundCluster(cluster.cluster_id, profile, "would be ended", why, there, len(files_of(cluster)))
    ended, left, files = end_cluster(cluster)
    if left:
        why += ", but these processes do not end"
        return FoundCluster(cluster.cluster_id, profile, "not ended", why, tuple(left))
    return FoundCluster(cluster.cluster_id, profile, "ended", why, tuple(ended), len(files))
