"""The clusters that a profile's files speak of, and whether they run. Changes nothing."""

import contextlib
import json
import math
import os
import re
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import psutil

from dinfer.cluster.ipyparallel.identity import Identity


@dataclass(frozen=True)
class Record:
    """`clients`: the process that started the cluster or took it over, and that ends it; then those that joined."""

    cluster_id: str
    clients: tuple[Identity, ...]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises OSError, and ValueError where the file is not such a record."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return cls(str(found["cluster_id"]), tuple(Identity(**client) for client in found["clients"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a record: {error}") from error

    def write(self, path: Path) -> None:
        """In one go: a reader finds the old one or this one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(asdict(self)), encoding="utf-8")
        part.replace(path)

    def with_client(self, client: Identity) -> Self:
        """The same with one more client, which is the first if none of the others lives."""
        living = tuple(other for other in self.clients if other.state() != "gone" and other != client)
        first = self.clients[:1] == (client,)
        return type(self)(self.cluster_id, (client, *living) if first else (*living, client))


def record_path(profile_dir: Path, cluster_id: str) -> Path:
    return profile_dir / "security" / f"dinfer-cluster-{cluster_id}.json"


def record_paths(profile_dir: Path) -> list[Path]:
    """All records of a profile."""
    return sorted((profile_dir / "security").glob("dinfer-cluster-*.json"))


Owner = Literal["user", "me", "other", "nobody"]
"""who started a cluster: somebody by hand; or dinfer, for this process, for one that lives or for one that is gone"""

ANSWER_S = 2.0
"""how long a controller may take to accept a connection; one that is gone refuses at once"""

STARTING_S = 15.0
"""how long after its start a cluster may be without engines"""

_CLUSTER_FILE = re.compile(r"cluster-(?P<id>.*)\.json")

_CLIENT_FILE = re.compile(r"ipcontroller(?:-(?P<id>.+))?-client\.json")


@dataclass(frozen=True)
class Known:
    """One cluster, by its files. The stock cluster's `cluster_id` is ""."""

    profile_dir: Path
    cluster_id: str

    @property
    def name(self) -> str:
        """As messages name it."""
        profile = self.profile_dir.name.removeprefix("profile_")
        return (
            f"cluster {self.cluster_id!r} of profile {profile!r}"
            if self.cluster_id
            else f"profile {profile!r}"
        )

    @property
    def flags(self) -> str:
        """What names it on the command line of ipcluster and ipengine."""
        profile = self.profile_dir.name.removeprefix("profile_")
        flags = [] if profile == "default" else [f"--profile={profile}"]
        return " ".join(flags + ([f"--cluster-id={self.cluster_id}"] if self.cluster_id else []))

    @property
    def client_file(self) -> Path:
        """What a client connects by; it holds the key."""
        middle = f"-{self.cluster_id}" if self.cluster_id else ""
        return self.profile_dir / "security" / f"ipcontroller{middle}-client.json"

    @property
    def cluster_file(self) -> Path:
        """What ipcluster notes; there is none for a controller started by hand."""
        return self.profile_dir / "security" / f"cluster-{self.cluster_id}.json"

    def connection(self) -> dict[str, Any]:
        """The client file's content, {} without one."""
        return _read_json(self.client_file)

    def description(self) -> dict[str, Any]:
        """The cluster file's content, {} without one."""
        return _read_json(self.cluster_file)

    def is_running(self) -> bool:
        """Whether its controller accepts connections. Behind an ssh tunnel that is not tried: taken for granted."""
        found = self.connection()
        if not found or found.get("ssh"):
            return bool(found)
        host = str(found["interface"]).rpartition("://")[2]
        everywhere = host in ("*", "0.0.0.0")
        addresses = ["127.0.0.1", str(found.get("location") or "")] if everywhere else [host]
        return any(_accepts(address, int(found["registration"])) for address in addresses if address)

    def controller(self) -> Identity | None:
        """The controller's process, where ipcluster has started it on this machine and it runs."""
        pid = controller_pid(self.description())
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            if pid is not None and "ipyparallel.controller" in psutil.Process(pid).cmdline():
                return Identity.of(pid)
        return None

    def is_coming(self) -> bool:
        """Whether its controller has been started but does not accept connections yet."""
        if self.is_running() or self.age_s() > STARTING_S:
            return False
        return self.is_being_written() or self.controller() is not None

    def is_being_written(self) -> bool:
        """Whether the cluster file is there but not whole: ipcluster writes it in place."""
        return self.cluster_file.exists() and not self.description()

    def age_s(self) -> float:
        """Seconds since its cluster file was written; without one, very many."""
        try:
            return time.time() - self.cluster_file.stat().st_mtime
        except OSError:
            return math.inf

    def owner(self) -> Owner:
        """Whose it is, by dinfer's record."""
        try:
            clients = Record.read(record_path(self.profile_dir, self.cluster_id)).clients
        except (OSError, ValueError):
            return "user"
        if clients[:1] == (Identity.of(os.getpid()),):
            return "me"
        return "nobody" if all(client.state() == "gone" for client in clients) else "other"


def known_clusters(profile_dir: Path) -> list[Known]:
    """Every cluster that has a client file or a cluster file, running or not."""
    names = [path.name for path in (profile_dir / "security").glob("*.json")]
    matches = [_CLIENT_FILE.fullmatch(name) or _CLUSTER_FILE.fullmatch(name) for name in names]
    return [Known(profile_dir, name) for name in sorted({match["id"] or "" for match in matches if match})]


def profile_folder(profile: str) -> Path:
    """Where ipyparallel keeps a profile; it need not exist."""
    from IPython.paths import get_ipython_dir

    return Path(get_ipython_dir()) / f"profile_{profile}"


def controller_pid(description: Mapping[str, Any]) -> int | None:
    """The controller's process id, where ipcluster started it as a process of its own."""
    state = (description.get("controller") or {}).get("state") or {}
    pid = state.get("pid", -1)
    return int(pid) if pid > 0 else None


def launcher_of(description: Mapping[str, Any]) -> str:
    """The name of what starts the engines: local, dinfer, mpi, ssh, …; "" where it is not known."""
    name = str((description.get("engines") or {}).get("class", ""))
    return "dinfer" if name.endswith("DinferEngineSetLauncher") else name


def engines_to_come(description: Mapping[str, Any], is_running: Callable[[int], bool], age_s: float) -> int:
    """How many engines should be there by and by, where the cluster file was written `age_s` seconds ago.

    Those whose processes run; of other launchers' all while the launcher runs; and those that ipcluster is about to
    start, which it does within a second of the controller.
    """
    sets = ((description.get("engines") or {}).get("sets") or {}).values()
    if not sets and age_s < STARTING_S:
        return int((description.get("cluster") or {}).get("n") or 1)
    return sum(_of_set(engines, is_running) for engines in sets)


def _of_set(engines: Mapping[str, Any], is_running: Callable[[int], bool]) -> int:
    if "engines" in engines:
        return sum(is_running(int(engine["pid"])) for engine in engines["engines"].values())
    pid = int(engines.get("pid", -1))
    return int(engines.get("n", 0)) if pid < 0 or is_running(pid) else 0


def _accepts(host: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=ANSWER_S):
        return True
    return False


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
