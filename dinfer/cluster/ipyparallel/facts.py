"""Facts about engines: process, host and versions. Asked for once; versions are checked before anything else runs."""

import os
import platform
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dinfer.cluster.ipyparallel.calls import call_expression, evaluate
from dinfer.cluster.ipyparallel.errors import ClusterError
from dinfer.cluster.ipyparallel.identity import Identity, namespace
from dinfer.display import few
from dinfer.verdict.where import rank_spans_text
from dinfer.version import __version__

SOURCE = """
def versions():
    import importlib.machinery, os, platform, socket, sys, threading
    found = {"python": platform.python_version(), "dinfer": "", "cuda": 0, "hidden": [], "stuck": ""}
    found.update(host=socket.gethostname(), torch="", cpu=platform.machine())
    needed = (
        "torch", "transformers", "tokenizers", "safetensors", "numpy", "msgspec", "psutil", "zmq", "huggingface_hub",
        "regex", "tqdm", "yaml", "filelock", "packaging", "requests", "httpx", "jinja2", "sympy", "networkx", "fsspec",
        "typing_extensions", "ipykernel", "ipyparallel", "tornado", "traitlets",
    )
    folder = os.getcwd()
    elsewhere = [path for path in sys.path if path and os.path.abspath(path) != folder]
    own, hiding = {}, {}
    for entry in sorted(os.listdir(folder)):
        name, ending = os.path.splitext(entry)
        file = os.path.join(folder, entry) if ending == ".py" else os.path.join(folder, entry, "__init__.py")
        if name.isidentifier() and ending in (".py", "") and os.path.isfile(file):
            spec = importlib.machinery.PathFinder.find_spec(name)
            if spec and spec.origin == file:
                own[name] = file
    for name, file in own.items():
        other = importlib.machinery.PathFinder.find_spec(name, elsewhere)
        # Which dinfer it is, its version says.
        if name != "dinfer" and (name in getattr(sys, "stdlib_module_names", ()) or (other and other.origin)):
            hiding[name] = file
    found["hidden"] = [hiding[name] for name in needed if name in hiding]
    if found["hidden"]:
        return found

    def take():
        try:
            import dinfer
            found["dinfer"] = str(dinfer.__version__)
        except Exception as error:
            found["no dinfer"] = "%s: %s" % (type(error).__name__, error)
        try:
            import torch
            found["cuda"] = torch.cuda.device_count()
            found["torch"] = str(torch.__version__)
            found["cpu"] += " " + torch.backends.cpu.get_cpu_capability()
        except Exception as error:
            found["no torch"] = "%s: %s" % (type(error).__name__, error)

    # On a thread of its own, so that a file that an import takes and that does not end can be named.
    thread, looks = threading.Thread(target=take, daemon=True), {}
    thread.start()
    while thread.is_alive():
        thread.join(1.0)
        frame, files = sys._current_frames().get(thread.ident), set()
        while frame:
            files.add(frame.f_code.co_filename)
            frame = frame.f_back
        for name, file in hiding.items():
            looks[file] = looks.get(file, 0) + 1 if file in files else 0
            if looks[file] == 8:
                return dict(found, stuck=file)
    # A file of such a name matters where an import has taken it; one that raises leaves no trace.
    taken = [file for name, file in hiding.items() if getattr(sys.modules.get(name), "__file__", "") == file]
    failed = "no dinfer" in found or "no torch" in found
    found["hidden"] = taken or (list(hiding.values()) if failed else [])
    try:  # ARM says no name there
        with open("/proc/cpuinfo") as file:
            name = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")
        found["cpu"] += " (%s)" % name if name else ""
    except OSError:
        pass
    return found
"""

VERSIONS = f"(lambda names: (exec({SOURCE!r}, names), names['versions']())[1])({{}})"
"""evaluated on an engine, which may run another Python, without dinfer; defines no names there"""


@dataclass(frozen=True)
class EngineFacts:
    """One rank's engine. `cuda`: the number of visible CUDA devices; `torch`: its version; `cpu`: machine, the
    instructions that torch uses, and name; `address`: at which the controller's host, and so other hosts, reach it;
    `network`: its network namespace, "" if unknown: each container has its own, with its own
    loopback; `folder`: its working directory; `environment`: what it was started with, for an engine that replaces it.
    """

    engine_id: int
    cuda: int
    torch: str
    cpu: str
    address: str
    network: str
    executable: str
    folder: str
    process: Identity
    environment: Mapping[str, str] = field(repr=False)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def host(self) -> str:
        return self.process.host

    @property
    def loopback(self) -> tuple[str, str, str]:
        """Engines with equal values reach one another on loopback, and no other machine reaches them there."""
        return self.process.host, self.process.boot, self.network


def own_loopback() -> tuple[str, str, str]:
    """`EngineFacts.loopback` of this process."""
    own = Identity.of(os.getpid())
    return own.host, own.boot, namespace("net")


def own_facts(controller: str) -> dict[str, Any]:
    """Runs on the engine. `controller`: the controller's address as other hosts see it."""
    from dinfer.transport.interface import own_address_towards

    try:
        address = own_address_towards(controller)
    except OSError:
        address = socket.gethostname()
    return {
        "address": address,
        "network": namespace("net"),
        "executable": sys.executable,
        "folder": os.getcwd(),
        "process": asdict(Identity.of(os.getpid())),
        "environment": dict(os.environ),
    }


def introduce(client: Any, engines: Mapping[int, int], controller: str, timeout: float) -> list[EngineFacts]:
    """The facts of all ranks. `engines`: id by rank; `controller`: its address. Raises ClusterError, RankError.

    Versions are checked first: an engine with another dinfer may not know the second function.
    """
    names = {rank: f"engine {engine_id}" for rank, engine_id in engines.items()}
    versions = evaluate(client, VERSIONS, engines, names).result(timeout)
    judge_versions(dict(zip(engines.values(), versions, strict=True)), __version__)
    question = call_expression("dinfer.cluster.ipyparallel.facts:own_facts", [controller])
    found = evaluate(client, question, engines, names).result(timeout)
    return [
        EngineFacts(
            engine_id,
            known["cuda"],
            known["torch"],
            known["cpu"],
            **{**own, "process": Identity(**own["process"])},
        )
        for engine_id, known, own in zip(engines.values(), versions, found, strict=True)
    ]


def judge_versions(engines: Mapping[int, Mapping[str, Any]], dinfer: str) -> None:
    """`engines`: by id, what VERSIONS gave; `dinfer`: the client's version. Raises ClusterError that names all
    mismatches."""
    hosts = {found.get("host", "") for found in engines.values()}
    named = {
        f"engine {engine_id}" + f" on {found.get('host')}" * (len(hosts) > 1): found
        for engine_id, found in engines.items()
    }
    if wrong := mismatches(named, dinfer):
        raise ClusterError(
            f"not all engines can be used: {'; '.join(wrong)}. Start the cluster, on every host, from the "
            f"environment of this client (Python {platform.python_version()}, dinfer {dinfer})."
        )


def mismatches(engines: Mapping[str, Mapping[str, Any]], dinfer: str) -> list[str]:
    """What keeps engines, or hosts, from being used together, a clause for each. `engines`: by name, what VERSIONS
    gave; `dinfer`: this process's version."""
    minor = platform.python_version().rpartition(".")[0]
    wrong = []
    first, torch = next(
        ((name, found["torch"]) for name, found in engines.items() if found.get("torch")), ("", "")
    )
    for engine, found in engines.items():
        if found["python"].rpartition(".")[0] != minor:
            wrong.append(f"{engine} runs Python {found['python']}, not {minor}")
        if hidden := found["hidden"]:
            wrong.append(
                f"{engine} takes {', '.join(few(hidden))} for the package or module of that name: rename it"
            )
        elif stuck := found["stuck"]:
            wrong.append(
                f"{engine} does not come to the end of {stuck}, which it takes for the package or module of that name: "
                "rename it, and start that engine again"
            )
        elif "no dinfer" in found:
            wrong.append(f"{engine} has no dinfer ({found['no dinfer']})")
        elif found["dinfer"] != dinfer:
            wrong.append(f"{engine} has dinfer {found['dinfer']}, not {dinfer}")
        if "no torch" in found:
            wrong.append(f"{engine} has no torch ({found['no torch']})")
        elif _release(found.get("torch", "")) != _release(torch):
            wrong.append(
                f"{engine} has torch {found['torch']}, but {first} has {torch}: ranks need one release"
            )
    return wrong


def _release(torch: str) -> str:
    """A version without its build: 2.13.0 of 2.13.0+cu130."""
    return torch.partition("+")[0]


def differences(engines: Sequence[EngineFacts]) -> str:
    """What ranks may differ in, but should better not, as the end of a line; "" where they do not."""
    found = []
    for what, name in (("torch", "builds of torch"), ("cpu", "CPUs")):
        kinds: dict[str, list[int]] = {}
        for rank, one in enumerate(engines):
            kinds.setdefault(getattr(one, what), []).append(rank)
        if len(kinds) > 1:
            each = ", ".join(f"{kind} on {rank_spans_text(ranks)}" for kind, ranks in kinds.items())
            found.append(f"different {name}: {each}")
    if not found:
        return ""
    return f"; {'; '.join(found)}: the last bits of what they compute may differ, and so may new tokens"
