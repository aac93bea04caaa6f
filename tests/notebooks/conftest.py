"""One `ipcluster start -n 3` for all notebooks: each ends with a session that parts from the ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.ipclusters import IPython, marked, within
from tests.support.runs import wait_for


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[IPython]:
    """The cluster; ends with everything in it."""
    place = IPython(tmp_path_factory.mktemp("notebooks"))
    try:
        with within(place):
            process = place.ipcluster(3)
            begun = place.profile_dir / "security" / "cluster-.json"
            wait_for(lambda: begun.exists() or process.poll(), "ipcluster has begun")
        yield place
    finally:
        place.end()
        wait_for(lambda: not marked(place.mark), "no process is left", 20)


@pytest.fixture(scope="module")
def engines(cluster: IPython) -> Iterator[IPython]:
    """The same, for kernels that are started meanwhile."""
    with within(cluster):
        yield cluster
