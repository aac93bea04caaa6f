"""A cluster that dinfer started and whose client has ended, as the next client finds it: without processes."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ipyparallel
import pytest

from dinfer.cluster.ipyparallel import attach as attaching
from dinfer.cluster.ipyparallel.attach import attach
from dinfer.cluster.ipyparallel.errors import TooFewEngines
from dinfer.cluster.ipyparallel.identity import Identity
from dinfer.cluster.ipyparallel.known import Known, Record

GONE = replace(Identity.of(os.getpid()), started="long ago")


class Started(Exception):
    """A new cluster would be started now."""


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the clusters that were ended; none is, nor is any started."""
    found: list[str] = []

    def start(*_: Any) -> None:
        raise Started

    monkeypatch.setattr(attaching, "end_cluster", lambda cluster: found.append(cluster.cluster_id))
    monkeypatch.setattr(attaching, "_start", start)
    return found


@pytest.fixture
def left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Known]:
    """A cluster of which a controller listens."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    cluster = Known(tmp_path / "profile_default", "dinfer-1-a")
    Record(cluster.cluster_id, (GONE,)).write(cluster.record_file)
    with socket.create_server(("127.0.0.1", 0)) as server:
        connection = {"interface": "tcp://127.0.0.1", "registration": server.getsockname()[1]}
        cluster.client_file.write_text(json.dumps(connection))
        yield cluster


def with_engines(monkeypatch: pytest.MonkeyPatch, *ids: int) -> None:
    """These are registered at each controller."""
    client = SimpleNamespace(ids=list(ids), close=lambda: None)
    monkeypatch.setattr(ipyparallel, "Client", lambda *_, **__: client)


def test_living_engines_are_kept_where_more_are_asked_for(
    left: Known, ended: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_engines(monkeypatch, 0, 1)
    with pytest.raises(TooFewEngines, match=r"has 2 engines \(0, 1\), but 3 were requested.* use n=2"):
        attach()
    assert ended == []
    with_engines(monkeypatch)  # they have ended since
    with pytest.raises(Started):
        attach()
    assert ended[0] == left.cluster_id


def test_a_controller_without_engines_gives_way_to_a_new_cluster(
    left: Known, ended: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_engines(monkeypatch)
    with pytest.raises(Started):
        attach()
    assert ended[0] == left.cluster_id
    line = "cluster 'dinfer-1-a' of profile 'default' was left, and its engines have ended: it is ended, and a new one"
    assert line in capsys.readouterr().out


@pytest.mark.parametrize(
    "engines",
    [
        {"n": 2, "engines": {"a/0": {"pid": 5, "hostname": "a"}, "b/0": {"pid": 6, "hostname": "b"}}},
        {"n": 2, "job_id": "7"},
    ],
    ids=["ssh", "slurm"],
)
def test_engines_elsewhere_that_have_ended_with_their_client_are_not_awaited(
    left: Known, ended: list[str], monkeypatch: pytest.MonkeyPatch, engines: dict[str, Any]
) -> None:
    with_engines(monkeypatch)
    left.cluster_file.write_text(json.dumps({"cluster": {"n": 2}, "engines": {"sets": {"1": engines}}}))
    an_hour_ago = time.time() - 3600
    os.utime(left.cluster_file, (an_hour_ago, an_hour_ago))

    def at_once(condition: Callable[[], bool], _: float) -> None:
        assert condition()

    monkeypatch.setattr(attaching, "wait_until", at_once)
    with pytest.raises(Started):
        attach(2)
    assert ended[0] == left.cluster_id


@pytest.mark.usefixtures("left")
@pytest.mark.parametrize("how", [{"start": False}, {"cluster_id": "dinfer-1-a"}])
def test_who_asks_for_a_running_cluster_ends_none(
    ended: list[str], monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]
) -> None:
    with_engines(monkeypatch)
    with pytest.raises(TooFewEngines, match="has no engine, but 3 were requested"):
        attach(**how)
    assert ended == []
