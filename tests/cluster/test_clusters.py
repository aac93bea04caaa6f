"""Real ipyparallel clusters: joined, started, broken and cleaned up."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from dinfer.cluster.ipyparallel.attach import attach
from dinfer.cluster.ipyparallel.clean import clean
from dinfer.cluster.ipyparallel.cluster import Cluster
from dinfer.cluster.ipyparallel.errors import ClusterError, RankError, RankGone, RankSilent
from dinfer.cluster.ipyparallel.facts import own_loopback
from dinfer.cluster.ipyparallel.known import record_paths
from dinfer.cluster.ipyparallel.launcher import DinferEngineSetLauncher
from tests.support.ipclusters import LAUNCHER, IPython, ended, ipython
from tests.support.runs import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

CLIENT = """
import sys, time
from dinfer.cluster.ipyparallel.attach import attach
cluster = attach(1, start=True)
print("ready", *cluster.call(None, "os:getpid"), cluster.known.cluster_id, flush=True)
time.sleep(600)
"""


@pytest.fixture
def joined(engines: IPython) -> Iterator[Cluster]:
    """Three ranks of the stock cluster. Not to be killed without being respawned."""
    cluster = attach(3, start=False)
    assert cluster.known.profile_dir == engines.profile_dir
    yield cluster
    cluster.close()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[IPython]:
    """An IPYTHONDIR without any cluster."""
    with ipython(tmp_path) as place:
        yield place


def test_joins_the_running_cluster_and_says_so(joined: Cluster) -> None:
    assert not joined.started_by_us
    assert joined.n == 3
    host = socket.gethostname()
    assert joined.describe() == f"joined profile 'default' (local engines): ranks 0–2 on {host}"
    assert [facts.pid for facts in joined.facts] == joined.call(None, "os:getpid")
    assert {facts.loopback for facts in joined.facts} == {own_loopback()}
    assert joined.controller_pid is not None
    assert all(joined.alive(rank) for rank in range(3))


def test_the_first_engines_are_used_where_there_are_more(engines: IPython) -> None:
    cluster = attach(2)
    try:
        assert cluster.engine_ids == cluster.view.targets == [0, 1]
        assert cluster.describe().endswith("; engine 2 is not used")
    finally:
        cluster.close()
    assert len(engines.members("ipyparallel.engine")) >= 3


@pytest.mark.timeout(100)
@pytest.mark.usefixtures("engines")
def test_too_few_engines_is_one_error_without_waiting_for_more() -> None:
    with pytest.raises(ClusterError, match=r"3 engines \(0, 1, 2\), but 5 .*ipcluster engines -n 2"):
        attach(5, timeout=600)


@pytest.mark.parametrize("name", ["transformers", "json"])
def test_a_file_that_hides_a_module_from_engines_is_named(
    engines: IPython, joined: Cluster, name: str
) -> None:
    """An engine that was started by hand takes modules from its folder first. It has taken json from elsewhere."""
    hiding = engines.folder / f"{name}.py"
    hiding.touch()
    try:
        if name == "json":
            attach(3).close()
        else:
            with pytest.raises(
                ClusterError, match=rf"engine 0 takes \S+/{name}\.py for the package or module"
            ):
                attach(3)
    finally:
        hiding.unlink()
    assert len(joined.call(None, "os:getpid")) == 3


def test_an_engine_with_another_dinfer_is_named(joined: Cluster) -> None:
    joined.view.client[1].execute(
        "import dinfer; kept = dinfer.__version__; dinfer.__version__ = '0.0.1'", block=True
    )
    try:
        with pytest.raises(ClusterError, match=r"engine 1 has dinfer 0\.0\.1, not") as caught:
            attach(3)
        assert "engine 0" not in str(caught.value)
    finally:
        joined.view.client[1].execute("dinfer.__version__ = kept", block=True)


def test_errors_name_the_rank(joined: Cluster) -> None:
    with pytest.raises(RankError, match=r"^rank 2 \(pid \d+ on .*\): FileNotFoundError") as caught:
        joined.call(2, "os:listdir", "/no/such/folder")
    assert caught.value.rank == 2
    assert "Traceback" in caught.value.traceback
    with pytest.raises(RankError, match="ModuleNotFoundError"):
        joined.call(None, "no_such_module:function")


def waits_for(path: Path) -> str:
    """What ranks run that are busy until there is such a file."""
    return f"import os, time\nwhile not os.path.exists({str(path)!r}): time.sleep(0.02)"


def test_a_late_rank_is_named_and_the_others_answer(joined: Cluster, tmp_path: Path) -> None:
    busy = joined.call_async(1, "builtins:exec", waits_for(tmp_path / "go"), {})
    answers = joined.call(None, "os:getpid", timeout=3, check=False)
    assert [isinstance(answer, RankSilent) for answer in answers] == [False, True, False]
    assert "has not answered within 3 s: it is busy" in str(answers[1])
    (tmp_path / "go").touch()
    assert busy.result(60) == [None]


def test_a_killed_rank_comes_back_under_its_id_and_the_others_keep_their_state(
    joined: Cluster, tmp_path: Path
) -> None:
    joined.view.execute("state = 'kept'", block=True)
    before = joined.call(None, "os:getpid")
    sleeping = joined.call_async(None, "builtins:exec", waits_for(tmp_path / "go"), {})
    os.kill(before[1], signal.SIGSTOP)
    assert joined.alive(1)  # stopped is not dead
    with pytest.raises(RankSilent, match=r"^rank 1 .* has not answered within 1 s: its process is stopped"):
        joined.call(1, "os:getpid", timeout=1)
    joined.kill(1)
    with pytest.raises(RankGone, match=r"^rank 1 .* ended during a call"):
        sleeping.result(60)
    assert not sleeping.done()  # nobody waited for the others
    (tmp_path / "go").touch()
    assert [joined.alive(rank) for rank in range(3)] == [True, False, True]
    with pytest.raises(RankGone, match=r"^rank 1 .* has ended"):
        joined.call(1, "os:getpid")

    joined.respawn(1)
    after = joined.call(None, "os:getpid")
    assert [after[0], after[2]] == [before[0], before[2]]
    assert after[1] == joined.facts[1].pid != before[1]
    assert joined.view.targets == [0, 1, 2]
    assert joined.view.apply_sync(eval, "globals().get('state')") == ["kept", None, "kept"]
    with pytest.raises(ClusterError, match="kill it first"):
        joined.respawn(0)


def test_px_runs_on_ranks(engines: IPython) -> None:
    code = """
from dinfer.cluster.ipyparallel.attach import attach
cluster = attach(2)
get_ipython().run_line_magic("px", "print('on', get_ipython().kernel.engine_id)")
get_ipython().run_cell_magic("px", "--targets 1", "print('alone', get_ipython().kernel.engine_id)")
"""
    process = engines.start("-m", "IPython", "--no-banner", "-c", code)
    assert process.wait(60) == 0, engines.output(process)
    said = re.findall(r"(on|alone) (\d)", engines.output(process))
    assert sorted(said) == [("alone", "1"), ("on", "0"), ("on", "1")]


def test_clean_leaves_a_users_cluster_alone(joined: Cluster) -> None:
    assert clean() == []
    assert all(joined.alive(rank) for rank in range(3))


def test_starts_one_where_none_runs_and_leaves_nothing(place: IPython) -> None:
    with pytest.raises(ClusterError, match=r"profile 'default' .*`ipcluster start -n 2`"):
        attach(2, start=False)
    cluster = attach(2)
    assert cluster.started_by_us
    assert re.match(
        r"started cluster 'dinfer-\d+-\w+' of profile 'default' \(dinfer engines\)", cluster.describe()
    )
    assert cluster.call(None, "os:getenv", "RANK") == ["0", "1"]
    assert cluster.call(None, "os:getenv", "WORLD_SIZE") == ["2", "2"]
    # Engines import what a rank needs of their own accord, while they are waited for.
    assert cluster.view.apply_sync(eval, "'dinfer.rank.kernel' in __import__('sys').modules") == [True] * 2
    again = attach(2)  # the same process joins its own
    assert again.known == cluster.known
    assert again.started_by_us
    again.close(stop=False)
    assert clean()[0].done == "left alone"
    assert cluster.alive(0)

    cluster.kill(0)
    cluster.respawn(0)
    assert cluster.call(None, "os:getenv", "RANK") == ["0", "1"]
    pid, controller = cluster.facts[0].pid, cluster.controller_pid
    assert controller is not None
    os.kill(controller, signal.SIGKILL)
    wait_for(lambda: ended([pid]), "the respawned engine ends with its cluster")

    cluster.close()
    assert place.members() == []
    assert place.files() == []


def test_a_start_that_fails_is_one_error_and_leaves_nothing(
    place: IPython, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(DinferEngineSetLauncher, "entrypoint_name", "nosuch")
        with pytest.raises(ClusterError, match=r"no cluster could be started\..*'nosuch' could not be"):
            attach(1)
    monkeypatch.setenv("DINFER_GPU_IDS", "0")
    with pytest.raises(ClusterError, match="DINFER_GPU_IDS is '0', but 2 engines are started"):
        attach(2)
    assert place.members() == []
    assert place.files() == []


def test_clean_ends_the_orphan_only(place: IPython) -> None:
    orphan, living = (place.start("-c", CLIENT) for _ in range(2))
    clients = (orphan, living)
    wait_for(
        lambda: all("ready" in place.output(client) or client.poll() is not None for client in clients),
        "both clusters are up",
    )
    said = [re.search(r"ready (\d+) (\S+)", place.output(client)) for client in clients]
    assert all(said), [place.output(client) for client in clients]
    (pid, name), (other_pid, other_name) = (match.groups() for match in said if match)
    orphan.kill()
    orphan.wait()

    planned = {found.cluster_id: found.done for found in clean(dry_run=True)}
    assert planned == {name: "would be ended", other_name: "left alone"}
    assert not ended([int(pid)])
    command = [sys.executable, "-m", "dinfer", "clean", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    assert {found["cluster_id"]: found["done"] for found in json.loads(done.stdout)} == {
        name: "ended",
        other_name: "left alone",
    }
    assert ended([int(pid)])
    assert not ended([int(other_pid)])
    assert [path.name for path in record_paths(place.profile_dir)] == [f"dinfer-cluster-{other_name}.json"]
    assert not [file for file in place.files() if name in file]


def test_files_of_a_cluster_that_is_gone_are_told_from_a_running_one(place: IPython) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    write_client_file(place, port)
    with pytest.raises(ClusterError, match="its controller has ended"):
        attach(2, start=False, timeout=600)


def test_a_port_that_has_become_somebody_elses_is_one_error(place: IPython) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        write_client_file(place, other.getsockname()[1])
        with pytest.raises(ClusterError, match="the controller of profile 'default' does not answer"):
            attach(2, start=False, timeout=1)


def exists(place: IPython) -> bool:
    """Whether `ipcluster start` has got as far as its controller; the rest is for `attach` to wait for."""
    return (place.profile_dir / "security/cluster-.json").exists()


def write_client_file(place: IPython, port: int) -> None:
    """As a controller that was killed leaves it behind."""
    names = ("registration", "control", "mux", "task", "iopub", "notification", "broadcast")
    found: dict[str, object] = dict.fromkeys(names, port) | {
        "interface": "tcp://127.0.0.1",
        "ssh": "",
        "key": "0" * 36,
    }
    found |= {"task_scheme": "leastload", "location": socket.gethostname(), "curve_serverkey": None}
    found |= {"pack": "json", "unpack": "json", "signature_scheme": "hmac-sha256"}
    path = place.profile_dir / "security" / "ipcontroller-client.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(found))


@pytest.mark.slow
def test_ranks_follow_the_order_of_ids(place: IPython) -> None:
    place.ipcluster(3)
    wait_for(lambda: exists(place), "ipcluster has begun")
    first = attach(3, start=False)
    first.kill(0)
    wait_for(lambda: 0 not in first.client.ids, "the controller knows that engine 0 has ended")
    second = attach(2, start=False)
    try:
        assert second.engine_ids == [1, 2]
        assert "these are engines 1, 2: ranks follow the order of engine ids" in second.describe()
        assert second.call(0, "os:getpid") == [first.facts[1].pid]
    finally:
        first.close()
        second.close(stop=True)  # as `ipcluster stop` does
    wait_for(lambda: not place.members(), "nothing is left")


@pytest.mark.slow
def test_the_launcher_keeps_ids_and_hands_out_gpus(place: IPython, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINFER_GPU_IDS", "1,0,1")
    place.ipcluster(3, f"--engines={LAUNCHER}")
    wait_for(lambda: exists(place), "ipcluster has begun")
    cluster = attach(3, start=False)
    try:
        assert "(dinfer engines)" in cluster.describe()
        assert cluster.engine_ids == [0, 1, 2]
        assert cluster.call(None, "os:getenv", "LOCAL_RANK") == ["0", "1", "2"]
        assert cluster.call(None, "os:getenv", "CUDA_VISIBLE_DEVICES") == ["1", "0", "1"]
    finally:
        cluster.close()


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("mpiexec") is None or importlib.util.find_spec("mpi4py") is None,
    reason="needs mpiexec and mpi4py: apt-get install openmpi-bin, pip install 'dinfer[mpi]'",
)
def test_under_mpi_an_engines_id_is_its_rank(place: IPython, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "OMPI_ALLOW_RUN_AS_ROOT",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM",
        "OMPI_MCA_rmaps_base_oversubscribe",
    ):
        monkeypatch.setenv(name, "1")  # Open MPI 4 refuses root, and more ranks than cores
    monkeypatch.setenv("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe")  # and so does 5
    place.ipcluster(3, "--engines=mpi")
    wait_for(lambda: exists(place), "ipcluster has begun")
    cluster = attach(3, start=False)
    try:
        assert "(mpi engines)" in cluster.describe()
        said = cluster.view.apply_sync(eval, "__import__('mpi4py.MPI').MPI.COMM_WORLD.rank")
        assert said == cluster.engine_ids == [0, 1, 2]
    finally:
        cluster.close()
