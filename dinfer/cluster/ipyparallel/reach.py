"""Other hosts as profiles reach them: asked before engines are started there, after a start that failed, and for an
engine in place of one that has ended."""

import json
import os
import shlex
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dinfer.cluster.ipyparallel.errors import ClusterError
from dinfer.cluster.ipyparallel.facts import SOURCE, EngineFacts, mismatches
from dinfer.cluster.ipyparallel.known import Known
from dinfer.cluster.ipyparallel.launcher import engine_log, remote_profile_dir
from dinfer.cluster.ipyparallel.profiles import Asked, Profile, ProfileHost, ssh_words
from dinfer.version import __version__

PROBE_S = 60.0
"""how long a host may take to import torch and dinfer"""

ANSWER = "dinfer-host "

_PROBE = f"""
import json, os, sys
sys.path[:] = [path for path in sys.path if path]  # engines, too, take no module of the folder in which they start
{SOURCE}
found = versions()
folder = os.path.expanduser({{folder!r}} or "~")
found["folder"] = folder if os.path.isdir(folder) else ""
print("{ANSWER}" + json.dumps(found))
"""
"""a program for a host's Python; braces are doubled where str.format is not meant"""


def check_hosts(profile: Profile, n: int) -> None:
    """Ask the hosts of the first `n` ranks of an ssh profile what they have. Raises ClusterError with a sentence for
    each that cannot be used. Slurm's nodes cannot be asked before the job runs."""
    if profile.kind != "ssh":
        return
    hosts = list(dict.fromkeys(profile.host_of(rank) for rank in range(n)))
    program = _PROBE.replace("{folder!r}", repr(profile.folder))
    try:
        asked = [
            Asked([*ssh_words(host.name, profile.ssh_args), shlex.quote(host.python), "-"], program)
            for host in hosts
        ]
    except OSError:
        raise ClusterError(
            "there is no ssh here: install OpenSSH's client (apt-get install openssh-client)."
        ) from None
    found, wrong = dict[str, dict[str, Any]](), []
    for host, one in zip(hosts, asked, strict=True):
        status, out, error = one.answer(PROBE_S)
        lines = [line for line in out.splitlines() if line.startswith(ANSWER)]
        if lines:
            found[f"host {host.name!r}"] = json.loads(lines[-1].removeprefix(ANSWER))
        else:
            wrong.append(unreachable(host, status, error))
    for name, answer in found.items():
        if not answer["folder"]:
            wrong.append(
                f"{name} has no folder {profile.folder}: make it there, or name another with --folder"
            )
    versions = mismatches(found, __version__)
    if versions:
        pythons = ", ".join(dict.fromkeys(host.python for host in hosts))
        versions[-1] += (
            f"; needed on each: Python {'.'.join(_own_python())}, torch of one release and dinfer {__version__}, "
            f"for {pythons}"
        )
    if wrong := [*wrong, *versions]:
        raise ClusterError(f"profile {profile.name!r} cannot start its engines: {'; '.join(wrong)}.")


def _own_python() -> tuple[str, str]:
    import platform

    major, minor, _ = platform.python_version_tuple()
    return major, minor


def unreachable(host: ProfileHost, status: int | None, error: str) -> str:
    """Why a host has given no answer, and what to do, by what ssh says."""
    name = host.name
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    said = lines[-1].rstrip(".") if lines else f"ended with status {status}"
    if status is None:
        return f"host {name!r} has not answered within {PROBE_S:g} s: is it up, and does `ssh {name} true` end there?"
    if "Could not resolve" in error:
        return (
            f"host {name!r} is unknown here (ssh: {said}): add it to ~/.ssh/config or /etc/hosts, or give its "
            "address"
        )
    if "Host key verification failed" in error or "HOST IDENTIFICATION HAS CHANGED" in error:
        return (
            f"host {name!r} shows a host key that is not known here, or another one than before: if that is right, "
            f"accept it once with `ssh {name}` in a terminal"
        )
    if "Permission denied" in error and status == 255:
        return (
            f"host {name!r} accepts no ssh key of yours (ssh: {said}): `ssh-copy-id {name}` puts one there; "
            f"`ssh {name} true` must ask for no password"
        )
    if status == 255:
        return f"host {name!r} cannot be reached (ssh: {said}): is it up, and does sshd run there?"
    if status in (126, 127):
        return (
            f"host {name!r} has no Python at {host.python} ({said}): give the one that has dinfer with "
            f"--python {name}=PATH"
        )
    return f"host {name!r} cannot run {host.python} (it says: {said})"


# -- what became of a start


def why_not_started(profile: Profile, cluster: Known, n: int) -> str:
    """What is known of engines that have not come, as the end of a message; "" for nothing."""
    if profile.kind == "slurm":
        return _job_state(cluster)
    found, hosts = [], [profile.host_of(rank).name for rank in range(n)]
    folders = [remote_profile_dir(str(cluster.profile_dir), host) for host in hosts]
    logs = [engine_log(folder, cluster.cluster_id, rank) for rank, folder in enumerate(folders)]
    asked = [
        Asked([*ssh_words(host, profile.ssh_args), "tail", "-n", "3", shlex.quote(log)], "")
        for host, log in zip(hosts, logs, strict=True)
    ]
    for rank, one in enumerate(asked):
        if out := one.answer(PROBE_S)[1].strip():
            found.append(f" On {hosts[rank]}, the log of rank {rank} ends: {' / '.join(out.splitlines())}.")
    return "".join(found)


def _job_state(cluster: Known) -> str:
    asked = ["squeue", "--noheader", f"--name={cluster.cluster_id}", "--format=%i is %T (%r)"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=PROBE_S).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
    if "PENDING" not in said:
        return ""
    return f" Slurm's job {said}: wait longer with connect(…, timeout=SECONDS), or ask for less."


# -- in place of an engine that has ended


class StartedAgain(NamedTuple):
    """What starts one engine again. `process`: Slurm's srun, which lasts as long as the engine; None for ssh."""

    process: "subprocess.Popen[bytes] | None" = None
    log: Path | None = None

    def ended(self) -> str | None:
        """Why the engine has ended, as far as is known here; None while it has not."""
        if self.process is None or self.process.poll() is None:
            return None
        lines = self.log.read_text(errors="replace").splitlines() if self.log and self.log.exists() else []
        return " / ".join(lines[-3:]) or f"srun ended with status {self.process.returncode}"

    def end(self) -> None:
        if self.process:
            self.process.terminate()


def start_again(facts: EngineFacts, started_by: str, ssh_args: Sequence[str]) -> StartedAgain:
    """Start an engine like one that has ended, by what has started that. Raises ClusterError."""
    environment, rank = dict(facts.environment), facts.environment["RANK"]
    command = [facts.executable, "-m", "dinfer.cluster.ipyparallel.remote", f"--work-dir={facts.folder}"]
    log = Path(engine_log(environment["IPP_PROFILE_DIR"], environment.get("IPP_CLUSTER_ID", ""), rank))
    if started_by == "slurm":
        return _start_step(command, environment, log)
    from ipyparallel.cluster.shellcmd import ShellCommandSend

    ssh, *words = ssh_words(started_by.removeprefix("ssh "), ssh_args)
    try:
        shell = ShellCommandSend([ssh], words, facts.executable)
        shell.cmd_start(command, env=environment, output_file=str(log))
    except Exception as error:  # whatever it raises
        raise ClusterError(f"no engine could be started again by `{started_by}`: {error}") from error
    return StartedAgain()


def _start_step(command: Sequence[str], environment: dict[str, str], log: Path) -> StartedAgain:
    """As one more step of the job, on the node of the engine before."""
    job, node = environment["SLURM_JOB_ID"], environment["SLURMD_NODENAME"]
    srun = [
        "srun",
        f"--jobid={job}",
        f"--nodelist={node}",
        "--nodes=1",
        "--ntasks=1",
        "--overlap",
        "--unbuffered",
    ]
    # srun would take the job's own sizes from these.
    kept = {name: value for name, value in environment.items() if not name.startswith("SLURM")}
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*srun, *command],
                env={**os.environ, **kept},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
    except OSError as error:
        raise ClusterError(f"no engine could be started again in job {job}: {error}") from error
    # It lasts as long as the engine, and nobody else collects it.
    threading.Thread(target=process.wait, name=f"dinfer srun {process.pid}", daemon=True).start()
    return StartedAgain(process, log)
