"""Facts about engines: process, host and versions. Asked for once; versions are checked before anything else runs."""

import os
import platform
import socket
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from dinfer.cluster.ipyparallel.calls import Calls, call_expression, source_expression, submit
from dinfer.cluster.ipyparallel.errors import ClusterError
from dinfer.cluster.ipyparallel.identity import Identity
from dinfer.version import __version__

VERSIONS = """
def versions():
    import platform
    found = {"python": platform.python_version(), "dinfer": "", "torch": "", "cuda": 0}
    try:
        import dinfer
        found["dinfer"] = str(dinfer.__version__)
    except Exception as error:
        found["no dinfer"] = "%s: %s" % (type(error).__name__, error)
    try:
        import torch
        found["torch"], found["cuda"] = str(torch.__version__), torch.cuda.device_count()
    except Exception as error:
        found["no torch"] = "%s: %s" % (type(error).__name__, error)
    return found
"""
"""sent as text, since an engine may run another Python, without dinfer"""


@dataclass(frozen=True)
class EngineFacts:
    """One rank's engine."""

    rank: int
    engine_id: int
    host: str
    pid: int
    python: str
    dinfer: str
    torch: str
    cuda: int
    """number of visible CUDA devices"""
    cores: int
    """number of cores that it may use"""
    address: str
    """at which the controller's host, and so other hosts, reach it"""
    network: str
    """its network namespace, "" if unknown: each container has its own, with its own loopback"""
    executable: str
    folder: str
    """its working directory"""
    process: Identity = field(repr=False)
    environment: Mapping[str, str] = field(repr=False)
    """the environment it was started with, for an engine that replaces it"""

    @property
    def loopback(self) -> tuple[str, str, str]:
        """Engines with equal values reach one another on loopback, and no other machine reaches them there."""
        return self.process.host, self.process.boot, self.network


def own_facts(controller: str) -> dict[str, Any]:
    """Runs on the engine. `controller`: the controller's address as other hosts see it."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "cores": cores,
        "address": _address(controller),
        "network": _network(),
        "executable": sys.executable,
        "folder": os.getcwd(),
        "process": asdict(Identity.of(os.getpid())),
        "environment": dict(os.environ),
    }


def own_loopback() -> tuple[str, str, str]:
    """`EngineFacts.loopback` of this process."""
    own = Identity.of(os.getpid())
    return own.host, own.boot, _network()


def facts_of(rank: int, engine_id: int, versions: Mapping[str, Any], own: Mapping[str, Any]) -> EngineFacts:
    """One rank's facts from the results of its two calls."""
    known = {name: versions[name] for name in ("python", "dinfer", "torch", "cuda")}
    return EngineFacts(rank, engine_id, **{**known, **own, "process": Identity(**own["process"])})


def judge_versions(engines: Mapping[int, Mapping[str, Any]], dinfer: str) -> None:
    """`engines`: results of `versions` by id; `dinfer`: the client's version. Raises ClusterError that names all
    mismatches."""
    wrong = [f"engine {i} {fault}" for i, found in engines.items() for fault in _faults(found, dinfer)]
    if wrong:
        raise ClusterError(
            f"not all engines can be used: {'; '.join(wrong)}. Start the cluster, on every host, from the "
            f"environment of this client (Python {platform.python_version()}, dinfer {dinfer})."
        )


def _faults(found: Mapping[str, Any], dinfer: str) -> list[str]:
    faults = []
    mine = platform.python_version()
    if _minor(found["python"]) != _minor(mine):
        faults.append(f"runs Python {found['python']}, not {_minor(mine)}")
    if "no dinfer" in found:
        faults.append(f"has no dinfer ({found['no dinfer']})")
    elif found["dinfer"] != dinfer:
        faults.append(f"has dinfer {found['dinfer']}, not {dinfer}")
    if "no torch" in found:
        faults.append(f"has no torch ({found['no torch']})")
    return faults


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _address(controller: str) -> str:
    from dinfer.transport.interface import own_address_towards

    try:
        return own_address_towards(controller)
    except OSError:
        return socket.gethostname()


def _network() -> str:
    try:
        return os.readlink("/proc/self/ns/net")
    except OSError:
        return ""


def introduce(client: Any, engines: Mapping[int, int], controller: str, timeout: float) -> list[EngineFacts]:
    """The facts of all ranks. `engines`: id by rank; `controller`: its address. Raises ClusterError, RankError.

    Versions are checked first: an engine with another dinfer may not know the second function.
    """
    versions = _ask(client, engines, source_expression(VERSIONS, "versions"), timeout)
    judge_versions({engines[rank]: found for rank, found in versions.items()}, __version__)
    question = call_expression("dinfer.cluster.ipyparallel.facts:own_facts", [controller])
    own = _ask(client, engines, question, timeout)
    return [facts_of(rank, engine_id, versions[rank], own[rank]) for rank, engine_id in engines.items()]


def _ask(client: Any, engines: Mapping[int, int], expression: str, timeout: float) -> dict[int, Any]:
    names = {rank: f"engine {engine_id}" for rank, engine_id in engines.items()}
    calls = Calls({r: submit(client, i, expression, r, names[r]) for r, i in engines.items()}, names)
    return dict(zip(engines, calls.result(timeout), strict=True))
