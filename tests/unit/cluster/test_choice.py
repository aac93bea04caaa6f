"""Which cluster, which engines, and what is said about them: without processes."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import pytest
from IPython.core.error import UsageError

from dinfer.cluster.ipyparallel.attach import attach
from dinfer.cluster.ipyparallel.cluster import target_ids
from dinfer.cluster.ipyparallel.errors import ClusterError, TooFewEngines
from dinfer.cluster.ipyparallel.facts import judge_versions
from dinfer.cluster.ipyparallel.known import (
    STARTING_S,
    Known,
    Owner,
    choose_cluster,
    choose_engines,
    describe,
    engines_to_come,
    known_clusters,
)
from dinfer.cluster.ipyparallel.launcher import (
    BEHIND,
    DinferEngineSetLauncher,
    command_before,
    rank_environment,
)

STOCK = Known(Path("profile_default"), "")


def named(cluster_id: str) -> Known:
    return Known(Path("profile_jetson"), cluster_id)


@pytest.mark.parametrize(
    ("running", "chosen"),
    [
        ([], None),
        ([("", "user")], ""),
        ([("a", "user")], "a"),
        ([("", "user"), ("a", "user")], ""),
        ([("dinfer-1", "nobody"), ("a", "user")], "a"),
        ([("dinfer-1", "nobody")], "dinfer-1"),
        ([("dinfer-1", "other")], None),
        ([("", "user"), ("dinfer-1", "me")], "dinfer-1"),
        ([("a", "user"), ("b", "user"), ("dinfer-1", "me")], "dinfer-1"),
    ],
)
def test_which_cluster_is_joined(running: list[tuple[str, Owner]], chosen: str | None) -> None:
    found = choose_cluster([(named(cluster_id), owner) for cluster_id, owner in running])
    assert (found.cluster_id if found else None) == chosen


def test_of_several_the_user_says_which() -> None:
    with pytest.raises(ClusterError, match=r"'a', 'b'\..*cluster_id='a'"):
        choose_cluster([(named("a"), "user"), (named("b"), "user")])


@pytest.mark.parametrize(
    ("ids", "n", "cluster", "message"),
    [
        ([0, 2], 3, STOCK, r"'default' has 2 engines \(0, 2\), but 3 .*`ipcluster engines -n 1`.*n=2"),
        ([7], 3, STOCK, r"1 engine \(7\), but 3 .*`ipcluster engines -n 2`"),
        ([], 3, STOCK, r"no engine, but 3 .*`ipcluster engines -n 3`, or .*start=True"),
        ([0], 2, named("a"), "engines -n 1 --profile=jetson --cluster-id=a`"),
    ],
)
def test_too_few_engines(ids: list[int], n: int, cluster: Known, message: str) -> None:
    assert choose_engines([5, 3, 4], 2, cluster) == [3, 4]
    with pytest.raises(TooFewEngines, match=message):
        choose_engines(ids, n, cluster)


@pytest.mark.parametrize(
    ("engines", "unused", "line"),
    [
        ([(0, "h"), (1, "h"), (2, "h")], [], "ranks 0–2 on h"),
        ([(0, "h")], [1, 2], "rank 0 on h; engines 1, 2 are not used"),
        (
            [(3, "h"), (4, "g")],
            [],
            "ranks 0–1 on h, g; these are engines 3, 4: ranks follow the order of engine ids",
        ),
    ],
)
def test_one_line_says_what_was_joined(
    tmp_path: Path, engines: list[tuple[int, str]], unused: list[int], line: str
) -> None:
    cluster = Known(tmp_path / "profile_default", "")
    cluster.cluster_file.parent.mkdir(parents=True)
    for launcher, name in (("local", "local"), (DinferEngineSetLauncher.entrypoint_name, "dinfer")):
        cluster.cluster_file.write_text(json.dumps({"engines": {"class": launcher}}))
        found = describe(cluster, started=False, engines=engines, unused=unused)
        assert found == f"joined profile 'default' ({name} engines): {line}"


def versions(**different: Any) -> dict[str, Any]:
    """What an engine like this client says."""
    return {
        "python": platform.python_version(),
        "dinfer": "1.0",
        "cuda": 0,
        "hidden": [],
        "stuck": "",
        **different,
    }


def test_all_engines_at_fault_are_named_at_once() -> None:
    judge_versions({0: versions(), 1: versions(cuda=1)}, "1.0")
    engines = {
        0: versions(),
        3: versions(python="3.1.4", dinfer="0.9"),
        4: {**versions(dinfer=""), "no dinfer": "ModuleNotFoundError: No module named 'dinfer'"},
        5: {**versions(), "no torch": "ImportError: libcudart.so"},
        6: versions(hidden=["/home/me/transformers.py"], dinfer=""),
        7: versions(stuck="/home/me/calendar.py", dinfer=""),
    }
    with pytest.raises(ClusterError) as caught:
        judge_versions(engines, "1.0")
    for part in (
        "engine 7 does not come to the end of /home/me/calendar.py, which it takes for the",
        "engine 3 runs Python 3.1.4, not 3.",
        "engine 3 has dinfer 0.9, not 1.0",
        "engine 4 has no dinfer (ModuleNotFoundError",
        "engine 5 has no torch",
        "engine 6 takes /home/me/transformers.py for the package or module of that name: rename it",
    ):
        assert part in str(caught.value)
    assert "engine 0" not in str(caught.value)


def test_files_that_keep_a_cluster_from_starting_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").touch()
    with pytest.raises(ClusterError, match="has no running cluster") as caught:
        attach(1, start=False)
    assert "PYTHONSAFEPATH" not in str(caught.value)
    (tmp_path / "queue.py").touch()
    with pytest.raises(ClusterError, match=r"takes queue\.py for the module of Python .* PYTHONSAFEPATH=1"):
        attach(1, start=False)


def cluster_file(sets: dict[str, Any], n: int | None = 3) -> dict[str, Any]:
    return {
        "cluster": {"n": n},
        "controller": {"class": "local", "state": {"pid": 7}},
        "engines": {"class": "local", "sets": sets},
    }


@pytest.mark.parametrize(
    ("description", "age_s", "count"),
    [
        ({}, 1e9, 0),
        (cluster_file({}), 1.0, 3),
        (cluster_file({}, n=None), 1.0, 1),
        (cluster_file({}), 2 * STARTING_S, 0),
        (cluster_file({"1": {"n": 2, "engines": {"0": {"pid": 10}, "1": {"pid": 11}}}}), 1.0, 1),
        (cluster_file({"1": {"n": 1, "engines": {"0": {"pid": -1}}}}), 1.0, 0),
        (
            cluster_file({"1": {"n": 4, "pid": 10}, "2": {"n": 2, "pid": 11}, "3": {"n": 1, "pid": -1}}),
            1.0,
            5,
        ),
    ],
)
def test_engines_that_are_on_their_way(description: dict[str, Any], age_s: float, count: int) -> None:
    def runs(pid: int) -> bool:
        assert pid > 0  # there is no such process to ask for
        return pid == 10

    assert engines_to_come(description, runs, age_s) == count


def test_clusters_are_found_by_their_files(tmp_path: Path) -> None:
    security = tmp_path / "security"
    security.mkdir()
    for name in ("ipcontroller-client.json", "ipcontroller-a-b-client.json", "ipcontroller-a-b-engine.json"):
        (security / name).write_text("{}")
    for name in ("cluster-.json", "cluster-c.json", "dinfer-cluster-d.json", "other.json"):
        (security / name).write_text("{}")
    assert [known.cluster_id for known in known_clusters(tmp_path)] == ["", "a-b", "c"]


@pytest.mark.parametrize(
    ("text", "ids"),
    [("1", 4), ("-1", 5), ("0,2", [3, 5]), ("[1]", [4]), ("[0, 2]", [3, 5]), ("1:", [4, 5]), ("::2", [3, 5])],
)
def test_targets_are_ranks(text: str, ids: int | list[int]) -> None:
    assert target_ids(text, [3, 4, 5]) == ids
    assert target_ids("all", [3, 4, 5]) == [3, 4, 5]


@pytest.mark.parametrize("text", ["3", "x", "0,7", "a:"])
def test_a_target_that_is_no_rank(text: str) -> None:
    with pytest.raises(UsageError, match="the ranks are 0 to 2"):
        target_ids(text, [3, 4, 5])


def test_an_engine_knows_its_rank() -> None:
    ranks = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    assert rank_environment(1, 2, {}) == ranks
    assert rank_environment(1, 2, {"DINFER_GPU_IDS": "0, 3"}) == {**ranks, "CUDA_VISIBLE_DEVICES": "3"}
    for wrong in ("0", "0,x", "0,1,2"):
        with pytest.raises(ValueError, match=r"DINFER_GPU_IDS is .* but 2 engines are started"):
            rank_environment(1, 2, {"DINFER_GPU_IDS": wrong})


def test_each_engine_may_be_started_behind_a_command_of_its_own() -> None:
    given = {BEHIND: '[["ip", "netns", "exec", "one"], []]'}
    assert [command_before(rank, given) for rank in range(3)] == [["ip", "netns", "exec", "one"], [], []]
    assert command_before(0, {}) == command_before(0, {BEHIND: ""}) == []
