"""Profiles that start engines on other hosts: what is written, read back, asked and said; without hosts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from traitlets.config import Config as Traits
from typer.testing import CliRunner

from dinfer.cli import app
from dinfer.cluster.ipyparallel import profiles, reach
from dinfer.cluster.ipyparallel.clean import END_REMOTE
from dinfer.cluster.ipyparallel.errors import ClusterError
from dinfer.cluster.ipyparallel.facts import EngineFacts, differences, judge_versions
from dinfer.cluster.ipyparallel.identity import Identity
from dinfer.cluster.ipyparallel.known import Known, engines_to_come
from dinfer.cluster.ipyparallel.launcher import (
    SlurmRankSetLauncher,
    SSHRankLauncher,
    SSHRankSetLauncher,
    remote_profile_dir,
)
from dinfer.cluster.ipyparallel.profiles import (
    BATCH,
    Asked,
    Profile,
    ProfileHost,
    parse_hosts,
    write_slurm,
    write_ssh,
)
from dinfer.cluster.ipyparallel.remote import rank_names
from dinfer.config import ConfigError
from tests.support.runs import wait_for
from tests.unit.cluster.test_choice import versions

HOSTS = (ProfileHost("alpha", 1, "/a/python"), ProfileHost("me@beta:2222", 2, "/b/python"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    return tmp_path


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    place = tmp_path / "profile_lab"
    written = write_ssh(place, HOSTS, folder="/w x", ssh_args=["-o", "Port=7"], address="10.0.0.9")
    assert Profile.read(place) == written.profile
    assert written.profile == Profile("lab", "ssh", 3, "/w x", HOSTS, (*BATCH, "-o", "Port=7"))
    assert [written.profile.host_of(rank).name for rank in range(3)] == [
        "alpha",
        "me@beta:2222",
        "me@beta:2222",
    ]
    text = str(written)
    assert "rank 0 on alpha, by /a/python" in text
    assert "ranks 1–2 on me@beta:2222, by /b/python" in text
    assert text.endswith("ipcluster start --profile=lab")
    assert "enable_curve = True" in (place / "ipcontroller_config.py").read_text()
    with pytest.raises(
        ClusterError, match="n is 4, but profile 'lab' starts 3 engines: alpha, me@beta:2222 × 2"
    ):
        written.profile.check_size(4)
    write_ssh(place, HOSTS[:1], address="10.0.0.9")  # it is dinfer's own
    assert Profile.read(place) != written.profile


def test_a_config_of_somebody_else_is_kept(tmp_path: Path) -> None:
    config = tmp_path / "ipcluster_config.py"
    config.write_text("c = get_config()\nc.Cluster.engine_launcher_class = 'mpi'\n")
    assert Profile.read(tmp_path) is None
    with pytest.raises(
        ConfigError, match=r"ipcluster_config.py exists, and `dinfer profile` has not written it"
    ):
        write_ssh(tmp_path, HOSTS, address="10.0.0.9")
    config.write_text("c = get_config(\n")
    with pytest.raises(ClusterError, match="cannot be read: SyntaxError"):
        Profile.read(tmp_path)


def test_no_profile_is_none(tmp_path: Path) -> None:
    assert Profile.read(tmp_path / "profile_none") is None


@pytest.mark.parametrize(
    ("words", "engines", "pythons", "message"),
    [
        (["a", "a"], 1, [], "a is given more than once"),
        (["-oProxyCommand=x"], 1, [], "'-oProxyCommand=x' is no host"),
        (["a b"], 1, [], "'a b' is no host"),
        (["a"], 0, [], "--engines is 0"),
        (["a"], 1, ["b=/x"], "--python is 'b=/x', but b is none of the hosts: a"),
    ],
)
def test_hosts_that_are_none(words: list[str], engines: int, pythons: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_hosts(words, engines, pythons)


def test_each_host_may_have_a_python_of_its_own() -> None:
    found = parse_hosts(["a", "b"], 1, ["/usr/bin/python3", "b=/opt/python"])
    assert [host.python for host in found] == ["/usr/bin/python3", "/opt/python"]
    assert parse_hosts(["a"], 1, [])[0].python == sys.executable


def test_ranks_follow_the_hosts(tmp_path: Path) -> None:
    config = Traits(SSHEngineSetLauncher={"engines": {"alpha": 1, "me@beta:2222": {"n": 2}, "c": 5}})
    made: list[SSHRankLauncher] = []

    class Recorded(SSHRankLauncher):
        def start(self, **_: Any) -> None:
            made.append(self)

    class RecordedSet(SSHRankSetLauncher):
        launcher_class = Recorded

    launcher = RecordedSet(config=config, profile_dir=str(tmp_path / "profile_lab"), cluster_id="x", delay=0)
    launcher.start(4)
    names = [one.get_env() for one in made]
    assert [(one["RANK"], one["LOCAL_RANK"], one["WORLD_SIZE"]) for one in names] == [
        ("0", "0", "4"),
        ("1", "0", "4"),
        ("2", "1", "4"),
        ("3", "0", "4"),
    ]
    assert names[1]["DINFER_STARTED_BY"] == "ssh me@beta:2222"
    assert names[1]["IPP_PROFILE_DIR"] == remote_profile_dir("profile_lab", "me@beta:2222")
    assert made[1].remote_profile_dir == ".dinfer/profiles/lab-me-beta-2222"


@pytest.mark.parametrize(
    ("given", "gpus", "rank", "visible"),
    [
        ({"SLURM_PROCID": "4", "SLURM_NTASKS": "6", "SLURM_LOCALID": "1", "RANK": "9"}, 0, "4", None),
        ({"SLURM_PROCID": "4", "SLURM_NTASKS": "6", "SLURM_LOCALID": "1"}, 4, "4", "1"),
        (
            {
                "DINFER_STARTED_BY": "slurm",
                "RANK": "4",
                "WORLD_SIZE": "6",
                "LOCAL_RANK": "0",
                "SLURM_PROCID": "0",
            },
            0,
            "4",
            None,
        ),
        ({"DINFER_STARTED_BY": "ssh a", "RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "1"}, 1, "2", None),
        ({"DINFER_STARTED_BY": "ssh a", "RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "1"}, 2, "2", "1"),
        (
            {
                "DINFER_STARTED_BY": "ssh a",
                "RANK": "2",
                "WORLD_SIZE": "3",
                "LOCAL_RANK": "1",
                "CUDA_VISIBLE_DEVICES": "5,7",
            },
            8,
            "2",
            "7",
        ),
        (
            {
                "DINFER_STARTED_BY": "ssh a",
                "RANK": "0",
                "WORLD_SIZE": "3",
                "LOCAL_RANK": "0",
                "CUDA_VISIBLE_DEVICES": "3",
            },
            8,
            "0",
            None,
        ),
    ],
)
def test_an_engine_knows_its_rank_and_has_one_gpu(
    given: dict[str, str], gpus: int, rank: str, visible: str | None
) -> None:
    names = rank_names(given, gpus)
    assert names["RANK"] == rank
    assert names.get("CUDA_VISIBLE_DEVICES") == visible


def test_an_engine_without_a_rank_says_how_it_is_started() -> None:
    with pytest.raises(SystemExit, match="neither RANK nor SLURM_PROCID is set"):
        rank_names({}, 0)


def test_a_job_of_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="'gpu' is no option of sbatch"):
        write_slurm(tmp_path, 3, options=["gpu"])
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/it")
    place = tmp_path / "profile_jobs"
    written = write_slurm(place, 3, python="/n/python", address="10.0.0.9", options=["--partition=gpu"])
    assert "--option=--gpus-per-task=1" in str(written)
    assert Profile.read(place) == Profile("jobs", "slurm", 3, str(Path.cwd()))
    loader = profiles_config(place)
    launcher = SlurmRankSetLauncher(config=loader, profile_dir=str(place), cluster_id="dinfer-1-a")
    launcher.write_batch_script(3)
    script = Path(launcher.batch_file).read_text()
    assert script.startswith("#!/bin/sh\n#SBATCH --job-name=dinfer-1-a\n#SBATCH --ntasks=3\n")
    assert "#SBATCH --partition=gpu\n" in script
    assert script.count("#SBATCH --ntasks") == 1
    last = script.splitlines()[-1]
    assert last.startswith(
        "srun --kill-on-bad-exit=0 --wait=0 /n/python -m dinfer.cluster.ipyparallel.remote "
    )
    assert f"--work-dir={Path.cwd()}" in last


@pytest.mark.parametrize(
    ("option", "own"),
    [
        ("--job-name=x", "--job-name"),
        ("--job=x", "--job-name"),
        ("-Jx", "--job-name"),
        ("--ntasks=9", "--ntasks"),
        ("-n9", "--ntasks"),
        ("--array=0-2", "--array"),
        ("-a0-2", "--array"),
        ("--output=x", "--output"),
        ("-ox", "--output"),
        ("--export=NONE", "--export"),
    ],
)
def test_an_option_of_sbatch_that_dinfer_sets_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, own: str
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/it")
    with pytest.raises(
        ConfigError, match=rf"^'{option}' cannot be given: {own} is dinfer's, .* Leave it out\."
    ):
        write_slurm(tmp_path / "profile_jobs", 3, address="10.0.0.9", options=[option])
    assert not (tmp_path / "profile_jobs").exists()


@pytest.mark.parametrize(
    "option",
    [
        r"--comment=\new",
        '--comment="""; it ends here',
        "--comment=it's",
        "--nodes=3",
        "-N3",
        "--ntasks-per-node=1",
        "--export-file=x",
    ],
)
def test_other_options_come_to_sbatch_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/it")
    place = tmp_path / "profile_jobs"
    write_slurm(place, 3, address="10.0.0.9", options=[option])
    launcher = SlurmRankSetLauncher(
        config=profiles_config(place), profile_dir=str(place), cluster_id="dinfer-1-a"
    )
    launcher.write_batch_script(3)
    assert f"#SBATCH {option}" in Path(launcher.batch_file).read_text().splitlines()


def profiles_config(place: Path) -> Any:
    from traitlets.config.loader import PyFileConfigLoader

    return PyFileConfigLoader("ipcluster_config.py", path=str(place)).load_config()


def test_without_slurm_that_is_said(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    result = CliRunner().invoke(app, ["profile", "slurm", "-n", "3"])
    assert result.exit_code == 2
    assert "there is no sbatch or srun here: run this where jobs are submitted" in result.stderr
    assert not list(place.iterdir())


def test_a_name_that_is_none(place: Path) -> None:
    result = CliRunner().invoke(app, ["profile", "ssh", "a", "--name=../x", "--address=10.0.0.9"])
    assert result.exit_code == 2
    assert "--name is '../x'; it must consist of letters" in result.stderr
    assert not list(place.iterdir())


@pytest.mark.parametrize(
    ("status", "error", "said"),
    [
        (None, "", "has not answered within 60 s"),
        (255, "ssh: Could not resolve hostname a: Name or service not known\r\n", "is unknown here (ssh: "),
        (255, "a: Permission denied (publickey).\n", "accepts no ssh key of yours"),
        (255, "No key is known.\nHost key verification failed.\n", "shows a host key that is not known here"),
        (255, "ssh: connect to host a port 22: Connection refused\n", "cannot be reached (ssh: ssh: connect"),
        (127, "sh: 1: /no/python: not found\n", "has no Python at /no/python"),
        (1, "SyntaxError: invalid syntax\n", "cannot run /no/python (it says: SyntaxError: invalid syntax)"),
        (1, "", "cannot run /no/python (it says: ended with status 1)"),
    ],
)
def test_a_host_that_does_not_answer(status: int | None, error: str, said: str) -> None:
    found = reach.unreachable(ProfileHost("a", 1, "/no/python"), status, error)
    assert found.startswith("host 'a' ")
    assert said in found


def test_another_torch_is_refused_and_another_build_told() -> None:
    same = {0: versions(torch="2.13.0", host="a"), 1: versions(torch="2.13.0+cpu", host="b")}
    judge_versions(same, "1.0")
    with pytest.raises(
        ClusterError, match=r"engine 1 on b has torch 2\.11\.0, but engine 0 on a has 2\.13\.0: ranks"
    ):
        judge_versions({**same, 1: versions(torch="2.11.0", host="b")}, "1.0")


def facts(torch: str = "2.13.0", cpu: str = "x86_64 AVX2 (Xeon)") -> EngineFacts:
    return EngineFacts(0, 0, torch, cpu, "", "", "", "", Identity(1, "", "", "", ""), {})


def test_machines_that_differ_are_told() -> None:
    assert differences([facts(), facts()]) == ""
    text = differences([facts(), facts(cpu="aarch64 DEFAULT"), facts(torch="2.13.0+cpu")])
    assert "different builds of torch: 2.13.0 on ranks 0–1, 2.13.0+cpu on rank 2" in text
    assert "different CPUs: x86_64 AVX2 (Xeon) on ranks 0, 2, aarch64 DEFAULT on rank 1" in text
    assert "the last bits" in text


def fake_ssh(folder: Path, monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """A program that is found as ssh."""
    ssh = folder / "ssh"
    ssh.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_an_option_that_ssh_does_not_take_is_told_before_a_profile_is_written(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_ssh(
        place, monkeypatch, "echo 'command-line: line 0: Bad configuration option: identityfil' >&2; exit 255"
    )
    result = CliRunner().invoke(app, ["profile", "ssh", "a", "--ssh-option=IdentityFil=/x"])
    assert result.exit_code == 2
    assert "ssh refuses what it is given for host 'a' (command-line: line 0: Bad conf" in result.stderr
    assert not (place / "profile_ssh").exists()


def test_an_ssh_that_does_not_answer_is_told(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ssh(place, monkeypatch, "exec sleep 600")
    monkeypatch.setattr(profiles, "ASK_S", 0.1)
    with pytest.raises(ClusterError, match=r"ssh has not read its config for host 'a' within 0\.1 s"):
        write_ssh(place / "profile_lab", [ProfileHost("a", 1, "/a/python")])


def test_who_is_killed_is_not_awaited_though_another_process_holds_its_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiles, "KILLED_S", 0.01)
    number = tmp_path / "number"
    asked = Asked(["sh", "-c", f"sleep 600 & echo $! >{number}.part; mv {number}.part {number}; wait"], "")
    wait_for(number.exists, "it has started another process")
    pid = int(number.read_text())
    try:
        assert asked.answer(0) == (None, "", "")
        assert psutil.pid_exists(pid)
    finally:
        os.kill(pid, signal.SIGKILL)
        asked._thread.join()


def test_all_hosts_are_asked_at_once_why_engines_have_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class AskedHost:
        def __init__(self, words: list[str], _: str) -> None:
            self.host = words[-5].removeprefix("me@")
            asked.append(self.host)

        def answer(self, _: float) -> tuple[int | None, str, str]:
            assert asked == ["alpha", "beta", "beta"]  # before anybody has been awaited
            return (None, "", "") if self.host == "alpha" else (0, "no\nmemory\n", "")

    monkeypatch.setattr(reach, "Asked", AskedHost)
    said = reach.why_not_started(
        Profile("lab", "ssh", 3, "", HOSTS), Known(Path("profile_lab"), "dinfer-1-a"), 3
    )
    logs = [f" On me@beta:2222, the log of rank {rank} ends: no / memory." for rank in (1, 2)]
    assert said == "".join(logs)


def test_engines_of_other_hosts_are_awaited(tmp_path: Path) -> None:
    away = {"engines": {"a/0": {"pid": 5, "hostname": "a"}, "b/0": {"pid": -1, "hostname": "b"}}}
    description = {"controller": {"state": {"pid": 3}}, "engines": {"sets": {"1": away}}}
    assert engines_to_come(description, lambda _: False, 100.0) == 1
    assert engines_to_come(description, lambda _: False, 100.0, was_left=True) == 0
    assert (
        engines_to_come(description, lambda _: False, 1.0, was_left=True) == 1
    )  # their client ended at once
    known = Known(tmp_path, "")
    known.cluster_file.parent.mkdir(parents=True)
    known.cluster_file.write_text(json.dumps(description))
    assert known.engine_pids() == []  # of this machine


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="it reads /proc")
def test_the_script_that_ends_a_cluster_on_a_host_ends_nothing_else(tmp_path: Path) -> None:
    security = tmp_path / "it/security"
    security.mkdir(parents=True)
    (security / "ipcontroller-dinfer-9-test-engine.json").touch()
    (security / "ipcontroller-other-engine.json").touch()
    sleeps = [
        subprocess.Popen(["sleep", "600"], env={"IPP_CLUSTER_ID": name})
        for name in ("dinfer-9-test", "dinfer-9-tes")
    ]
    stubborn = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(600)",
        ],
        env={"IPP_CLUSTER_ID": "dinfer-9-test"},
        stdout=subprocess.PIPE,
    )
    try:
        assert stubborn.stdout
        assert stubborn.stdout.readline()
        script = END_REMOTE.format(id="dinfer-9-test", folder=tmp_path / "it")
        subprocess.run(["sh", "-s"], input=script, text=True, check=True, timeout=60)
        assert sleeps[0].wait(20) == -15
        assert stubborn.wait(20) == -9
        assert sleeps[1].poll() is None
        assert [path.name for path in security.iterdir()] == ["ipcontroller-other-engine.json"]
    finally:
        for process in (*sleeps, stubborn):
            process.kill()
            process.wait()
        assert stubborn.stdout
        stubborn.stdout.close()
