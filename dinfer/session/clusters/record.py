"""What dinfer notes about a cluster that it has started: whose it is. A small file beside ipyparallel's own."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from dinfer.session.clusters.identity import Identity


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
