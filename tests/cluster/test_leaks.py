"""What is left in a cluster's engines once their clients are gone: nothing that grows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from tests.cluster.test_orphans import Client
from tests.support.ipclusters import IPython, stock_cluster, within
from tests.support.runs import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(480)]

CLIENTS = 5


class Held(NamedTuple):
    """What an engine's process has."""

    threads: int
    processes: int
    files: int


def held(pid: int) -> Held:
    process = psutil.Process(pid)
    return Held(process.num_threads(), len(process.children(recursive=True)), process.num_fds())


def check_held(engines: Sequence[int], base: Sequence[Held]) -> None:
    """Wait until none of these processes has more of anything than it had; what a session leaves ends a bit later."""

    def is_within() -> bool:
        pairs = zip(map(held, engines), base, strict=True)
        return all(count <= most for now, before in pairs for count, most in zip(now, before, strict=True))

    wait_for(is_within, f"engines hold no more than {base}")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[IPython]:
    """`ipcluster start -n 2`."""
    with stock_cluster(tmp_path, 2) as place, within(place):
        yield place


def test_engines_hold_no_more_after_each_client_that_was_killed(place: IPython, model: Path) -> None:
    """Counted from the second client on: the first one's group is the first that an engine has ever had."""
    base: list[Held] = []
    for number in range(CLIENTS):
        client = Client(place, model, start=False)
        client.step()
        wait_for(lambda client=client: "stepped" in client.said, "a step")  # type: ignore[misc]
        if number < 2:
            base = [held(pid) for pid in client.engines]
        else:
            check_held(client.engines, base)
        client.kill()
