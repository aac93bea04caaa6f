"""Jobs that record into one folder are told apart, and one job of several launchers or attempts stays one."""

from typing import Any

from dinfer.watch.probe.records import WatchedProcess
from dinfer.watching.jobs import jobs_of
from tests.support.made_processes import SECOND, op, process


def ranked(rank: int | None, pid: int, parent: int = 9, store: str = "", **given: Any) -> WatchedProcess:
    size = given.pop("world_size", 2)
    made = process(rank, **given)
    made.pid, made.parent, made.store, made.name = pid, parent, store, f"{made.host}-{pid}"
    made.world_size = size if rank is not None else None
    return made


def found(*processes: WatchedProcess) -> list[dict[int, int]]:
    return [{rank: one.pid for rank, one in job.ranks.items()} for job in jobs_of(processes)]


def test_two_launchers_side_by_side() -> None:
    first = [ranked(rank, 10 + rank, 1, "localhost:1001") for rank in (0, 1)]
    second = [ranked(rank, 20 + rank, 2, "localhost:1002", started=1, world_size=3) for rank in (0, 1, 2)]
    assert found(*second, *first) == [{0: 10, 1: 11}, {0: 20, 1: 21, 2: 22}]
    for one in (*first, *second):
        one.store = ""  # an older probe does not say it
    assert found(*second, *first) == [{0: 10, 1: 11}, {0: 20, 1: 21, 2: 22}]
    first[0].argv = ("/usr/bin/python3", "-u", "/code/infer.py", "--tp", "2")
    assert [job.name for job in jobs_of([*first, *second])] == ["job 1 (infer.py --tp 2)", "job 2 (infer.py)"]


def test_one_after_the_other_at_the_same_address() -> None:
    """A script that starts ranks by itself, twice."""
    ended = {"ended": "exit", "heartbeat_ns": 3 * SECOND, "world_size": 3}
    first = [ranked(rank, 10 + rank, 1, "localhost:1001", **ended) for rank in (0, 1, 2)]
    second = [ranked(rank, 20 + rank, 1, "localhost:1001", started=4) for rank in (0, 1)]
    assert found(*first, *second) == [{0: 10, 1: 11, 2: 12}, {0: 20, 1: 21}]


def test_a_launcher_that_starts_its_ranks_again_goes_on_with_the_job() -> None:
    failed = {"ended": "exception", "heartbeat_ns": 3 * SECOND, "world_size": 3}
    before = [ranked(rank, 10 + rank, 1, "localhost:1001", **failed) for rank in (0, 1, 2)]
    again = [ranked(rank, 20 + rank, 1, "localhost:1002", started=4) for rank in (0, 1)]
    assert found(*before, *again) == [{0: 20, 1: 21}]  # the third is not needed any more


def test_a_rank_that_is_started_again_while_others_live_is_of_their_job() -> None:
    lives, failed = ranked(0, 10, 1, "localhost:1001"), ranked(1, 11, 1, "localhost:1001", ended="exception")
    again = ranked(1, 21, 3, "localhost:1001", started=4)
    assert found(lives, failed, again) == [{0: 10, 1: 21}]


def test_hosts_that_met_at_one_store_are_one_job_whatever_their_clocks_say() -> None:
    here, there = ranked(0, 10, 1, "node0:29500"), ranked(1, 11, 2, "node0:29500", started=7200)
    there.host = "far"
    assert found(here, there) == [{0: 10, 1: 11}]
    here.store, there.store = "", ""
    assert found(here, there) == [{0: 10, 1: 11}]  # together they are the world of two


def test_a_local_store_of_another_host_is_another() -> None:
    """Two hosts, a job each, explained together."""
    here = [ranked(rank, 10 + rank, 1, "127.0.0.1:29500") for rank in (0, 1)]
    there = [ranked(rank, 20 + rank, 1, "127.0.0.1:29500") for rank in (0, 1)]
    for one in there:
        one.host = "far"
    assert found(*here, *there) == [{0: 10, 1: 11}, {0: 20, 1: 21}]


def test_a_rank_that_has_not_met_the_others_yet_is_of_their_job() -> None:
    one, loading = ranked(0, 10, 1, "localhost:1001"), ranked(None, 11, 1, expected_rank=1)
    helper = ranked(None, 30, 10, expected_rank=0, started=5)
    assert found(helper, loading, one) == [{0: 10, 1: 11}]
    loading.parent = 2  # another agent started it
    assert found(one, loading) == [{0: 10, 1: 11}]


def test_processes_that_met_nobody_are_no_job() -> None:
    assert jobs_of([ranked(None, 10, expected_rank=0), ranked(None, 11)]) == []
    begun = ranked(None, 12, expected_rank=0)
    begun.ops.append(op(0, "init_group", 1))
    assert found(begun) == [{0: 12}]
