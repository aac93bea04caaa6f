"""`dinfer doctor`: runs every check, then prints the report. A check that raises does not end it."""

import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter

from dinfer.config import Config
from dinfer.doctor import network as net
from dinfer.doctor.devices import count_gpus, gpu_check, memory_checks
from dinfer.doctor.leftovers import folder_check, process_check
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
        print(as_text(report, colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    return 0 if report.ok else 1


def examine(model: str | None, world_size: int) -> Report:
    started = perf_counter()
    checks = list(_checks_of_host(model, world_size))
    pairs: list[PairSpeed] = []
    checks += _guarded("pairs", lambda: _measure(world_size, checks, pairs))
    checks += _checks_of_leftovers()
    return Report(_host(), checks, pairs, perf_counter() - started)


def _checks_of_host(model: str | None, world_size: int) -> Iterator[Check]:
    yield from _guarded("versions", version_checks)
    yield from _guarded("backends", backend_check)
    yield from _guarded("GPUs", gpu_check)
    yield from _guarded("memory", lambda: memory_checks(model, world_size, count_gpus()))
    yield from _guarded("network", _network_checks)


def _checks_of_leftovers() -> Iterator[Check]:
    yield from _guarded("old processes", process_check)
    yield from _guarded("old folders", folder_check)
    found = f"links to other hosts, and NCCL: only {platform.node()} and its gloo were checked"
    yield Check("other hosts", "unchecked", found, "run dinfer doctor on each host")


def _network_checks() -> list[Check]:
    seen = net.look()
    ports = net.port_check(net.try_ports(seen.own), seen.own)
    return [net.interface_check(seen), net.host_name_check(seen), ports]


def _guarded(name: str, look: Callable[[], Check | list[Check]]) -> list[Check]:
    """The checks of `look`; one that reports the error if it raises."""
    try:
        found = look()
    except Exception as error:  # an unforeseen system must not hide what the other checks find
        text = f"this check failed to run: {type(error).__name__}: {error}"
        return [Check(name, "unchecked", text, "report it, with this line")]
    return [found] if isinstance(found, Check) else found


def _measure(world_size: int, checks: Sequence[Check], pairs: list[PairSpeed]) -> Check:
    """Measure all links and append them to `pairs`; skipped if a check that they depend on has failed."""
    from dinfer.doctor.pairs import measure, pairs_check

    if world_size == 1:
        return Check("pairs", "ok", "one rank has no links")
    failed = [check.name for check in checks if check.state == "fail" and check.name in NEEDED_BY_PAIRS]
    if failed:
        return Check("pairs", "unchecked", f"not measured, because {failed[0]} failed")
    measured = measure(world_size, PAIRS_S)
    pairs += sorted(measured.pairs)
    return pairs_check(measured, world_size, os.environ.get("GLOO_SOCKET_IFNAME", ""))


def _host() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{platform.node()}: {platform.system()} {platform.release()}, {platform.machine()}, {cores} cores"
