"""`dinfer doctor`: runs every check, then prints the report. A check that raises does not end it."""

import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from dinfer.config import Config
from dinfer.display import takes_colour
from dinfer.doctor.devices import count_gpus, gpu_check, memory_checks
from dinfer.doctor.leftovers import folder_check, orphans, process_check, read_processes
from dinfer.doctor.network import network_checks
from dinfer.doctor.pairs import measure, pairs_check
from dinfer.doctor.report import Check, PairSpeed, Report, as_text, to_json
from dinfer.doctor.versions import backend_check, version_checks

PAIRS_S = 40.0
"""for measuring pairs, of the 60 seconds that all checks may take"""

NEEDED_BY_PAIRS = ("torch", "backends", "interface", "ports")


def doctor(model: str | None, world_size: int, as_json: bool) -> int:
    """Check this host and print the report. Returns the exit status: 1 if a check failed. Raises ConfigError."""
    Config.of({"world_size": world_size})
    report = examine(model, world_size)
    if as_json:
        print(json.dumps(to_json(report), ensure_ascii=False, indent=1))
    else:
        print(as_text(report, colour=takes_colour(sys.stdout)))
    return 0 if report.ok else 1


def examine(model: str | None, world_size: int) -> Report:
    started = time.perf_counter()
    checks: list[Check] = []
    pairs: list[PairSpeed] = []
    looks: dict[str, Callable[[], Check | list[Check]]] = {
        "versions": version_checks,
        "backends": backend_check,
        "GPUs": gpu_check,
        "memory": lambda: memory_checks(model, world_size, count_gpus()),
        "network": network_checks,
        "pairs": lambda: _measure(world_size, checks, pairs),
        "old processes": lambda: process_check(orphans(read_processes())),
        "old folders": lambda: folder_check(Path(tempfile.gettempdir()), time.time()),
    }
    for name, look in looks.items():
        try:
            found = look()
        except Exception as error:  # an unforeseen system must not hide what the other checks find
            text = f"this check failed to run: {type(error).__name__}: {error}"
            found = Check(name, "unchecked", text, "report it, with this line")
        checks += [found] if isinstance(found, Check) else found
    text = f"links to other hosts, and NCCL: only {platform.node()} and its gloo were checked"
    checks.append(Check("other hosts", "unchecked", text, "run dinfer doctor on each host"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    system = f"{platform.system()} {platform.release()}, {platform.machine()}"
    return Report(f"{platform.node()}: {system}, {cores} cores", checks, pairs, time.perf_counter() - started)


def _measure(world_size: int, checks: Sequence[Check], pairs: list[PairSpeed]) -> Check:
    """Measure all links and append them to `pairs`; skipped if a check that they depend on has failed."""
    if world_size == 1:
        return Check("pairs", "ok", "one rank has no links")
    failed = [check.name for check in checks if check.state == "fail" and check.name in NEEDED_BY_PAIRS]
    if failed:
        return Check("pairs", "unchecked", f"not measured, because {failed[0]} failed")
    measured = measure(world_size, PAIRS_S)
    pairs += sorted(measured.pairs)
    return pairs_check(measured, world_size, os.environ.get("GLOO_SOCKET_IFNAME", ""))
