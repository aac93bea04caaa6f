"""`dinfer clean`: ends the clusters that dinfer started and whose client is gone, and nothing else."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dinfer.cluster.ipyparallel.ending import PREFIX, end_processes, files_of, members, remove_files
from dinfer.cluster.ipyparallel.known import Known, Record, record_paths


@dataclass(frozen=True)
class FoundCluster:
    """One cluster that dinfer started. `done`: ended, would be ended, left alone, or not ended."""

    cluster_id: str
    profile: str
    done: str
    why: str
    processes: tuple[int, ...] = ()
    files: int = 0

    def __str__(self) -> str:
        amount = f"; {_count(len(self.processes), 'process', 'processes')} and {_count(self.files, 'file', 'files')}"
        return f"{self.cluster_id} (profile {self.profile}): {self.done}: {self.why}{amount if self.files else ''}"


def clean(profile_dirs: Sequence[Path] | None = None, *, dry_run: bool = False) -> list[FoundCluster]:
    """Look at every profile of this user. A cluster whose client lives, or may live elsewhere, is left alone."""
    folders = _all_profiles() if profile_dirs is None else profile_dirs
    return [_treat(path, dry_run) for folder in folders for path in record_paths(folder)]


def report(found: Sequence[FoundCluster], as_json: bool) -> tuple[str, int]:
    """What to print, and the exit status: 1 where something could not be ended or judged."""
    status = int(any(item.done == "not ended" for item in found))
    if as_json:
        return json.dumps([asdict(item) for item in found], indent=1), status
    return "\n".join(map(str, found)) or "no cluster that dinfer started", status


def _treat(path: Path, dry_run: bool) -> FoundCluster:
    profile_dir = path.parent.parent
    profile = profile_dir.name.removeprefix("profile_")
    try:
        record = Record.read(path)
        if not record.cluster_id.startswith(PREFIX):
            raise ValueError(f"no cluster of dinfer's is called {record.cluster_id!r}")
    except (OSError, ValueError) as error:
        return FoundCluster(path.stem, profile, "not ended", f"its record cannot be read: {error}")
    lives = next((client for client in record.clients if client.state() != "gone"), None)
    if lives:
        how = "lives" if lives.state() == "alive" else f"is on {lives.host}, in another container or machine"
        return FoundCluster(record.cluster_id, profile, "left alone", f"its client {lives.pid} {how}")
    pids = ", ".join(str(client.pid) for client in record.clients)
    return _end(Known(profile_dir, record.cluster_id), profile, f"its client {pids} is gone", dry_run)


def _end(cluster: Known, profile: str, why: str, dry_run: bool) -> FoundCluster:
    if dry_run:
        there = tuple(sorted(process.pid for process in members(cluster)))
        return FoundCluster(cluster.cluster_id, profile, "would be ended", why, there, len(files_of(cluster)))
    ended, left = end_processes(cluster)
    if left:
        return FoundCluster(
            cluster.cluster_id, profile, "not ended", f"{why}, but these do not end", tuple(left)
        )
    return FoundCluster(cluster.cluster_id, profile, "ended", why, tuple(ended), len(remove_files(cluster)))


def _all_profiles() -> list[Path]:
    from IPython.paths import get_ipython_dir

    return sorted(path for path in Path(get_ipython_dir()).glob("profile_*") if path.is_dir())


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
