"""The whole session on engines of every launcher: loaded, stepped, decoded, with equal KV."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from ipyparallel.error import RemoteError

import dinfer
from dinfer.cluster.ipyparallel.errors import ClusterError
from dinfer.run.failure import RankFailed
from dinfer.run.run import Run
from dinfer.session.session import Session, SessionOver
from tests.support.ipclusters import LAUNCHER, IPython, ipython
from tests.support.runs import wait_for
from tests.support.twin import prompt

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

IDS = list(prompt(22))
OF_MPI = pytest.mark.skipif(
    shutil.which("mpiexec") is None or importlib.util.find_spec("mpi4py") is None,
    reason="needs mpiexec and mpi4py: apt-get install openmpi-bin, pip install 'dinfer[mpi]'",
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[IPython]:
    """An IPYTHONDIR without any cluster, where MPI may do what it refuses to root, and on few cores."""
    for name in (
        "OMPI_ALLOW_RUN_AS_ROOT",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM",
        "OMPI_MCA_rmaps_base_oversubscribe",
    ):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe")
    with ipython(tmp_path) as place:
        yield place


@pytest.mark.parametrize(
    ("engines", "name"),
    [
        (LAUNCHER, "dinfer"),
        pytest.param("mpi", "mpi", marks=[OF_MPI, pytest.mark.slow]),
    ],
    ids=["dinfer", "mpi"],
)
def test_a_whole_session(
    place: IPython, model: Path, engines: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the first two engines of three, which it says."""
    place.ipcluster(3, f"--engines={engines}")
    wait_for(lambda: (place.profile_dir / "security/cluster-.json").exists(), "ipcluster has begun")
    with dinfer.connect(n=2, start=False) as session:
        said = capsys.readouterr().out
        assert f"joined profile 'default' ({name} engines): ranks 0–1" in said
        assert "engine 2 is not used" in said
        session.load(str(model), threads=1)
        wanted = session.prefill(IDS, chunk_size=4, max_new_tokens=4, paused=True)
        tokens, kv = wanted.decode().tokens, wanted.sha256()
        assert len(tokens) == 4
        assert len(set(kv)) == 1
        run = session.prefill(IDS, chunk_size=4, max_new_tokens=4, paused=True)
        for unit in ("op", "layer", "wave", "chunk"):
            run.step(unit)
        run.step_back("wave")
        run.run_to(2, 3)
        assert run.decode().tokens == tokens
        assert run.sha256() == kv
        with dinfer.connect(n=2, start=False) as newer:
            check_that_it_is_over(session, run)
            assert newer.run.tokens == list(tokens)
            newer.load(str(model), threads=1)
            again = newer.prefill(IDS, chunk_size=4, max_new_tokens=4, paused=True)
            assert again.decode().tokens == tokens
        with dinfer.connect(n=2, start=False) as newest:
            cluster = newest.ranks.cluster  # type: ignore[attr-defined]
            with pytest.raises(RemoteError, match="engine has no 'step' while there is no run"):
                cluster.client[0].execute("engine.step()", block=True)
    with pytest.raises(SessionOver, match="this session is closed"):
        newer.prefill(IDS)
    assert len(place.members("ipyparallel.engine")) >= 3  # a joined cluster stays


def check_that_it_is_over(session: Session, run: Run) -> None:
    """Another session has joined its engines: nobody is called dead, and none of them is killed to be recovered."""
    wait_for(lambda: run.failure, "it has heard of that")
    with pytest.raises(RankFailed, match=r"^taken over: ") as caught:
        run.step("op")
    assert "gone" not in str(caught.value)
    for call in (session.recover, session.load, lambda: session.prefill(IDS)):
        with pytest.raises(SessionOver, match=r"^taken over: "):
            call()


@pytest.mark.slow
def test_when_all_are_killed_ipcluster_ends_and_that_is_said(place: IPython, model: Path) -> None:
    # By default it ends only if they end within 30 s of their start.
    place.ipcluster(2, "--IPClusterStart.early_shutdown=3600")
    wait_for(lambda: (place.profile_dir / "security/cluster-.json").exists(), "ipcluster has begun")
    with dinfer.connect(n=2, start=False) as session:
        run = session.load(str(model), threads=1).prefill(IDS, chunk_size=4, paused=True)
        for rank in (0, 1):
            session.ranks.kill(rank)
        wait_for(lambda: run.failure, "they are named")
        wait_for(lambda: not place.members("ipyparallel.controller"), "the controller ends")
        with pytest.raises(ClusterError, match="start the cluster again"):
            session.recover()


@OF_MPI
@pytest.mark.slow
def test_a_rank_that_dies_under_mpi_is_named(place: IPython, model: Path) -> None:
    """mpiexec then ends the other ranks too: there is nothing left to bring anybody back to."""
    place.ipcluster(2, "--engines=mpi")
    wait_for(lambda: (place.profile_dir / "security/cluster-.json").exists(), "ipcluster has begun")
    with dinfer.connect(n=2, start=False) as session:
        session.load(str(model), threads=1)
        run = session.prefill(IDS, chunk_size=4, paused=True)
        run.step()
        session.ranks.kill(1)
        wait_for(lambda: run.failure, "it is named")
        assert "rank 1 is gone" in run.failure
        with pytest.raises(RankFailed, match="is gone"):
            run.step()
