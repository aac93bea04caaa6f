"""Devices: the GPUs that torch and the driver see, and free memory compared with what the ranks of a model need."""

import os
import subprocess
import warnings
from collections.abc import Sequence
from typing import NamedTuple

from dinfer.config import Config
from dinfer.doctor.report import Check, gib
from dinfer.errors import ModelError
from dinfer.model.checkpoint import Spec, check
from dinfer.model.memory import MemoryDemand, free

SMI_S = 10.0


class Gpu(NamedTuple):
    """A GPU that torch can use. Sizes in bytes, None if they cannot be read, as when another process owns the GPU."""

    name: str
    free: int | None = None
    total: int | None = None


class Smi(NamedTuple):
    """The GPUs that the NVIDIA driver reports."""

    driver: str
    names: Sequence[str]


class Cuda(NamedTuple):
    """The GPUs that torch reports. `built_for`: a CUDA version, "" for none; `complaint`: torch's warning, if any."""

    torch: str
    built_for: str
    gpus: Sequence[Gpu]
    complaint: str = ""


def gpu_check() -> Check:
    return judge_gpus(_ask_torch(), _ask_driver(), os.environ.get("CUDA_VISIBLE_DEVICES"))


def count_gpus() -> int:
    """The number of GPUs that torch can use."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _ask_torch() -> Cuda:
    """Ask torch, which opens each GPU to read its free memory."""
    import torch

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        count = count_gpus()
    gpus = []
    for index in range(count):
        name = torch.cuda.get_device_name(index)
        try:
            gpus.append(Gpu(name, *torch.cuda.mem_get_info(index)))
        except RuntimeError:
            gpus.append(Gpu(name))
    complaint = str(warned[0].message).strip().splitlines()[0] if warned else ""
    return Cuda(str(torch.__version__), torch.version.cuda or torch.version.hip or "", gpus, complaint)


def _ask_driver() -> Smi | None:
    """None without nvidia-smi, or if it fails."""
    command = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=SMI_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return read_smi(answer)


def read_smi(answer: str) -> Smi | None:
    """Parse lines such as `550.54.15, NVIDIA H200`."""
    rows = [line.partition(", ") for line in answer.splitlines() if ", " in line]
    return Smi(rows[0][0], [name for _, _, name in rows]) if rows else None


def judge_gpus(cuda: Cuda, smi: Smi | None, visible: str | None) -> Check:
    """ok without GPUs, since ranks can run on the CPU; a warning for GPUs that torch cannot use. `visible`: the value
    of CUDA_VISIBLE_DEVICES."""
    if cuda.gpus:
        gpus = []
        for number, gpu in enumerate(cuda.gpus):
            memory = "its memory could not be read"
            if gpu.free is not None and gpu.total is not None:
                memory = f"{gib(gpu.free)} of {gib(gpu.total)} free"
            gpus.append(f"{number} {gpu.name} ({memory})")
        driver = f"; driver {smi.driver}" if smi else ""
        hidden = f"; CUDA_VISIBLE_DEVICES={visible}" if visible is not None else ""
        found = f"{', '.join(gpus)}{driver}; torch built for CUDA {cuda.built_for}{hidden}"
        return Check("GPUs", "ok", found)
    if smi is None:
        return Check("GPUs", "ok", "none: ranks run on the CPU")
    names = ", ".join(f"{smi.names.count(name)} × {name}" for name in dict.fromkeys(smi.names))
    found = f"{names}, but torch {cuda.torch} cannot use it"
    if not cuda.built_for:
        fix = "install a CUDA build of torch: pytorch.org/get-started"
        return Check("GPUs", "warn", f"{found}: it is a build without CUDA", fix)
    if visible is not None:
        found += f": CUDA_VISIBLE_DEVICES is {visible!r}"
        return Check("GPUs", "warn", found, "unset CUDA_VISIBLE_DEVICES")
    fix = f"update the NVIDIA driver, now {smi.driver}, to one for CUDA {cuda.built_for}"
    return Check("GPUs", "warn", f"{found}{': ' if cuda.complaint else ''}{cuda.complaint}", fix)


# -- memory

TOKENS = 1024
"""prompt and new tokens to reckon with; fewer if the model has fewer positions"""


def memory_checks(model: str | None, world_size: int, gpus: int) -> list[Check]:
    """The checkpoint, and the memory of its ranks: all on the CPU, and, if there are GPUs, evenly on those."""
    available = _free("cpu")
    if model is None:
        there = f"{gib(available)} are free; " if available is not None else ""
        found = f"{there}no model was named to compare with"
        return [Check("memory", "unchecked", found, "dinfer doctor --model PATH")]
    try:
        spec = check(model)
    except ModelError as error:
        return [Check("model", "fail", str(error), "name another checkpoint: dinfer doctor --model PATH")]
    checks = [judge_model(spec, world_size), judge_memory(demand(spec, world_size), available)]
    if gpus:
        device = min((f"cuda:{n}" for n in range(min(gpus, world_size))), key=lambda name: _free(name) or 0)
        checks.append(judge_memory(demand(spec, -(-world_size // gpus), device), _free(device)))
    return checks


def _free(device: str) -> int | None:
    try:
        return free(device)
    except ModelError:
        return None


def demand(spec: Spec, ranks: int, device: str = "cpu") -> MemoryDemand:
    """What ranks that share one device need for TOKENS tokens."""
    return MemoryDemand(spec, "auto", min(TOKENS, spec.max_positions), ranks, device, Config().chunk_size)


def judge_model(spec: Spec, world_size: int) -> Check:
    found = f"{spec.model_type}, {spec.layers} layers, {spec.dtype}, {gib(spec.weight_bytes)} of weights"
    if world_size <= spec.layers:
        return Check("model", "ok", found)
    found += f": too few layers for {world_size} ranks, each of which owns at least one"
    return Check("model", "fail", found, f"use at most {spec.layers} ranks: --world-size {spec.layers}")


def judge_memory(asked: MemoryDemand, available: int | None) -> Check:
    """A warning if a GPU has too little free memory, since ranks can run on the CPU; a failure if the CPU has. The fix
    is the first change that is enough by itself."""
    on_cpu = asked.device == "cpu"
    name, where = ("memory", "") if on_cpu else ("GPU memory", f" on {asked.device}")
    ranks = f"{asked.ranks} ranks need" if asked.ranks > 1 else "a rank needs"
    found = f"{ranks} {gib(asked.bytes())} for {asked.tokens:,} tokens"
    if available is None:
        return Check(name, "unchecked", f"{found}; free memory{where} is unknown")
    found += f"; {gib(available)} are free{where}"
    if asked.bytes() <= available:
        return Check(name, "ok", found)
    fewer = [ranks for ranks in range(1, asked.ranks) if asked.bytes(ranks=ranks) <= available]
    fix = "use a smaller model, or a host with more memory"
    if asked.bytes(dtype="bfloat16") <= available:
        fix = "dinfer run --dtype bfloat16"
    elif fewer:
        fix = f"use fewer ranks here: at most {fewer[-1]}"
    return Check(name, "fail" if on_cpu else "warn", found, fix)
