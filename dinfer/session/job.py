"""Job: all that can be known of a run before any rank starts, and every mistake that can be found by then."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dinfer.config import Config, ConfigError
from dinfer.model.checkpoint import Spec, check
from dinfer.model.memory import check_memory
from dinfer.model.text import encode, load_tokenizer
from dinfer.plan.lower import lower
from dinfer.plan.own import OwnSchedule, own_plan
from dinfer.plan.partition import partition
from dinfer.plan.plan import Plan
from dinfer.plan.schedule import build
from dinfer.plan.verify import Counterexample, Proof, verify
from dinfer.session.backend import settle_backend
from dinfer.session.refusal import PlanRefused


@dataclass(frozen=True)
class Job:
    """A run that may start. `config.threads` and `config.backend` are settled; `ids` is the prompt."""

    config: Config
    spec: Spec
    ids: tuple[int, ...]
    plan: Plan
    verdict: Proof | Counterexample


def prepare(config: Config, ranks_here: Sequence[int] | None = None) -> Job:
    """Raises ConfigError, ModelError or PlanError, each with what to do. `ranks_here`: by default all."""
    if config.on_corruption == "pause":
        raise ConfigError(
            "on_corruption is pause, but nobody is there to go on with a run without a session: use record or fail, or "
            'session.prefill(…, on_corruption="pause") in a notebook.'
        )
    spec = check(config.model_path)
    _check_world_size(config, spec)
    ids = _prompt_ids(config, spec)
    here = list(range(config.world_size)) if ranks_here is None else list(ranks_here)
    _check_gpus(config, here)
    config = settle_backend(config)
    _check_memory(config, spec, len(ids), here)
    return _job(config.with_(threads=config.threads or threads_per_rank(len(here))), spec, ids, None)


def prepare_loaded(config: Config, plan: Plan | str | OwnSchedule | None = None) -> Job:
    """The same for ranks that hold the checkpoint already: memory and devices have been looked at then. `plan`: the
    user's own, its text, or a function that makes it, in place of the one that the config makes."""
    spec = check(config.model_path)
    _check_world_size(config, spec)
    return _job(config, spec, _prompt_ids(config, spec), plan)


def prepare_load(config: Config, ranks_here: Sequence[int]) -> tuple[Config, Spec]:
    """What can be known of loading a checkpoint on these ranks, which share this host, with the backend settled. Raises
    as `prepare` does."""
    spec = check(config.model_path)
    _check_world_size(config, spec)
    _check_gpus(config, ranks_here)
    config = settle_backend(config)
    _check_memory(config, spec, config.max_new_tokens, ranks_here)
    return config, spec


def _check_world_size(config: Config, spec: Spec) -> None:
    if config.world_size > spec.layers:
        raise ConfigError(
            f"world_size is {config.world_size}, but {config.model_path} has {spec.layers} layers and every rank "
            f"must own at least one: use at most {spec.layers} ranks."
        )


def _job(config: Config, spec: Spec, ids: tuple[int, ...], own: Plan | str | OwnSchedule | None) -> Job:
    shape = partition(
        layers=spec.layers,
        tokens=len(ids),
        world_size=config.world_size,
        chunk_size=config.chunk_size,
        layer_split=config.layer_split or None,
    )
    if own is not None:
        plan = own_plan(own, config, shape)
    else:
        plan = build(shape, config.schedule, config.sync_strategy)
        if config.backend == "nccl":
            plan = lower(plan)
    verdict = verify(plan)
    if not verdict.proved and not config.unsafe:
        assert isinstance(verdict, Counterexample)
        raise PlanRefused(plan, verdict)
    return Job(config, spec, ids, plan, verdict)


def _check_gpus(config: Config, ranks: Sequence[int]) -> None:
    if not config.gpu_ids:
        return
    import torch

    count = torch.cuda.device_count()
    if missing := sorted({config.gpu_ids[r] for r in ranks if not 0 <= config.gpu_ids[r] < count}):
        there = (
            f"GPU ids here go from 0 to {count - 1}"
            if count
            else "this machine has no GPU that torch can use"
        )
        raise ConfigError(
            f"gpu_ids names {', '.join(map(str, missing))}, but {there}: change gpu_ids, or leave it out for the CPU."
        )


def _check_memory(config: Config, spec: Spec, tokens: int, ranks: Sequence[int]) -> None:
    """Every rank holds the whole model, for decode. Raises ModelError where it does not fit."""
    length = min(tokens + config.max_new_tokens, spec.max_positions)
    devices = Counter(f"cuda:{config.gpu_ids[r]}" if config.gpu_ids else "cpu" for r in ranks)
    for device, count in devices.items():
        check_memory(spec, config.dtype, length, count, device, config.chunk_size)


def threads_per_rank(world_size: int) -> int:
    """This machine's cores shared out, so that ranks do not fight for them; at least one each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // world_size)


def _prompt_ids(config: Config, spec: Spec) -> tuple[int, ...]:
    if config.prompt_ids:
        ids = config.prompt_ids
        if wrong := [token for token in ids if not 0 <= token < spec.vocab_size]:
            raise ConfigError(
                f"prompt_ids has {wrong[0]}; token ids of this model go from 0 to {spec.vocab_size - 1}."
            )
    else:
        text = config.prompt_text()
        if not text.strip():
            raise ConfigError("the prompt is empty: give prompt, prompt_file or prompt_ids.")
        tokenizer = load_tokenizer(config.model_path)
        if tokenizer is None:
            raise ConfigError(f"{config.model_path} has no tokenizer, so it takes no text: give prompt_ids.")
        ids = tuple(encode(tokenizer, text, config.chat))
    if len(ids) > spec.max_positions:
        raise ConfigError(
            f"the prompt has {len(ids)} tokens; {config.model_path} has {spec.max_positions} positions: "
            "shorten the prompt."
        )
    return ids
