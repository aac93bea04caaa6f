"""Runs programs under `dinfer watch` as a user does, and reads what it says of them."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from dinfer.lab.hosts import LabNetwork
from tests.support.runs import free_ports

PROGRAMS = Path(__file__).parent / "programs"
REPOSITORY = Path(__file__).parent.parent.parent

PATIENCE_S = 120.0


class WatchedRun(NamedTuple):
    """What came of it: `told` as `--json` has it, `errors` what was on standard error; `told_s`: how long it took from
    the program's line `DEFECT` on until the verdict was said, None where none was."""

    told: dict[str, Any]
    errors: str
    output: str
    status: int
    told_s: float | None


def torchrun(program: str, *arguments: str, n: int = 2) -> list[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n), "--master-port", "0"]
    return [*start, "--standalone", str(PROGRAMS / program), *arguments]


def mpirun(program: str, *arguments: str, n: int = 2) -> list[str]:
    """Open MPI refuses root, and more ranks than cores, unless told not to; the place to meet has to be given."""
    place = ("env", "MASTER_ADDR=127.0.0.1", f"MASTER_PORT={free_ports(1)}")
    start = ("mpirun", "--allow-run-as-root", "--oversubscribe", "-n", str(n))
    return [*place, *start, sys.executable, str(PROGRAMS / program), *arguments]


def accelerate(program: str, *arguments: str, folder: Path, n: int = 2) -> list[str]:
    """Without GPUs it has mpirun start the ranks, no more than there are cores."""
    slots = folder / "hosts"
    slots.write_text(f"localhost slots={n}\n")
    root = ("env", "OMPI_ALLOW_RUN_AS_ROOT=1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1")
    start = (
        *root,
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--mpirun_hostfile",
        str(slots),
    )
    how = (
        "--num_processes",
        str(n),
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    )
    return [*start, *how, str(PROGRAMS / program), *arguments]


def on_hosts(network: LabNetwork, program: str, *arguments: str) -> list[str]:
    """Each rank on a host of its own; they meet at the first. The environment has in CUT what cuts the first wire."""
    first, world = network.hosts[0], len(network.hosts)
    cut = f"CUT={shlex.join(network.cut(0, 1))}"
    meet = (f"MASTER_ADDR={first.address}", "MASTER_PORT=29500", f"WORLD_SIZE={world}", cut)
    command = (sys.executable, str(PROGRAMS / program), *arguments)
    ranks = [
        shlex.join(host.inside("env", f"RANK={rank}", *meet, "GLOO_SOCKET_IFNAME=eth0", *command))
        for rank, host in enumerate(network.hosts)
    ]
    return ["bash", "-c", f"{' & '.join(ranks)} & trap 'kill $(jobs -p)' TERM; wait"]


def watch(command: Sequence[str], folder: Path, *options: str, patience_s: float = PATIENCE_S) -> WatchedRun:
    """Run a command under watch. Once it is said to hang, or has run `patience_s`, it is ended by SIGTERM, as a user
    would."""
    told = folder / "told.json"
    watching = [
        sys.executable,
        "-m",
        "dinfer.cli",
        "watch",
        "--folder",
        str(folder / "watch"),
        "--json",
        str(told),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH", "")))
    )
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with own_session([*watching, *options, "--", *command], env=environment, **piped) as process:
        assert process.stderr
        assert process.stdout
        output: list[tuple[float, str]] = []
        reader = threading.Thread(target=_read, args=(process.stdout, output))
        reader.start()
        killer = threading.Timer(patience_s, process.send_signal, [signal.SIGTERM])
        killer.start()
        errors, said = [], None
        for line in process.stderr:
            errors.append(line)
            if line.startswith("dinfer: ✖") and said is None:
                said = time.monotonic()
                process.send_signal(signal.SIGTERM)
        status = process.wait(PATIENCE_S)
        killer.cancel()
        reader.join(PATIENCE_S)
    text = "".join(errors)
    began = [at for at, line in output if line.startswith("DEFECT")]
    took = said - max(began) if said and began else None
    assert told.is_file(), text
    return WatchedRun(json.loads(told.read_text()), text, "".join(line for _, line in output), status, took)


def _read(stream: Any, into: list[tuple[float, str]]) -> None:
    for line in stream:
        into.append((time.monotonic(), line))


@contextmanager
def own_session(command: Sequence[str], **given: Any) -> Iterator["subprocess.Popen[Any]"]:
    """A process in a session of its own, all of which has ended afterwards; `given`: what Popen takes."""
    process = subprocess.Popen(command, start_new_session=True, **given)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream:
                stream.close()
