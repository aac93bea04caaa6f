"""Whose a cluster is, and what `dinfer clean` makes of it, with records but without clusters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dinfer.cluster.ipyparallel import clean as cleaning
from dinfer.cluster.ipyparallel.clean import clean, end_cluster, members, report, stop_cluster
from dinfer.cluster.ipyparallel.errors import ClusterError
from dinfer.cluster.ipyparallel.identity import Identity
from dinfer.cluster.ipyparallel.known import Known, Record
from dinfer.rank.process import exists

ME = Identity.of(os.getpid())
GONE = replace(ME, started="long ago")  # its process id is now another's
ELSEWHERE = replace(ME, host="elsewhere")
AFTER_REBOOT = replace(ME, boot="another")
IN_A_CONTAINER = replace(ME, space="pid:[1]")


def note(profile_dir: Path, cluster_id: str, *clients: Identity) -> Known:
    """A cluster of which only files are left."""
    cluster = Known(profile_dir, cluster_id)
    Record(cluster_id, clients).write(cluster.record_file)
    for kind in ("client", "engine"):
        (profile_dir / "security" / f"ipcontroller-{cluster_id}-{kind}.json").write_text("{}")
    cluster.cluster_file.write_text("{}")
    return cluster


def test_a_process_is_known_again() -> None:
    states = [who.state() for who in (ME, GONE, ELSEWHERE, AFTER_REBOOT, IN_A_CONTAINER)]
    assert states == ["alive", "gone", "elsewhere", "gone", "elsewhere"]
    assert ME.is_here
    assert not ELSEWHERE.is_here


def test_a_process_that_nobody_has_waited_for_is_gone() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    identity = Identity.of(process.pid)
    assert identity.state() == "alive"
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, and still in the table of processes
    assert identity.state() == "gone"
    process.communicate()
    with pytest.raises(ProcessLookupError):
        Identity.of(process.pid)


def test_owners(tmp_path: Path) -> None:
    clients = {"me": [ME, GONE], "other": [GONE, ME], "nobody": [GONE, AFTER_REBOOT]}
    for owner, those in clients.items():
        assert note(tmp_path, f"dinfer-{owner}", *those).owner() == owner
    assert note(tmp_path, "dinfer-far", ELSEWHERE).owner() == "other"
    assert Known(tmp_path, "").owner() == "user"


def test_who_joins_is_noted_and_inherits() -> None:
    assert Record("dinfer-1", (ELSEWHERE,)).with_client(ME).clients == (ELSEWHERE, ME)
    assert Record("dinfer-1", (GONE,)).with_client(ME).clients == (ME,)
    assert Record("dinfer-1", (ME, ELSEWHERE)).with_client(ME).clients == (ME, ELSEWHERE)
    assert Record("dinfer-1", (ELSEWHERE, ME)).with_client(ME).clients == (ELSEWHERE, ME)


def test_files_of_the_dead_are_removed_and_no_others(tmp_path: Path) -> None:
    dead = note(tmp_path, "dinfer-1-a", GONE)
    kept = [note(tmp_path, "dinfer-1-ab", ME), note(tmp_path, "dinfer-2", GONE, ELSEWHERE)]
    (tmp_path / "security" / "cluster-.json").write_text("{}")
    before = set((tmp_path / "security").iterdir())

    assert [(f.cluster_id, f.done, f.files) for f in clean([tmp_path], dry_run=True)] == [
        ("dinfer-1-a", "would be ended", 4),
        ("dinfer-1-ab", "left alone", 0),
        ("dinfer-2", "left alone", 0),
    ]
    assert set((tmp_path / "security").iterdir()) == before
    found = clean([tmp_path])
    assert [item.done for item in found] == ["ended", "left alone", "left alone"]
    assert report(found, as_json=False)[1] == 0
    gone = {path.name.replace("dinfer-1-a", "*") for path in before - set((tmp_path / "security").iterdir())}
    connections = {"ipcontroller-*-client.json", "ipcontroller-*-engine.json"}
    assert gone == {"cluster-*.json", "dinfer-cluster-*.json", *connections}
    assert not dead.client_file.exists()
    assert all(cluster.client_file.exists() for cluster in kept)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"cluster_id": "dinfer-1"}', '{"cluster_id": "", "clients": []}']
)
def test_a_record_that_cannot_be_read_ends_nothing(tmp_path: Path, text: str) -> None:
    path = Known(tmp_path, "dinfer-1").record_file
    path.parent.mkdir()
    path.write_text(text)
    said, status = report(clean([tmp_path]), as_json=True)
    assert json.loads(said)[0]["done"] == "not ended"
    assert status == 1
    assert path.exists()


def test_what_slurm_leaves_in_the_logs_is_removed(tmp_path: Path) -> None:
    note(tmp_path, "dinfer-1-a", GONE)
    log, left = tmp_path / "log", {"slurm-dinfer-1-ab.sbatch", "ipengine-dinfer-1-ab-0.out", "mine.out"}
    log.mkdir()
    gone = {"slurm-dinfer-1-a.sbatch", "ipengine-dinfer-1-a-0.out", "ipengine-dinfer-1-a-11.out"}
    gone.add("ipengine-dinfer-1-a-1700000000-abcd-99.log")
    for name in gone | left:
        (log / name).touch()
    assert [(found.done, found.files) for found in clean([tmp_path])] == [("ended", 4 + len(gone))]
    assert {path.name for path in log.iterdir()} == left


@pytest.mark.parametrize("cluster_id", ["", "mine", "1700000000-abcd"])
def test_a_users_cluster_is_never_ended(cluster_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Known] = []
    monkeypatch.setattr(cleaning, "end_remote", asked.append)
    with pytest.raises(ValueError, match="not started by dinfer"):
        end_cluster(Known(Path("profile_default"), cluster_id))
    assert asked == []  # nor are its engines on other hosts


def test_a_users_cluster_is_stopped_by_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # ipyparallel makes a folder for logs in the working folder
    cluster = Known(tmp_path / "profile_x", "mine")
    cluster.cluster_file.parent.mkdir(parents=True)
    waiting = [sys.executable, "-c", "input()"]
    started = [subprocess.Popen(waiting, stdin=subprocess.PIPE) for _ in range(2)]
    controller, engine = ({"pid": process.pid, "state": "running"} for process in started)
    engines = {"one": {"n": 1, "state": "running", "engines": {"0": {**engine, "identifier": "0"}}}}
    description = {
        "cluster": {"cluster_id": "mine", "profile_dir": str(cluster.profile_dir)},
        "controller": {"class": "local", "state": controller},
        "engines": {"class": "local", "sets": engines},
    }
    cluster.cluster_file.write_text(json.dumps(description))
    threads = set(threading.enumerate())
    try:
        stop_cluster(cluster)
        assert not cluster.cluster_file.exists()
        assert not any(exists(process.pid) for process in started)
        assert set(threading.enumerate()) <= threads
    finally:
        for process in started:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("text", [None, "", "[]"])
def test_a_users_cluster_without_a_usable_file_cannot_be_stopped(tmp_path: Path, text: str | None) -> None:
    cluster = Known(tmp_path / "profile_x", "mine")
    if text is not None:
        cluster.cluster_file.parent.mkdir(parents=True)
        cluster.cluster_file.write_text(text)
    with pytest.raises(ClusterError, match=r"'mine'.* could not be ended"):
        stop_cluster(cluster)


def test_processes_bear_the_id_and_the_profile(tmp_path: Path) -> None:
    cluster = Known(tmp_path, "dinfer-test")
    place = {"IPP_CLUSTER_ID": "dinfer-test", "IPP_PROFILE_DIR": str(tmp_path)}
    others = [{**place, "IPP_CLUSTER_ID": "dinfer-tes"}, {**place, "IPP_PROFILE_DIR": str(tmp_path.parent)}]
    program = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(); input()"
    command = [sys.executable, "-c", program]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    started = [subprocess.Popen(command, **pipes, env={**os.environ, **own}) for own in (place, *others)]
    try:
        for process in started:
            assert process.stdout
            process.stdout.readline()  # from here on it does not end when asked to
        assert [process.pid for process in members(cluster)] == [started[0].pid]
        assert end_cluster(cluster) == ([started[0].pid], [], [])
        assert [process.poll() for process in started[1:]] == [None, None]
    finally:
        for process in started:
            process.kill()
            process.communicate()


def test_nothing_to_clean(tmp_path: Path) -> None:
    assert report(clean([tmp_path]), as_json=False)[1] == 0
    assert report(clean([tmp_path]), as_json=True) == ("[]", 0)
