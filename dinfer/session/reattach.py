"""What a session can go on with of the one that held its ranks before: the checkpoint, the group, the run.

The ranks say what they hold. All of them must have been given the same, and the checkpoint's folder must still hold
what they have loaded; whatever cannot be gone on with is named, with the reason.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from dinfer.config import Config
from dinfer.errors import DinferError
from dinfer.job import Job, choose_backend, prepare_loaded
from dinfer.messages import Holdings, LoadModel
from dinfer.model.checkpoint import Spec, check
from dinfer.run.left import LeftRun
from dinfer.verdict.where import rank_spans_text


class Loaded(NamedTuple):
    """A checkpoint that all ranks hold, and the config that runs of it start from."""

    config: Config
    spec: Spec
    devices: list[str]


class Lost(DinferError, RuntimeError):
    """The ranks hold something with which this session cannot go on; the message says why."""


def are_in_one_group(held: Sequence[Holdings]) -> bool:
    """Whether all ranks have met in the same place, which was the last that each of them has joined."""
    return held[0].group is not None and all(one.group == held[0].group for one in held)


def loaded_of(held: Sequence[Holdings], blank: Config) -> Loaded | None:
    """The checkpoint that the ranks hold; None where none has any. `blank`: the config of a session that has loaded
    nothing. Raises Lost."""
    if not any(one.load for one in held):
        return None
    loads = [one.load for one in held if one.load]
    if len(loads) < len(held):
        without = rank_spans_text(rank for rank, one in enumerate(held) if one.load is None)
        raise Lost(f"there is no checkpoint on {without}: session.load({loads[0].path!r}) loads it there")
    first = loads[0]
    if any(_identity(one) != _identity(first) for one in loads):
        raise Lost("the ranks hold different checkpoints: session.load(…) loads one on all of them")
    spec = check(first.path)
    if spec.fingerprint != first.fingerprint:
        raise Lost(
            f"{first.path} has changed since the ranks loaded it: session.load({first.path!r}) loads it anew"
        )
    devices = [one.device for one in loads]
    gpu_ids = tuple(int(device.partition(":")[2]) for device in devices if device.startswith("cuda"))
    values: dict[str, Any] = {"model_path": first.path, "dtype": first.dtype, "gpu_ids": gpu_ids}
    values |= {"threads": first.threads, "kernels": first.kernels}
    config = blank.with_(**values)
    group = held[0].group
    backend = group.backend if group else "auto"
    return Loaded(choose_backend(config.with_(backend=backend)), spec, devices)


def run_of(held: Sequence[Holdings], spec: Spec) -> tuple[Job, LeftRun] | None:
    """The run that the ranks stand in, as a job that is checked anew; None where they have no prompt. Raises Lost, and
    as `prepare_loaded` does."""
    if not any(one.prompt for one in held):
        return None
    first = held[0].prompt
    if first is None or any(one.prompt != first for one in held):
        raise Lost("not all ranks have its prompt")
    if not are_in_one_group(held):
        raise Lost("the ranks are not in one group any more")
    job = prepare_loaded(Config.of(first.config), spec, first.plan or None)
    if job.ids != tuple(first.ids):
        raise Lost("the tokenizer in the checkpoint's folder makes other tokens of the prompt now")
    if any(one.plan_id != job.plan.id for one in held):
        raise Lost("this version of dinfer makes another plan of it")
    left = LeftRun(
        plan_ids={rank: one.plan_id for rank, one in enumerate(held)},
        plan=first.plan,
        breakpoints=held[0].breakpoints,
        faults=held[0].faults,
        lost_events=sum(one.lost_events for one in held),
    )
    return job, left


def _identity(command: LoadModel) -> tuple[str, str, str, int]:
    return command.path, command.dtype, command.fingerprint, command.threads
