"""The model named, and free memory against what its ranks need: on the CPU, and on GPUs if any."""

from typing import NamedTuple

from dinfer.config import Config
from dinfer.doctor.check import Check, gib
from dinfer.model.checkpoint import Spec, check
from dinfer.model.errors import ModelError
from dinfer.model.free import free
from dinfer.model.memory import MemoryDemand

TOKENS = 1024
"""prompt and new tokens to ask for, fewer where the model has no room for them"""


class Asked(NamedTuple):
    """Ranks of one device, and what is free for them."""

    spec: Spec
    ranks: int
    device: str = "cpu"

    @property
    def demand(self) -> MemoryDemand:
        tokens = min(TOKENS, self.spec.max_positions)
        return MemoryDemand(self.spec, "auto", tokens, self.ranks, self.device, Config().chunk_size)


def memory_checks(model: str | None, world_size: int, gpus: int) -> list[Check]:
    """By default all ranks run on the CPU; on GPUs they are shared out evenly."""
    if model is None:
        return [no_model_check(_free("cpu"))]
    try:
        spec = check(model)
    except ModelError as error:
        return [Check("model", "fail", str(error), "name another checkpoint: dinfer doctor --model PATH")]
    checks = [judge_model(spec, world_size), judge_memory(Asked(spec, world_size), _free("cpu"))]
    if gpus:
        device = min((f"cuda:{n}" for n in range(min(gpus, world_size))), key=lambda name: _free(name) or 0)
        checks.append(judge_memory(Asked(spec, -(-world_size // gpus), device), _free(device)))
    return checks


def _free(device: str) -> int | None:
    try:
        return free(device)
    except ModelError:
        return None


def no_model_check(available: int | None) -> Check:
    there = f"{gib(available)} are free; " if available is not None else ""
    return Check(
        "memory", "unchecked", f"{there}no model named to compare with", "dinfer doctor --model PATH"
    )


def judge_model(spec: Spec, world_size: int) -> Check:
    found = f"{spec.model_type}, {spec.layers} layers, {spec.dtype}, {gib(spec.weight_bytes)} of weights"
    if world_size <= spec.layers:
        return Check("model", "ok", found)
    found += f": too few layers for {world_size} ranks, each of which owns at least one"
    return Check("model", "fail", found, f"use at most {spec.layers} ranks: --world-size {spec.layers}")


def judge_memory(asked: Asked, available: int | None) -> Check:
    """Too little on the GPU is no failure: ranks can run on the CPU."""
    on_cpu, demand = asked.device == "cpu", asked.demand
    name, where = ("memory", "") if on_cpu else ("GPU memory", f" on {asked.device}")
    ranks = f"{asked.ranks} ranks need" if asked.ranks > 1 else "a rank needs"
    found = f"{ranks} {gib(demand.bytes())} for {demand.tokens:,} tokens"
    if available is None:
        return Check(name, "unchecked", f"{found}; how much is free{where} is not known")
    found += f"; {gib(available)} are free{where}"
    if demand.bytes() <= available:
        return Check(name, "ok", found)
    return Check(name, "fail" if on_cpu else "warn", found, _way_out(demand, available))


def _way_out(demand: MemoryDemand, available: int) -> str:
    """The first change that is enough by itself."""
    if demand.bytes(dtype="bfloat16") <= available:
        return "dinfer run --dtype bfloat16"
    fewer = [ranks for ranks in range(1, demand.ranks) if demand.bytes(ranks=ranks) <= available]
    if fewer:
        return f"use fewer ranks here: at most {fewer[-1]}"
    return "use a smaller model, or a host with more memory"
