"""Engines on other hosts, by a real sshd and a real Slurm: stepped, compared, hung, killed, recovered, reported."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

import dinfer
from dinfer.cli import app
from dinfer.cluster.ipyparallel.errors import ClusterError
from dinfer.session.session import Session
from dinfer.trace.clocks import error_between, rank_clocks
from dinfer.trace.events import pairs
from dinfer.trace.trace import Trace
from tests.support import slurm_nodes
from tests.support.ipclusters import IPython, ipython
from tests.support.runs import MARK, wait_for
from tests.support.slurm_nodes import needs_slurm, said, slurm
from tests.support.ssh_hosts import SshHosts, needs_sshd, profile_arguments, ssh_hosts
from tests.support.twin import prompt

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(480)]

IDS = tuple(prompt(22))
CONNECT_S = 180
AHEAD_S = (0, 3000, 70_000)
"""how far the monotonic clocks of the hosts are ahead of this machine's: as those of machines that were started then"""


def written(arguments: list[str]) -> str:
    """What `dinfer profile` says once it has written one."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def whole_story(session: Session, model: Path, folder: Path) -> None:
    """What people do with a session: step, go back, compare, have a hang explained, lose a rank, recover, report."""
    session.load(str(model), threads=1)
    run = session.prefill(IDS, chunk_size=4, max_new_tokens=4, paused=True)
    for unit in ("op", "layer", "wave", "chunk"):
        run.step(unit)
    run.step_back("wave")
    run.run_to(2, 3)
    tokens = run.decode().tokens
    assert len(tokens) == 4
    assert len(set(run.sha256())) == 1
    assert "bit for bit" in str(run.kv().diff())

    hung = session.prefill(IDS, chunk_size=4, paused=True, schedule="batched", unsafe=True)
    hung.resume()
    wait_for(lambda: hung.hang or hung.failure or hung.silence, "the hang is explained, unasked")
    assert (hung.verdict().kind, hung.verdict().ranks) == ("cycle", (0, 1, 2))
    session.recover()

    run = session.prefill(IDS, chunk_size=4, max_new_tokens=4, paused=True)
    run.step("layer")
    session.ranks.kill(1)
    wait_for(lambda: run.failure, "the killed rank is named")
    assert "rank 1 is gone" in run.failure
    assert "rank 1 is started again" in session.recover()
    run.restart()
    assert run.decode().tokens == tokens
    check_arrows(run.trace)
    report = run.report(folder / "report.html")
    assert "rank 2" in report.read_text(encoding="utf-8")


def check_arrows(trace: Trace) -> None:
    """None runs backwards beyond what the clocks may be wrong by, which is said."""
    clocks = rank_clocks(trace.about)
    whole = [(send, recv) for send, recv in pairs(trace.events) if send and recv]
    assert whole
    for send, recv in whole:
        error = error_between(clocks, send.rank, recv.rank)
        assert error is not None
        # not `met`: a sender may notice late that its peer was there
        assert recv.end - send.start >= -error, (send, recv, error)


@contextmanager
def ssh_place(folder: Path, ahead_s: tuple[int, int, int] = (0, 0, 0)) -> Iterator[tuple[IPython, SshHosts]]:
    """Three hosts, whose processes bear the place's mark."""
    with (
        ipython(folder) as place,
        ssh_hosts(folder / "ssh", ahead_s=ahead_s, mark=f"{MARK}={place.mark}") as found,
    ):
        yield place, found


@needs_sshd
def test_engines_by_ssh(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ssh_place(tmp_path, AHEAD_S) as (place, found):
        told = written(profile_arguments(found))
        assert 'dinfer.connect(profile="lab")' in told
        assert "ipcluster start --profile=lab" in told
        with dinfer.connect(profile="lab", timeout=CONNECT_S) as session:
            assert "(ssh engines): ranks 0–2 on alpha, beta, gamma" in capsys.readouterr().out
            cluster = session.ranks.cluster  # type: ignore[attr-defined]
            assert cluster.engine_ids == [0, 1, 2]
            assert cluster.known.connection()["curve_serverkey"]  # what goes over the network is encrypted
            assert [one.environment["RANK"] for one in cluster.facts] == ["0", "1", "2"]
            for number in range(3):  # who else is on the host cannot read the key
                files = ("find", ".dinfer", "-name", "ipcontroller-*.json")
                assert found.run(number, *files)
                assert not found.run(number, *files, "!", "-perm", "600")
            whole_story(session, model, tmp_path)
            trace = session.run.trace
            assert [one.clock for one in rank_clocks(trace.about)] == [1, 2, 3]  # 0 is this machine's
            offsets = [one.offset_ns / 1e9 for one in rank_clocks(trace.about)]
            assert offsets == pytest.approx(AHEAD_S, abs=0.5)
            assert "clocks (3) were measured" in str(trace)
            assert "clocks (3) were measured" in (tmp_path / "report.html").read_text(encoding="utf-8")
            assert max(event.end for event in trace.events) - trace.began < 600e9
        for number in range(3):  # nothing of it is left: no process, no key
            assert "ipyparallel" not in found.run(number, "sh", "-c", "cat /proc/[0-9]*/cmdline")
            assert not found.run(number, "find", ".dinfer", "-name", "*.json")
        assert not place.members("ipyparallel")


@needs_sshd
def test_a_host_that_cannot_be_used_is_one_sentence(tmp_path: Path) -> None:
    with ssh_place(tmp_path) as (_, found):
        other, old = tmp_path / "python-other", tmp_path / "python-old"
        fakes = tmp_path / "fakes"
        for name, version in (("dinfer", "0.0.1"), ("torch", "1.0.0")):
            (fakes / name).mkdir(parents=True)
            lines = [f"__version__ = {version!r}", "class cuda: device_count = staticmethod(lambda: 0)"]
            lines.append("class backends:\n class cpu: get_cpu_capability = staticmethod(lambda: 'old')")
            (fakes / name / "__init__.py").write_text("\n".join(lines))
        old.write_text(f'#!/bin/sh\nPYTHONPATH={fakes} exec {sys.executable} "$@"\n')
        other.write_text(f'#!/bin/sh\nPYTHONPATH= exec {sys.executable} -S "$@"\n')
        for path in (old, other):
            path.chmod(0o755)
        first, second, third = found.addresses
        written([*profile_arguments(found), f"--python={second}={old}", f"--python={third}={other}"])
        with pytest.raises(ClusterError) as caught:
            dinfer.connect(profile="lab")
        said_of_it = str(caught.value)
        assert f"host '{second}' has dinfer 0.0.1, not {dinfer.__version__}" in said_of_it
        assert f"host '{second}' has torch 1.0.0, but host '{first}' has " in said_of_it
        assert f"host '{third}' has no torch (ModuleNotFoundError" in said_of_it
        assert "needed on each: Python 3." in said_of_it

        written([*profile_arguments(found), f"--python={second}=/no/python", "--folder=/no/folder"])
        with pytest.raises(ClusterError) as caught:
            dinfer.connect(profile="lab")
        assert f"host '{second}' has no Python at /no/python" in str(caught.value)
        assert f"host '{first}' has no folder /no/folder: make it there" in str(caught.value)

        written(
            [
                "profile",
                "ssh",
                *found.addresses,
                "--name=lab",
                "--ssh-option=IdentityFile=/no/key",
                known_hosts(found),
            ]
        )
        with pytest.raises(
            ClusterError, match=rf"host '{first}' accepts no ssh key of yours.*ssh-copy-id {first}"
        ):
            dinfer.connect(profile="lab")
        written(["profile", "ssh", *found.addresses, "--name=lab", f"--ssh-option={found.options[0]}"])
        with pytest.raises(
            ClusterError, match=rf"host '{first}' shows a host key that is not known here.*`ssh {first}`"
        ):
            dinfer.connect(profile="lab")
        result = CliRunner().invoke(app, ["profile", "ssh", "no-such-host.invalid", "--name=none"])
        assert result.exit_code == 2
        assert "host 'no-such-host.invalid' is unknown here" in result.stderr
        assert not (tmp_path / "profile_none").exists()
        with pytest.raises(ClusterError, match=r"n is 4, but profile 'lab' starts 3 engines: .*Use n=3"):
            dinfer.connect(4, profile="lab")


def known_hosts(found: SshHosts) -> str:
    return f"--ssh-option={found.options[1]}"


@needs_slurm
def test_engines_by_slurm(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ipython(tmp_path) as place, slurm(tmp_path / "slurm"):
        told = written(slurm_nodes.profile_arguments(sys.executable))
        assert 'dinfer.connect(profile="jobs")' in told
        with dinfer.connect(profile="jobs", timeout=CONNECT_S) as session:
            assert "(slurm engines): ranks 0–2" in capsys.readouterr().out
            cluster = session.ranks.cluster  # type: ignore[attr-defined]
            assert cluster.engine_ids == [0, 1, 2]
            assert cluster.known.connection()["curve_serverkey"]
            nodes = [one.environment["SLURMD_NODENAME"] for one in cluster.facts]
            assert sorted(nodes) == ["node0", "node1", "node2"]
            whole_story(session, model, tmp_path)
            assert [one.environment["SLURMD_NODENAME"] for one in cluster.facts] == nodes  # its node, its job
            assert rank_clocks(session.run.trace.about) == []  # this machine's
        wait_for(lambda: not said("squeue", "--noheader").strip(), "the job has ended")
        assert not place.members("ipyparallel")


@needs_slurm
def test_a_job_that_waits_is_told(tmp_path: Path) -> None:
    with ipython(tmp_path), slurm(tmp_path / "slurm"):
        written(
            ["profile", "slurm", "-n", "3", "--name=jobs", "--option=--nodes=3", "--option=--begin=now+1hour"]
        )
        with pytest.raises(ClusterError, match=r"Slurm's job \d+ is PENDING .*connect\(…, timeout=SECONDS\)"):
            dinfer.connect(profile="jobs", timeout=1)
        assert not said("squeue", "--noheader").strip()
        assert not [one for one in psutil.Process().children(recursive=True) if "srun" in one.name()]
