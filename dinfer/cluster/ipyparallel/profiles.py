"""Profiles that start engines on other hosts, by ssh or Slurm: writes them, and reads what their config says.

Such a profile is an ordinary one of ipyparallel, which `ipcluster start --profile=NAME` starts too: its config names
launchers that are ipyparallel's own but for the rank of each engine (see launcher). The config is all there is, so that
a change made there by hand counts.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from dinfer.cluster.ipyparallel.errors import ClusterError
from dinfer.cluster.ipyparallel.launcher import SlurmRankSetLauncher, SSHRankSetLauncher
from dinfer.config import ConfigError
from dinfer.transport.interface import own_address_towards

CONFIG, CONTROLLER_CONFIG = "ipcluster_config.py", "ipcontroller_config.py"

MARK = "# Written by `dinfer profile"
"""the beginning of each file that `dinfer profile` may write again"""

ASK_S = 20.0
"""how long ssh and Slurm's commands may take to answer"""

BATCH = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=15", "-o", "ControlMaster=no")
"""ssh asks for no password, which nobody could type, does not wait minutes for a host that is down, and leaves no
connection behind, which would hold its output; one that is there is used"""

KILLED_S = 2.0
"""how long the output of a command that has been killed is awaited: what it has started may hold it"""


OWN_OPTIONS = {
    "--job-name": "and is the id of the cluster, by which its job is found and ended",
    "--ntasks": "and is the number of engines: -n of `dinfer profile slurm` gives it",
    "--array": "which starts all engines as one job, whose tasks have the numbers of ranks",
    "--output": "and leads into the profile's log folder, from where `dinfer clean` removes it",
    "--export": "which hands the environment of `connect` on to engines, and with it where their controller is",
}
"""options of sbatch that a profile sets itself, or must not have, and why"""


class ProfileHost(NamedTuple):
    """A host of an ssh profile. `name`: as ssh takes it, such as alpha or user@10.0.0.2:2222."""

    name: str
    engines: int
    python: str


@dataclass(frozen=True)
class Profile:
    """What the config of a profile says of its engines. `python`, `folder`: of Slurm's nodes; on hosts, `folder` is the
    engines' working folder, "" for the user's home."""

    name: str
    kind: Literal["ssh", "slurm"]
    n: int
    folder: str
    hosts: tuple[ProfileHost, ...] = ()
    ssh_args: tuple[str, ...] = ()

    @classmethod
    def read(cls, profile_dir: Path) -> Self | None:
        """None for a profile that starts its engines in another way. Raises ClusterError for a config that is none."""
        if not (profile_dir / CONFIG).is_file():
            return None
        from traitlets.config.loader import PyFileConfigLoader

        try:
            config = PyFileConfigLoader(CONFIG, path=str(profile_dir)).load_config()
        except Exception as error:  # it is a program: whatever that raises
            raise ClusterError(
                f"{profile_dir / CONFIG} cannot be read: {type(error).__name__}: {error}. Mend it, or write it anew "
                "with `dinfer profile`."
            ) from None
        name, cluster = profile_dir.name.removeprefix("profile_"), config.Cluster
        launcher = cluster.get("engine_launcher_class")
        arguments = map(str, config.EngineLauncher.get("engine_args", []))
        folder = next((word.partition("=")[2] for word in arguments if word.startswith("--work-dir=")), "")
        if launcher == SlurmRankSetLauncher.entrypoint_name:
            return cls(name, "slurm", int(cluster.get("n", 1)), folder)
        if launcher != SSHRankSetLauncher.entrypoint_name:
            return None
        python = str(config.SSHLauncher.get("remote_python", "python3"))
        engines = config.SSHEngineSetLauncher.get("engines", {})
        hosts = tuple(_host(host, given, python) for host, given in engines.items())
        ssh_args = tuple(map(str, config.SSHLauncher.get("ssh_args", [])))
        return cls(name, "ssh", sum(host.engines for host in hosts), folder, hosts, ssh_args)

    def check_size(self, n: int) -> None:
        """Raises ClusterError where fewer than `n` engines would be started."""
        if n > self.n:
            where = f": {', '.join(_counted(host) for host in self.hosts)}" if self.hosts else ""
            raise ClusterError(
                f"n is {n}, but profile {self.name!r} starts {self.n} engine{'s' * (self.n > 1)}{where}. Use "
                f"n={self.n}, or write the profile anew with `dinfer profile {self.kind} …`."
            )

    def host_of(self, rank: int) -> ProfileHost:
        """The host of an ssh profile on which a rank's engine is started."""
        return [host for host in self.hosts for _ in range(host.engines)][rank]


def _host(name: str, given: Any, python: str) -> ProfileHost:
    own = given if isinstance(given, Mapping) else {"n": given}
    return ProfileHost(name, int(own.get("n", 1)), str(own.get("remote_python", python)))


def _counted(host: ProfileHost) -> str:
    return host.name if host.engines == 1 else f"{host.name} × {host.engines}"


def ssh_words(host: str, ssh_args: Sequence[str]) -> list[str]:
    """The command that reaches a host of an ssh profile, as ipyparallel would: the port may stand behind a colon."""
    where, _, port = host.partition(":")
    return ["ssh", *ssh_args, *(["-p", port] if port else []), where]


class Asked:
    """A command that has been given its input, and whose answer is awaited: several hosts are asked at once."""

    def __init__(self, words: Sequence[str], text: str) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        self._began = time.monotonic()
        self._found = ("", "")
        self._thread = threading.Thread(target=self._talk, args=(text,), daemon=True)
        self._thread.start()

    def _talk(self, text: str) -> None:
        self._found = self._process.communicate(text)

    def answer(self, timeout: float) -> tuple[int | None, str, str]:
        """The exit status, None where it takes more than `timeout` seconds from its start on, and then is ended; what
        it has said on its output, and on its error output."""
        self._thread.join(max(0.0, self._began + timeout - time.monotonic()))
        if self._thread.is_alive():
            self._process.kill()
            self._thread.join(KILLED_S)
            return None, *self._found
        return self._process.returncode, *self._found


# -- writing


@dataclass(frozen=True)
class Written:
    """What `dinfer profile` has written."""

    profile: Profile
    files: tuple[Path, ...]
    address: str
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        profile = self.profile
        if profile.hosts:
            first, lines = 0, []
            for host in profile.hosts:
                last = first + host.engines - 1
                ranks = f"rank {first}" if first == last else f"ranks {first}–{last}"
                lines.append(f"  {ranks} on {host.name}, by {host.python}")
                first = last + 1
        else:
            lines = [
                f"  ranks 0–{profile.n - 1} as one Slurm job" if profile.n > 1 else "  rank 0 as a Slurm job"
            ]
        lines.append(f"  engines meet the controller at {self.address}, encrypted (CurveZMQ)")
        lines += [f"  wrote {path}" for path in self.files]
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(
            [
                f"profile {profile.name!r}: {profile.n} engine{'s' * (profile.n > 1)}",
                *lines,
                "next, in a notebook; it starts the engines, or joins them:",
                f'  session = dinfer.connect(profile="{profile.name}")',
                "or first, in a terminal, for engines that outlive the notebook:",
                f"  ipcluster start --profile={profile.name}",
            ]
        )


def parse_hosts(words: Sequence[str], engines: int, pythons: Sequence[str]) -> tuple[ProfileHost, ...]:
    """Hosts as `dinfer profile ssh` takes them. `pythons`: PATH for all, HOST=PATH for one. Raises ConfigError."""
    if engines < 1:
        raise ConfigError(
            f"--engines is {engines}; it must be at least 1: how many engines each host starts."
        )
    if repeated := sorted({word for word in words if words.count(word) > 1}):
        raise ConfigError(
            f"{', '.join(repeated)} is given more than once; name each host once, and give --engines for several each."
        )
    for word in words:
        if not re.fullmatch(r"([\w.-]+@)?[\w.-]*\w[\w.-]*(:\d+)?", word) or word.startswith("-"):
            raise ConfigError(
                f"{word!r} is no host; give a name or address as ssh takes it: [USER@]HOST[:PORT]."
            )
    common, own = sys.executable, dict[str, str]()
    for python in pythons:
        host, equals, path = python.partition("=")
        if equals and host not in words:
            raise ConfigError(f"--python is {python!r}, but {host} is none of the hosts: {', '.join(words)}.")
        if equals:
            own[host] = path
        else:
            common = python
    return tuple(ProfileHost(word, engines, own.get(word, common)) for word in words)


def address_towards(host: str, ssh_args: Sequence[str]) -> str:
    """This machine's address as a host of an ssh profile sees it. Raises ClusterError for a host that is unknown, and
    for options that ssh does not take."""
    name = host.rpartition("@")[2].partition(":")[0]
    *words, where = ssh_words(host, ssh_args)
    try:  # by ssh's own config: a host may be an alias
        done = subprocess.run([*words, "-G", where], capture_output=True, text=True, timeout=ASK_S)
    except OSError:
        raise ClusterError(
            "there is no ssh here: install OpenSSH's client (apt-get install openssh-client)."
        ) from None
    except subprocess.TimeoutExpired:
        raise ClusterError(
            f"ssh has not read its config for host {host!r} within {ASK_S:g} s: `ssh -G {where}` must end. Does a "
            "`Match exec` in ~/.ssh/config wait?"
        ) from None
    if done.returncode:
        said = " / ".join(line.strip() for line in done.stderr.splitlines() if line.strip())
        raise ClusterError(
            f"ssh refuses what it is given for host {host!r} ({said.rstrip('.')}): mend --ssh-option, NAME=VALUE as in "
            "`man ssh_config`, or ~/.ssh/config."
        )
    found = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    name = found.get("hostname", name)
    try:
        return own_address_towards(name)
    except OSError as error:
        raise ClusterError(
            f"host {host!r} is unknown here: {name} has no address ({error}). Add it to ~/.ssh/config or /etc/hosts, "
            "or give its address."
        ) from None


def write_ssh(
    profile_dir: Path,
    hosts: Sequence[ProfileHost],
    *,
    folder: str = "",
    ssh_args: Sequence[str] = (),
    address: str = "",
) -> Written:
    """Write a profile whose engines are started by ssh. `ssh_args`: such as scp takes too, -o NAME=VALUE. Raises
    ClusterError, ConfigError, OSError."""
    ssh_args = (*BATCH, *ssh_args)
    address = address or address_towards(hosts[0].name, ssh_args)
    python = hosts[0].python
    engines = {
        host.name: host.engines
        if host.python == python
        else {"n": host.engines, "remote_python": host.python}
        for host in hosts
    }
    n = sum(host.engines for host in hosts)
    lines = [
        f"c.Cluster.engine_launcher_class = {SSHRankSetLauncher.entrypoint_name!r}",
        f"c.Cluster.n = {n}",
        "# The ranks follow this order. A number of engines, or a dict: n, remote_python, remote_profile_dir, …",
        f"c.SSHEngineSetLauncher.engines = {engines!r}",
        f"c.SSHLauncher.remote_python = {python!r}",
        f"c.SSHLauncher.ssh_args = {list(ssh_args)!r}",
        f"c.SSHLauncher.scp_args = {list(ssh_args)!r}",
    ]
    command = f"ssh {' '.join(host.name for host in hosts)}"
    return _write(profile_dir, command, lines, address, folder)


def write_slurm(
    profile_dir: Path,
    n: int,
    *,
    python: str = "",
    folder: str = "",
    address: str = "",
    options: Sequence[str] = (),
) -> Written:
    """Write a profile whose engines are the tasks of one Slurm job. `options`: of sbatch, such as --partition=gpu or
    --gpus-per-task=1. Raises ClusterError, ConfigError, OSError."""
    if n < 1:
        raise ConfigError(f"-n is {n}; it must be at least 1: how many engines the job starts.")
    for option in options:
        if not re.fullmatch(r"--?[a-zA-Z][\w-]*(=[^\n{}]*)?", option):
            raise ConfigError(
                f"{option!r} is no option of sbatch; give it as --name=value, such as --partition=gpu."
            )
        if own := _own_option(option):
            raise ConfigError(
                f"{option!r} cannot be given: {own} is dinfer's, {OWN_OPTIONS[own]}. Leave it out."
            )
    notes = []
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise ClusterError(
            "there is no sbatch or srun here: run this where jobs are submitted, a login node of Slurm for example."
        )
    address = address or _address_towards_nodes()
    if not any(option.startswith(("--gpu", "--gres", "-G")) for option in options):
        notes.append(
            "no GPUs are asked for: --option=--gpus-per-task=1 gives each engine one, where nodes have GPUs"
        )
    lines = [
        f"c.Cluster.engine_launcher_class = {SlurmRankSetLauncher.entrypoint_name!r}",
        f"c.Cluster.n = {n}",
        f"c.EngineLauncher.engine_cmd = {[python or sys.executable, '-m', 'dinfer.cluster.ipyparallel.remote']!r}",
        "c.SlurmLauncher.batch_template = (",
        *(f"    {line + chr(10)!r}" for line in batch_script(options)),
        ")",
    ]
    written = _write(profile_dir, f"slurm -n {n}", lines, address, folder or os.getcwd())
    return Written(written.profile, written.files, address, tuple(notes))


def _own_option(option: str) -> str:
    """Which of OWN_OPTIONS a word for sbatch is, "" for none: the last one in a job's script would win. sbatch takes
    the beginning of a name for the name, and -J, -n, -a, -o."""
    given = option.partition("=")[0]
    if not given.startswith("--"):
        return {"J": "--job-name", "n": "--ntasks", "a": "--array", "o": "--output"}.get(given[1], "")
    return next((own for own in OWN_OPTIONS if own.startswith(given)), "")


def batch_script(options: Sequence[str]) -> list[str]:
    """The lines of a job's script, with ipyparallel's names in braces. One rank that dies ends no other."""
    return [
        "#!/bin/sh",
        "#SBATCH --job-name={cluster_id or 'dinfer'}",
        "#SBATCH --ntasks={n}",
        "#SBATCH --export=ALL,PYTHONSAFEPATH=1",
        "#SBATCH --output={output_file}",
        *(f"#SBATCH {option}" for option in options),
        "srun --kill-on-bad-exit=0 --wait=0 {program_and_args}",
    ]


def _address_towards_nodes() -> str:
    """This machine's address as Slurm's nodes see it. Raises ClusterError."""
    asked = ["sinfo", "--noheader", "--Node", "--format=%o"]  # addresses
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=ASK_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ClusterError(f"Slurm does not answer here: {error}.") from None
    if done.returncode:
        raise ClusterError(f"Slurm does not answer here: sinfo says: {done.stderr.strip()}")
    for node in dict.fromkeys(done.stdout.split()):
        with suppress(OSError):
            return own_address_towards(node)
    return socket.gethostname()


def _write(profile_dir: Path, command: str, lines: Sequence[str], address: str, folder: str) -> Written:
    """Write both files. Raises ConfigError for files there that are somebody else's."""
    top = f"{MARK} {command}`, which may write it again; ipcluster reads it.\nc = get_config()  # noqa\n"
    listen = [f"c.Cluster.controller_ip = {address!r}", f"c.Cluster.controller_location = {address!r}"]
    if folder:
        listen.append(f"c.EngineLauncher.engine_args = {[f'--work-dir={folder}']!r}")
    controller = "c.IPController.enable_curve = True  # all messages are encrypted; the key is in the connection file\n"
    texts = {
        profile_dir / CONFIG: top + "\n".join([*listen, *lines]) + "\n",
        profile_dir / CONTROLLER_CONFIG: top + controller,
    }
    for path in texts:
        if path.exists() and path.read_text(encoding="utf-8").strip() and not _is_ours(path):
            raise ConfigError(
                f"{path} exists, and `dinfer profile` has not written it: choose another --name, or remove it."
            )
    profile_dir.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    profile = Profile.read(profile_dir)
    assert profile is not None
    return Written(profile, tuple(texts), address)


def _is_ours(path: Path) -> bool:
    return path.read_text(encoding="utf-8").startswith(MARK)
