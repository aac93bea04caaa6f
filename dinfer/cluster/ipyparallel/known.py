"""The clusters of a profile, by its files: which of them run, and which to join. Changes nothing.

ipyparallel's `Cluster.from_file` and `ClusterManager` do not do: they leave out controllers that were started by hand,
start a thread for each process, and rewrite or remove the cluster files that they read.
"""

import contextlib
import json
import math
import os
import re
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import msgspec
import psutil

from dinfer.cluster.ipyparallel.errors import ClusterError, TooFewEngines
from dinfer.cluster.ipyparallel.identity import Identity


@dataclass(frozen=True)
class Record:
    """Which processes use a cluster that dinfer started. `clients`: first the one that started it or took it over, and
    that ends it; then those that joined."""

    cluster_id: str
    clients: tuple[Identity, ...]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises OSError, and ValueError if the file is not a record."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except msgspec.MsgspecError as error:
            raise ValueError(f"not a record: {error}") from error

    def write(self, path: Path) -> None:
        """Write it atomically: a reader finds the old record or this one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_bytes(msgspec.json.encode(self))
        part.replace(path)

    def with_client(self, client: Identity) -> Self:
        """The record with one more client, which comes first if no other client runs."""
        running = tuple(other for other in self.clients if other.state() != "gone" and other != client)
        first = self.clients[:1] == (client,)
        return type(self)(self.cluster_id, (client, *running) if first else (*running, client))


def record_paths(profile_dir: Path) -> list[Path]:
    """All records of a profile."""
    return sorted((profile_dir / "security").glob("dinfer-cluster-*.json"))


Owner = Literal["user", "me", "other", "nobody"]
"""who uses a cluster: "user": it was started by hand; else dinfer started it, and its first client is this process,
another one, or has ended"""

ANSWER_S = 2.0
"""how long a controller may take to accept a connection; where none listens, it is refused at once"""

STARTING_S = 15.0
"""how long after its start a cluster may be without engines"""

OWN_LAUNCHERS = {
    "DinferEngineSetLauncher": "dinfer",
    "SSHRankSetLauncher": "ssh",
    "SlurmRankSetLauncher": "slurm",
}
"""what they are called, by class"""

_FILE = re.compile(r"(?:cluster-(.*)|ipcontroller(?:-(.+))?-client)\.json")


@dataclass(frozen=True)
class Known:
    """A cluster, by its files. The stock cluster's `cluster_id` is ""."""

    profile_dir: Path
    cluster_id: str

    @property
    def name(self) -> str:
        """The cluster as messages name it."""
        which = f"cluster {self.cluster_id!r} of " if self.cluster_id else ""
        return f"{which}profile {self.profile!r}"

    @property
    def profile(self) -> str:
        return self.profile_dir.name.removeprefix("profile_")

    @property
    def flags(self) -> str:
        """The flags of ipcluster and ipengine that select it."""
        flags = [f"--profile={self.profile}"] * (self.profile != "default")
        return " ".join(flags + [f"--cluster-id={self.cluster_id}"] * bool(self.cluster_id))

    @property
    def client_file(self) -> Path:
        """The connection file of clients, with the key."""
        middle = f"-{self.cluster_id}" if self.cluster_id else ""
        return self.profile_dir / "security" / f"ipcontroller{middle}-client.json"

    @property
    def cluster_file(self) -> Path:
        """The file that ipcluster writes; a controller started by hand has none."""
        return self.profile_dir / "security" / f"cluster-{self.cluster_id}.json"

    @property
    def record_file(self) -> Path:
        """Of a cluster that dinfer started."""
        return self.profile_dir / "security" / f"dinfer-cluster-{self.cluster_id}.json"

    def connection(self) -> dict[str, Any]:
        """The client file's content, {} without one."""
        return _read_json(self.client_file)

    def description(self) -> dict[str, Any]:
        """The cluster file's content, {} without one."""
        return _read_json(self.cluster_file)

    def is_running(self) -> bool:
        """Whether its controller accepts connections; assumed for one behind an ssh tunnel."""
        found = self.connection()
        if not found or found.get("ssh"):
            return bool(found)
        host = str(found["interface"]).rpartition("://")[2]
        everywhere = host in ("*", "0.0.0.0")
        addresses = ["127.0.0.1", str(found.get("location") or "")] if everywhere else [host]
        for address in filter(None, addresses):
            where = address, int(found["registration"])
            with contextlib.suppress(OSError), socket.create_connection(where, timeout=ANSWER_S):
                return True
        return False

    def controller(self) -> Identity | None:
        """The controller's process, if ipcluster started it on this machine and it runs."""
        state = (self.description().get("controller") or {}).get("state") or {}
        pid = int(state.get("pid", -1))
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            if pid > 0 and "ipyparallel.controller" in psutil.Process(pid).cmdline():
                return Identity.of(pid)
        return None

    def engine_pids(self) -> list[int]:
        """The processes of its engines, as far as ipcluster started them on this machine."""
        if self.controller() is None:
            return []
        sets = ((self.description().get("engines") or {}).get("sets") or {}).values()
        engines = [engine for one in sets for engine in (one.get("engines") or {}).values()]
        return [int(engine["pid"]) for engine in engines if not engine.get("hostname")]

    def is_coming(self) -> bool:
        """Whether its controller has been started but does not accept connections yet."""
        if self.is_running() or self.age_s() > STARTING_S:
            return False
        return self.is_being_written() or self.controller() is not None

    def is_being_written(self) -> bool:
        """Whether the cluster file exists but is incomplete: ipcluster writes it in place."""
        return self.cluster_file.exists() and not self.description()

    def age_s(self) -> float:
        """Seconds since its cluster file was written; infinity without one."""
        try:
            return time.time() - self.cluster_file.stat().st_mtime
        except OSError:
            return math.inf

    def owner(self) -> Owner:
        """Who uses it, by dinfer's record."""
        try:
            clients = Record.read(self.record_file).clients
        except (OSError, ValueError):
            return "user"
        if clients[:1] == (Identity.of(os.getpid()),):
            return "me"
        return "nobody" if all(client.state() == "gone" for client in clients) else "other"


def known_clusters(profile_dir: Path) -> list[Known]:
    """Every cluster that has a client file or a cluster file, running or not."""
    matches = [_FILE.fullmatch(path.name) for path in (profile_dir / "security").glob("*.json")]
    return [Known(profile_dir, name) for name in sorted({m[1] or m[2] or "" for m in matches if m})]


def engines_to_come(
    description: Mapping[str, Any], is_running: Callable[[int], bool], age_s: float, *, was_left: bool = False
) -> int:
    """How many engines are running or starting, where the cluster file was written `age_s` seconds ago.

    These are the engines whose processes run; those that were started on other hosts, by ssh or as a job, and cannot be
    seen from here, but not where the cluster `was_left` by its client: they have come long ago, and may have ended with
    it; with other launchers, all engines while the launcher runs; and those that ipcluster is about to start, which it
    does within a second of the controller.
    """
    may_come = not was_left or age_s < STARTING_S
    sets = ((description.get("engines") or {}).get("sets") or {}).values()
    if not sets and age_s < STARTING_S:
        return int((description.get("cluster") or {}).get("n") or 1)
    count = 0
    for engines in sets:
        if "engines" in engines:
            pids = [
                (int(engine["pid"]), bool(engine.get("hostname"))) for engine in engines["engines"].values()
            ]
            count += sum(may_come if is_away else is_running(pid) for pid, is_away in pids if pid > 0)
        elif may_come if (pid := int(engines.get("pid", -1))) < 0 else is_running(pid):
            count += int(engines.get("n", 0))
    return count


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


# -- which to join


def choose_cluster(running: Sequence[tuple[Known, Owner]]) -> Known | None:
    """This process's own cluster, else one that a user started, else one whose client has ended; None for none.

    A cluster that dinfer started for a client that still runs is left to it. Raises ClusterError for several choices.
    """
    by_owner = {owner: [known for known, of in running if of == owner] for owner in ("me", "user", "nobody")}
    users = by_owner["user"]
    stock = [known for known in users if not known.cluster_id]
    if not by_owner["me"] and not stock and len(users) > 1:
        ids = ", ".join(repr(known.cluster_id) for known in users)
        raise ClusterError(
            f"several clusters run in this profile: {ids}. Choose one: cluster_id={users[0].cluster_id!r}."
        )
    return next(iter([*by_owner["me"], *stock, *users, *by_owner["nobody"]]), None)


def choose_engines(ids: Sequence[int], n: int, cluster: Known) -> list[int]:
    """The engine ids of ranks 0, 1, …: the first n ids in order. Raises TooFewEngines."""
    if n <= len(ids):
        return sorted(ids)[:n]
    have, fewer = "no engine", ""
    if ids:
        have = f"{len(ids)} engine{'s' * (len(ids) > 1)} ({', '.join(map(str, sorted(ids)))})"
        fewer = f", use n={len(ids)}"
    more = f"ipcluster engines -n {n - len(ids)} {cluster.flags}".rstrip()
    raise TooFewEngines(
        f"{cluster.name} has {have}, but {n} were requested. Add some with `{more}`{fewer}, or start a cluster of your "
        "own with start=True.",
        ids,
    )


def describe(
    cluster: Known, *, started: bool, engines: Sequence[tuple[int, str]], unused: Sequence[int]
) -> str:
    """One line: which cluster, whether joined or started, its launcher (local, dinfer, mpi, …), its ranks and their
    hosts. `engines`: id and host by rank; `unused`: the ids of others."""
    how = "started" if started else "joined"
    launcher = str((cluster.description().get("engines") or {}).get("class", ""))
    launcher = OWN_LAUNCHERS.get(launcher.rpartition(".")[2], launcher)
    by = f" ({launcher} engines)" if launcher else ""
    ids = [engine_id for engine_id, _ in engines]
    ranks = "rank 0" if len(ids) == 1 else f"ranks 0–{len(ids) - 1}"
    hosts = list(dict.fromkeys(host for _, host in engines))
    where = hosts[0] if len(hosts) == 1 else ", ".join(host for _, host in engines)
    notes = []
    if ids != list(range(len(ids))):
        notes.append(f"these are engines {', '.join(map(str, ids))}: ranks follow the order of engine ids")
    if unused:
        names = ", ".join(map(str, unused))
        notes.append(f"engine {names} is not used" if len(unused) == 1 else f"engines {names} are not used")
    return f"{how} {cluster.name}{by}: {ranks} on {where}" + "".join(f"; {note}" for note in notes)
