"""How much memory is free on a device, for someone who is about to load a model.

On a CPU: what the kernel says can be had without swapping, page cache that can be given back included, or
what this process's cgroups (a container's limit) leave, whichever is less. Nothing here imports torch for a
CPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from dinfer.model.errors import ModelError


def free(device: str = "cpu", root: Path = Path("/")) -> int | None:
    """Return the free bytes of "cpu" or "cuda:N", None where this system does not tell.

    `root` is where /proc and /sys are looked for. Raises `ModelError` for a CUDA device that is not there.
    """
    if device == "cpu":
        known = [size for size in (_of_system(root), *_of_cgroups(root)) if size is not None]
        return max(0, min(known)) if known else None
    return _of_cuda(device)


def _of_cuda(device: str) -> int:
    import torch

    try:
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ModelError(f"device {device!r} cannot be asked for its free memory: {error}") from error


def _of_system(root: Path) -> int | None:
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return _of_sysconf()


def _of_sysconf() -> int | None:
    """Return the free pages; all pages where only these are known (macOS); None on Windows."""
    for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"):
        try:
            pages, size = os.sysconf(name), os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):
            continue
        if pages > 0 and size > 0:
            return pages * size
    return None


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
