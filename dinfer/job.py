"""Job: a run that is checked before any rank starts: prompt, plan, memory, GPUs and backend.

Also which parameters are fixed once ranks have loaded a checkpoint.
"""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from dinfer.codec.choice import Codec, CodecError
from dinfer.config import Config, ConfigError
from dinfer.display import html_text
from dinfer.errors import ipython
from dinfer.model.checkpoint import Spec, check, check_unchanged
from dinfer.model.memory import MemoryDemand, check_memory
from dinfer.model.text import encode, load_tokenizer
from dinfer.plan.custom import CustomSchedule, custom_plan
from dinfer.plan.lower import lower
from dinfer.plan.ops import PlanError
from dinfer.plan.partition import partition
from dinfer.plan.plan import Plan
from dinfer.plan.schedule import build
from dinfer.plan.verify import Counterexample, Proof, verify
from dinfer.planner.machine import MeasuredMachine
from dinfer.verdict.drawing import counterexample_svg, cycle_text

OF_LOAD = ("dtype", "gpu_ids", "threads", "kernels", "backend")
"""parameters of `session.load`: a run may have other kernels than these, and nothing else"""


def load_call(loaded: Config) -> str:
    """The call that loads a checkpoint as it was loaded. `loaded`: that config, whose backend is chosen."""
    default = {item.name: item.default for item in fields(loaded)}
    unsaid = {(name, default[name]) for name in OF_LOAD}
    if loaded.device_mode == "multi_node" or _obstacle_to_nccl(loaded, lambda: True):
        unsaid.add(("backend", "gloo"))  # which auto then chooses on any machine
    given = [(name, getattr(loaded, name)) for name in OF_LOAD]
    named = [f"{name}={one!r}" for name, one in given if (name, one) not in unsaid]
    return f"session.load({', '.join([repr(str(loaded.model_path)), *named])})"


def has_nccl() -> bool:
    """Whether torch has NCCL and a GPU here. Imports torch."""
    from dinfer.transport.nccl import has_nccl as found

    return found()


def has_ipc() -> bool:
    """Whether processes can share GPU memory here. Imports torch."""
    from dinfer.transport.ipc import has_ipc as found

    return found()


def choose_backend(
    config: Config, nccl_is_here: Callable[[], bool] = has_nccl, ipc_is_here: Callable[[], bool] = has_ipc
) -> Config:
    """The config with backend gloo or nccl in place of auto. Raises ConfigError if it asks for nccl or ipc in vain.

    For ranks on several machines auto means gloo, since NCCL may not work on the network between them.
    """
    if config.backend == "gloo":
        return config
    if config.backend == "ipc":
        obstacle = _obstacle_to_ipc(config, ipc_is_here)
    else:
        obstacle = _obstacle_to_nccl(config, nccl_is_here)
    if config.backend == "auto":
        use_nccl = not obstacle and config.device_mode == "single_node"
        return config.with_(backend="nccl" if use_nccl else "gloo")
    if obstacle:
        raise ConfigError(f"backend is {config.backend}, but {obstacle}.")
    return config


GLOO = "or use backend gloo"


def _obstacle_to_nccl(config: Config, nccl_is_here: Callable[[], bool]) -> str:
    """Why NCCL cannot be used, and a sentence, without its full stop, on what to do about it; empty if it can."""
    ids = config.gpu_ids
    if not ids:
        example = ",".join(map(str, range(config.world_size)))
        return f"gpu_ids is empty: NCCL needs one GPU a rank. Give gpu_ids, such as {example}, {GLOO}"
    shared = next((gpu for gpu in ids if ids.count(gpu) > 1), None)
    if shared is not None and config.device_mode == "single_node":
        ranks = " and ".join(str(rank) for rank, gpu in enumerate(ids) if gpu == shared)
        return f"ranks {ranks} share GPU {shared}: NCCL needs one GPU a rank. Give each rank its own in gpu_ids, {GLOO}"
    if not nccl_is_here():
        return f"this torch has no NCCL or finds no GPU. Install a CUDA build of torch for Linux, {GLOO}"
    return ""


def _obstacle_to_ipc(config: Config, ipc_is_here: Callable[[], bool]) -> str:
    """Why ranks cannot share GPU memory, and a sentence, without its full stop, on what to do about it; empty if they
    can."""
    if config.device_mode != "single_node":
        return f"the ranks are on several machines: CUDA IPC shares the memory of one GPU. Use nccl, {GLOO}"
    if not config.gpu_ids:
        example = ",".join(["0"] * config.world_size)
        return f"gpu_ids is empty: CUDA IPC needs a GPU that all ranks share. Give gpu_ids, such as {example}, {GLOO}"
    if len(set(config.gpu_ids)) > 1:
        given = ",".join(map(str, config.gpu_ids))
        return f"gpu_ids is {given}: CUDA IPC is for ranks that share one GPU. Use nccl where each has its own, {GLOO}"
    if not ipc_is_here():
        return "this machine's GPU memory cannot be shared, or torch finds no GPU. Use backend gloo"
    return ""


REMEDY = "Nothing was run. Choose another schedule, or pass unsafe=True (--unsafe) to watch it hang."


class PlanRefused(PlanError):
    """verify refutes the plan: see `counterexample`. A notebook shows the error with the drawing of `error.svg()`."""

    def __init__(self, plan: Plan, counterexample: Counterexample) -> None:
        drawn = cycle_text(counterexample)
        super().__init__("\n".join(filter(None, (f"{counterexample}.", drawn, REMEDY))))
        self.plan, self.counterexample = plan, counterexample
        self._drawn = False

    def svg(self) -> str:
        """A drawing, as SVG, of the counterexample's ops and what each waits for."""
        return counterexample_svg(self.plan, self.counterexample)

    def _repr_svg_(self) -> str:
        return self.svg()

    def _repr_html_(self) -> str:
        return f"<div>{html_text(str(self))}{self.svg()}</div>"

    def _render_traceback_(self) -> list[str]:
        """As DinferError does; in a notebook, publishes the drawing too, once (some versions of IPython call this
        twice)."""
        shell = ipython()
        if shell is not None and hasattr(shell, "kernel") and not self._drawn:
            self._drawn = True
            shell.display_pub.publish({"image/svg+xml": self.svg(), "text/plain": ""})
        return super()._render_traceback_()


@dataclass(frozen=True, repr=False)
class Job:
    """A run that may start. `config.threads` and `config.backend` are chosen; `ids` are the prompt's token ids;
    `predicted_s`: seconds of prefill by the planner, 0 where it has chosen nothing, and `because`: a sentence on each
    of its choices; `machine`: as measured before, None where nothing was; `loaded`: the config that the checkpoint was
    loaded with, where that was for any number of runs."""

    config: Config
    spec: Spec
    ids: tuple[int, ...]
    plan: Plan
    verdict: Proof | Counterexample
    predicted_s: float = 0.0
    because: tuple[str, ...] = ()
    machine: MeasuredMachine | None = None
    loaded: Config | None = None

    @property
    def load_call(self) -> str:
        """The call that loads its checkpoint as it was loaded."""
        return load_call(self.loaded or self.config)

    def __repr__(self) -> str:
        return f"<job: {self.config.model_path}, {len(self.ids)} prompt tokens, {self.plan!r}>"


def prepare(config: Config, ranks_here: Sequence[int] | None = None) -> Job:
    """Check a run of the command line. `ranks_here`: the ranks on this machine, by default all.

    Raises ConfigError, ModelError or PlanError, whose messages say what to do.
    """
    if config.on_corruption == "pause":
        raise ConfigError(
            "on_corruption is pause, but only a session can continue a paused run: use record or fail, or "
            'session.prefill(…, on_corruption="pause") in a notebook.'
        )
    if not config.prompt_ids:
        _prompt_text(config)  # before the checkpoint is looked at, for which torch is imported
    spec = check(config.model_path)
    _check_world_size(config, spec)
    ids = _prompt_ids(config, spec)
    here = list(range(config.world_size)) if ranks_here is None else list(ranks_here)
    _check_gpus(config, here)
    config = choose_backend(config)
    _check_memory(config, spec, len(ids), here)
    return _job(config.with_(threads=config.threads or threads_per_rank(len(here))), spec, ids, None)


def prepare_loaded(config: Config, spec: Spec, plan: Plan | str | CustomSchedule | None = None) -> Job:
    """Check a run on ranks that have loaded the checkpoint, with memory and GPUs checked at that time.

    `spec`: the checkpoint's, when it was loaded; a ModelError says so if it has changed since. `plan`: a plan, its
    text, or a function that makes it, instead of the config's. Raises as `prepare` does.
    """
    check_unchanged(spec)
    _check_world_size(config, spec)
    return _job(config, spec, _prompt_ids(config, spec), plan)


def prepare_load(config: Config, ranks_here: Sequence[int]) -> tuple[Config, Spec]:
    """Check whether these ranks of this host can load a checkpoint. Returns the config with its backend chosen, and the
    checkpoint's spec. Raises as `prepare` does."""
    spec = check(config.model_path)
    _check_world_size(config, spec)
    _check_gpus(config, ranks_here)
    config = choose_backend(config)
    _check_memory(config, spec, config.max_new_tokens, ranks_here)
    return config, spec


def _check_world_size(config: Config, spec: Spec) -> None:
    if config.world_size > spec.layers:
        raise ConfigError(
            f"world_size is {config.world_size}, but {config.model_path} has {spec.layers} layers and every rank "
            f"must own at least one: use at most {spec.layers} ranks."
        )


def check_codec(config: Config, spec: Spec) -> None:
    """Raises ConfigError for a codec that is not for this KV, or not for how ranks are connected."""
    codec = Codec.of(config.codec)
    if not codec.is_none and config.uses_streams:
        raise ConfigError(
            f"codec is {codec}, but the ranks are connected by {config.backend}, which sends blocks as they are: give "
            "codec none, or backend gloo."
        )
    if not codec.is_none and not config.digests:
        raise ConfigError(
            f"codec is {codec} and digests is False, but damaged bytes, and blocks that are edited after they were "
            "encoded, are found by digests only: leave digests on, or give codec none."
        )
    try:
        codec.check(spec.dtype if config.dtype == "auto" else config.dtype)
    except CodecError as error:
        raise ConfigError(str(error)) from None


def _job(config: Config, spec: Spec, ids: tuple[int, ...], own: Plan | str | CustomSchedule | None) -> Job:
    check_codec(config, spec)
    shape = partition(
        layers=spec.layers,
        tokens=len(ids),
        world_size=config.world_size,
        chunk_size=config.chunk_size,
        layer_split=config.layer_split or None,
    )
    if own is not None:
        plan = custom_plan(own, config, shape)
    else:
        plan = build(shape, config.schedule, config.sync_strategy)
        if config.uses_streams:
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
        there = f"GPU ids here go from 0 to {count - 1}" if count else "torch finds no GPU on this machine"
        raise ConfigError(
            f"gpu_ids names {', '.join(map(str, missing))}, but {there}: change gpu_ids, or leave it out for the CPU."
        )


def _check_memory(config: Config, spec: Spec, tokens: int, ranks: Sequence[int]) -> None:
    """Every rank holds the whole model, for decode. Raises ModelError if it does not fit."""
    length = min(tokens + config.max_new_tokens, spec.max_positions)
    devices = Counter(f"cuda:{config.gpu_ids[r]}" if config.gpu_ids else "cpu" for r in ranks)
    for device, count in devices.items():
        wanted = MemoryDemand(
            spec, config.dtype, length, count, device, config.chunk_size, config.wants_graphs,
            stages=config.exact_stages,
        )  # fmt: skip
        check_memory(wanted)


def threads_per_rank(world_size: int) -> int:
    """This machine's cores divided by its ranks, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // world_size)


LONG_ROPE = (
    "(The model itself has {}. dinfer stops where its long-rope factors change: past that, results would depend on the "
    "chunks.)"
)


CHARACTERS = 1024
"""that no token exceeds: the longest of public tokenizers are 512 spaces"""


def _prompt_text(config: Config) -> str:
    text = config.prompt_text()
    if not text.strip():
        raise ConfigError("the prompt is empty: give prompt, prompt_file or prompt_ids.")
    return text


def _prompt_ids(config: Config, spec: Spec) -> tuple[int, ...]:
    if config.prompt_ids:
        ids = config.prompt_ids
    else:
        text = _prompt_text(config)
        if len(text) > CHARACTERS * spec.max_positions:  # it would take minutes to encode it only to say so
            raise ConfigError(
                f"the prompt has {len(text):,} characters; {config.model_path} has {spec.max_positions:,} positions: "
                "shorten the prompt."
            )
        tokenizer = load_tokenizer(config.model_path)
        if tokenizer is None:
            raise ConfigError(f"{config.model_path} has no tokenizer: give prompt_ids instead of text.")
        ids = tuple(encode(tokenizer, text, config.chat))
    if wrong := [token for token in ids if not 0 <= token < spec.vocab_size]:
        given = (
            f"prompt_ids has {wrong[0]}"
            if config.prompt_ids
            else f"the tokenizer made token {wrong[0]} of the prompt"
        )
        other = (
            ""
            if config.prompt_ids
            else " The tokenizer belongs to another model: give prompt_ids, or its own."
        )
        raise ConfigError(f"{given}; token ids of this model go from 0 to {spec.vocab_size - 1}.{other}")
    if len(ids) > spec.max_positions:
        why = (
            "" if spec.max_positions == spec.model_positions else f" {LONG_ROPE.format(spec.model_positions)}"
        )
        raise ConfigError(
            f"the prompt has {len(ids)} tokens; {config.model_path} has {spec.max_positions} positions: "
            f"shorten the prompt.{why}"
        )
    return ids


FIXED = ("model_path", "dtype", "gpu_ids", "threads", "backend", "world_size")
"""the parameters that loading a checkpoint fixes for all runs"""

ANY = {"threads": 0, "backend": "auto"}
"""values that accept whatever was loaded"""


def without_fixed(given: Mapping[str, Any], loaded: Config, spec: Spec) -> dict[str, Any]:
    """A run's parameters without those that loading has fixed. Raises ConfigError if one of these differs from what was
    loaded: a run cannot change it."""
    for name in FIXED:
        if name not in given:
            continue
        bare = {"gpu_ids": (), "layer_split": ()}  # their lengths would have to fit the world size
        wanted = _value(loaded.with_(**(bare | {name: given[name]})), spec, name)
        if wanted not in (_value(loaded, spec, name), ANY.get(name)):
            raise ConfigError(_refusal(name, wanted, _value(loaded, spec, name), loaded))
    return {name: value for name, value in given.items() if name not in FIXED}


def _value(config: Config, spec: Spec, name: str) -> Any:
    found = getattr(config, name)
    return spec.dtype if (name, found) == ("dtype", "auto") else found


def _refusal(name: str, wanted: Any, found: Any, loaded: Config) -> str:
    if name == "world_size":
        return (
            f"world_size is {wanted}, but this session has {found} ranks: dinfer.connect(n={wanted}) opens one "
            f"of {wanted}."
        )
    if name == "backend":
        return (
            f"backend is {wanted}, but the ranks are connected by {found}: session.load(…, gpu_ids=…) sets the GPUs "
            "and with them the backend of all runs."
        )
    path = "" if name == "model_path" else f"{loaded.model_path!r}, {name}="
    return (
        f"{name} is {wanted!r}, but the ranks were loaded with {found!r}, which a run cannot change: "
        f"session.load({path}{wanted!r}) sets it for all runs."
    )
