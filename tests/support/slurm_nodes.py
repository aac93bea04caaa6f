"""A real Slurm of three nodes on this machine: munge, slurmctld and three slurmd of its own. Needs root. Not a test."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.support.runs import wait_for

PATH = os.environ.get("PATH", "") + ":/usr/sbin"
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "squeue", "sinfo")
MISSING = [name for name in NEEDED if shutil.which(name, path=PATH) is None]
needs_slurm = pytest.mark.skipif(
    os.geteuid() != 0 or bool(MISSING),
    reason=f"needs root and Slurm (missing: {', '.join(MISSING)}): env/packages installs it",
)

NODES = ("node0", "node1", "node2")

CONFIG = """
ClusterName=dinfer
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=2
NodeName=node0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cores}
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cores}
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[3]} CPUs={cores}
PartitionName=all Nodes=node[0-2] Default=YES MaxTime=INFINITE State=UP
"""


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in servers]


@contextmanager
def slurm(folder: Path) -> Iterator[None]:
    """Three nodes, for this process and all that it starts. At the end its daemons and their children have ended."""
    folder.mkdir(parents=True)
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    config = folder / "slurm.conf"
    values = {
        "host": socket.gethostname(),
        "folder": folder,
        "ports": _free_ports(4),
        "cores": os.cpu_count(),
    }
    config.write_text(CONFIG.format(**values))
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setenv("SLURM_CONF", str(config))
        patch.setenv("PATH", PATH)
        socket_file = folder / "munge.socket"
        stack.enter_context(
            _daemon(
                folder / "munged.out",
                *("munged", "--foreground", "--force", f"--key-file={folder}/munge.key"),
                *(f"--socket={socket_file}", f"--pid-file={folder}/munged.pid"),
                *(f"--seed-file={folder}/munged.seed", f"--log-file={folder}/munged.log"),
            )
        )
        wait_for(socket_file.exists, "munged listens")
        stack.enter_context(_daemon(folder / "slurmctld.out", "slurmctld", "-D", "-f", str(config)))
        for node in NODES:
            stack.enter_context(
                _daemon(folder / f"slurmd-{node}.out", "slurmd", "-D", "-N", node, "-f", str(config))
            )
        wait_for(
            lambda: said("sinfo", "--noheader", "--Node", "--format=%t").split() == ["idle"] * 3,
            "nodes are up",
        )
        try:
            yield
        finally:
            said("scancel", "--user=root")
            wait_for(lambda: not said("squeue", "--noheader").strip(), "no job is left")


def said(*command: str) -> str:
    """What a command of Slurm's says; "" where it fails."""
    return subprocess.run(command, capture_output=True, text=True).stdout


@contextmanager
def _daemon(output: Path, *command: str) -> Iterator[None]:
    with output.open("wb") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
    try:
        yield
    finally:
        with suppress(psutil.Error):
            of_it = psutil.Process(process.pid)
            for one in (*of_it.children(recursive=True), of_it):
                with suppress(psutil.Error):
                    one.kill()
        process.wait()


def profile_arguments(python: str, options: Sequence[str] = ()) -> list[str]:
    """`dinfer profile slurm …` for these nodes."""
    given = [f"--option={option}" for option in ("--nodes=3", "--ntasks-per-node=1", *options)]
    return ["profile", "slurm", "-n", "3", "--name=jobs", f"--python={python}", *given]
