"""Hosts on this machine that ssh reaches: each with its own network, host name, process ids, clock, home, host key and
sshd. Needs root and openssh-server. Not a test."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from dinfer.lab.hosts import LabNetwork, do, hosts
from tests.support.hosted import WHY_NOT
from tests.support.runs import wait_for

SSHD = shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin")
needs_sshd = pytest.mark.skipif(
    bool(WHY_NOT) or SSHD is None or shutil.which("ssh") is None,
    reason=WHY_NOT or "needs sshd: apt-get install openssh-server openssh-client (env/packages does)",
)

NAMES = ("alpha", "beta", "gamma")
CHECKOUT = Path(__file__).parents[2]

CONFIG = """
ListenAddress {address}
HostKey {key}
AuthorizedKeysFile {authorized}
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
PidFile none
Subsystem sftp internal-sftp
SetEnv PYTHONPATH={checkout} OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 {mark}
"""

BE_HOST = """
set -e
hostname {name}
mount --bind {folder}/passwd /etc/passwd
mount --bind {folder}/hosts /etc/hosts
exec {sshd} -D -e -f {folder}/sshd_config
"""


@dataclass(frozen=True)
class SshHosts:
    """Three hosts. `address` of each is how ssh reaches it; `options`: those of ssh that a user has in a config."""

    folder: Path
    network: LabNetwork

    @property
    def addresses(self) -> list[str]:
        return [host.address for host in self.network.hosts]

    @property
    def options(self) -> list[str]:
        return [f"IdentityFile={self.folder}/key", f"UserKnownHostsFile={self.folder}/known_hosts"]

    def run(self, number: int, *command: str) -> str:
        """What a command says on a host, by ssh."""
        options = [word for option in self.options for word in ("-o", option)]
        return do("ssh", "-o", "BatchMode=yes", *options, self.addresses[number], shlex.join(command))


@contextmanager
def ssh_hosts(folder: Path, *, ahead_s: Sequence[int] = (0, 0, 0), mark: str = "") -> Iterator[SshHosts]:
    """Hosts whose monotonic clocks are so many seconds ahead of this machine's. At the end nothing runs on them."""
    assert SSHD
    folder.mkdir(parents=True, exist_ok=True)
    Path("/run/sshd").mkdir(exist_ok=True)  # where sshd's unprivileged part goes
    _make_key(folder / "key")
    with hosts(len(NAMES)) as network, ExitStack() as stack:
        found = SshHosts(folder, network)
        known, names = [], ["127.0.0.1 localhost"]
        names += [f"{address} {name}" for address, name in zip(found.addresses, NAMES, strict=True)]
        for name, host, ahead in zip(NAMES, network.hosts, ahead_s, strict=True):
            own = folder / name
            (own / "home").mkdir(parents=True)
            _make_key(own / "host_key")
            kind, public, *_ = (own / "host_key.pub").read_text().split()
            known.append(f"{host.address} {kind} {public}")
            lines = Path("/etc/passwd").read_text().splitlines()
            users = [
                ":".join([*line.split(":")[:5], str(own / "home"), line.split(":")[6]]) for line in lines
            ]
            (own / "passwd").write_text("\n".join(users) + "\n")
            (own / "hosts").write_text("\n".join(names) + "\n")
            config = CONFIG.format(
                address=host.address,
                key=own / "host_key",
                authorized=folder / "key.pub",
                checkout=CHECKOUT,
                mark=mark,
            )
            (own / "sshd_config").write_text(config)
            stack.enter_context(_sshd(name, own, host.inside(), ahead))
        (folder / "known_hosts").write_text("\n".join(known) + "\n")
        for number, name in enumerate(NAMES):
            _await_sshd(name, folder / name / "sshd.log")
            assert found.run(number, "hostname").strip() == name
        yield found


def _await_sshd(name: str, log: Path) -> None:
    wait_for(lambda: "Server listening" in log.read_text(), f"sshd of {name} listens")


def _make_key(path: Path) -> None:
    do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path))


@contextmanager
def _sshd(name: str, folder: Path, inside: Sequence[str], ahead_s: int) -> Iterator[None]:
    """A host's first process, which takes all others of the host with it."""
    assert SSHD
    script = BE_HOST.format(name=name, folder=folder, sshd=SSHD)
    own = ("unshare", "--uts", "--mount", "--pid", "--time", f"--monotonic={ahead_s}")
    command = [*inside, *own, "--fork", "--kill-child", "--mount-proc", "sh", "-c", script]
    with (folder / "sshd.log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def profile_arguments(found: SshHosts, *, python: str = sys.executable) -> list[str]:
    """`dinfer profile ssh …` for these hosts."""
    options = [f"--ssh-option={option}" for option in found.options]
    return ["profile", "ssh", *found.addresses, "--name=lab", f"--python={python}", *options]
