"""GPUs as torch and the driver see them."""

import os
import shutil
import subprocess
import warnings
from collections.abc import Sequence
from typing import NamedTuple

from dinfer.doctor.check import Check, gib

SMI_S = 10.0


class Gpu(NamedTuple):
    """A GPU that torch can use; sizes in bytes, None where it does not say, as when it is kept by another."""

    name: str
    free: int | None = None
    total: int | None = None


class Smi(NamedTuple):
    """What the NVIDIA driver says, torch aside."""

    driver: str
    names: Sequence[str]


class Cuda(NamedTuple):
    """What torch says: its version, the CUDA it was built for ("" for none), its GPUs, any complaint."""

    torch: str
    built_for: str
    gpus: Sequence[Gpu]
    complaint: str = ""


def gpu_check() -> Check:
    return judge_gpus(ask_torch(), ask_driver(), os.environ.get("CUDA_VISIBLE_DEVICES"))


def ask_torch() -> Cuda:
    """Looks at the free memory of every GPU, for which torch opens each."""
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        count = count_gpus()
    built_for = torch.version.cuda or torch.version.hip or ""
    complaint = str(said[0].message).strip().splitlines()[0] if said else ""
    return Cuda(str(torch.__version__), built_for, [_gpu(index) for index in range(count)], complaint)


def count_gpus() -> int:
    """GPUs that torch can use."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _gpu(index: int) -> Gpu:
    import torch

    name = torch.cuda.get_device_name(index)
    try:
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError:
        return Gpu(name)
    return Gpu(name, free, total)


def ask_driver() -> Smi | None:
    """None where there is no nvidia-smi, or it says nothing."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=SMI_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return read_smi(answer)


def read_smi(answer: str) -> Smi | None:
    """From lines such as `550.54.15, NVIDIA H200`."""
    rows = [line.partition(", ") for line in answer.splitlines() if ", " in line]
    return Smi(rows[0][0], [name for _, _, name in rows]) if rows else None


def judge_gpus(cuda: Cuda, smi: Smi | None, visible: str | None) -> Check:
    """No GPU is fine: ranks then run on the CPU. One that torch cannot use is a pity, not a failure."""
    if cuda.gpus:
        driver = f"; driver {smi.driver}" if smi else ""
        found = f"{_listed(cuda.gpus)}{driver}; torch built for CUDA {cuda.built_for}{_hidden(visible)}"
        return Check("GPUs", "ok", found)
    if smi is None:
        return Check("GPUs", "ok", "none: ranks run on the CPU")
    found = f"{_counted(smi.names)}, but torch {cuda.torch} cannot use it"
    if not cuda.built_for:
        fix = "install a CUDA build of torch: pytorch.org/get-started"
        return Check("GPUs", "warn", f"{found}: it is a build without CUDA", fix)
    if visible is not None:
        found += f": CUDA_VISIBLE_DEVICES is {visible!r}"
        return Check("GPUs", "warn", found, "unset CUDA_VISIBLE_DEVICES")
    fix = f"update the NVIDIA driver, now {smi.driver}, to one for CUDA {cuda.built_for}"
    return Check("GPUs", "warn", f"{found}{': ' if cuda.complaint else ''}{cuda.complaint}", fix)


def _listed(gpus: Sequence[Gpu]) -> str:
    return ", ".join(f"{number} {gpu.name} ({_memory(gpu)})" for number, gpu in enumerate(gpus))


def _memory(gpu: Gpu) -> str:
    if gpu.free is None or gpu.total is None:
        return "its memory could not be read"
    return f"{gib(gpu.free)} of {gib(gpu.total)} free"


def _hidden(visible: str | None) -> str:
    return f"; CUDA_VISIBLE_DEVICES={visible}" if visible is not None else ""


def _counted(names: Sequence[str]) -> str:
    return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
