"""How much memory is free on a device before a model is loaded.

On a CPU: what can be allocated without swapping, by psutil, or what the limits of this process's cgroups (a container)
leave, whichever is less; psutil does not know cgroups. Asking for a CPU does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

from dinfer.errors import ModelError


def free(device: str = "cpu", root: Path = Path("/")) -> int:
    """Return the free bytes of "cpu" or "cuda:N".

    `root`: where /proc and /sys of the cgroups are. Raises `ModelError` for an unknown CUDA device.
    """
    if device == "cpu":
        return max(0, min([psutil.virtual_memory().available, *_of_cgroups(root)]))
    return _of_cuda(device)


def _of_cuda(device: str) -> int:
    import torch

    try:
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ModelError(f"device {device!r} cannot be asked for its free memory: {error}") from error


def _of_cgroups(root: Path) -> Iterator[int]:
    """Yield what each cgroup that this process is in, and each one above, leaves; v1 and v2 alike."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        parts = Path(path.lstrip("/")).parts
        for depth in range(len(parts), -1, -1):
            left = _left(top.joinpath(*parts[:depth]), *names)
            if left is not None:
                yield left


def _left(group: Path, limit_name: str, usage_name: str, cached_name: str) -> int | None:
    """Return what a cgroup's limit leaves; page cache that it would give back counts as free."""
    limit, usage = _read(group / limit_name).strip(), _read(group / usage_name).strip()
    if not limit.isdigit() or not usage.isdigit():  # no such file (a container sees the top alone), or "max"
        return None
    stat = dict(line.split(maxsplit=1) for line in _read(group / "memory.stat").splitlines() if " " in line)
    return int(limit) - int(usage) + int(stat.get(cached_name, 0))


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii")
    except OSError:
        return ""
