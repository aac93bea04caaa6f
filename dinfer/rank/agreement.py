"""Checks that all ranks run the same thing, once they have met and before anything is computed."""

import hashlib
import json
from collections.abc import Mapping, Sequence

import torch
import transformers

from dinfer.config import Config
from dinfer.errors import DinferError
from dinfer.model.checkpoint import Spec
from dinfer.transport.gloo import Comm
from dinfer.version import __version__

_BYTES = 8192
_LONGEST = 60

_MAY_DIFFER = frozenset(
    (
        "log_dir",
        "log_level",
        "master_addr",
        "master_port",
        "model_path",
        "prompt",
        "prompt_file",
        "prompt_ids",
    )
)
"""Parameters that may differ from rank to rank, such as paths on its host. The prompt is compared as token ids."""


class RanksDisagree(DinferError, RuntimeError):
    """Ranks were started with different parameters, versions or checkpoints."""


def facts_of(
    config: Config, spec: Spec, ids: Sequence[int], plan_id: int, kernels: str = "exact"
) -> dict[str, str]:
    """What must be the same on every rank, by name. What follows from others comes last. `kernels`: those that run
    here, whatever the config asks for."""
    given = {name: str(value) for name, value in vars(config).items() if name not in _MAY_DIFFER}
    given["kernels"] = kernels
    return {
        "dinfer": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "checkpoint": spec.fingerprint[:16],
        **given,
        "prompt": f"{len(ids)} tokens {_digest(str(list(ids)))}",
        "plan": f"{plan_id:016x}",
    }


def agree(comm: Comm, facts: Mapping[str, str]) -> None:
    """Raises RanksDisagree, on every rank alike, naming what differs and on which ranks."""
    short = {name: value if len(value) <= _LONGEST else _digest(value) for name, value in facts.items()}
    data = json.dumps(short).encode()
    assert len(data) <= _BYTES
    # As many bytes on every rank, whatever they hold: gloo aborts a rank that receives more than it expects.
    by_rank = [json.loads(part) for part in comm.all_gather(data.ljust(_BYTES))]
    names = dict.fromkeys(name for its in by_rank for name in its)
    different = [name for name in names if len({its.get(name) for its in by_rank}) > 1]
    if len(different) > 1 and "plan" in different:
        different.remove("plan")  # it follows from the others
    if different:
        listed = " ".join(f"{name}: {_who_has_what(name, by_rank)}." for name in different)
        raise RanksDisagree(f"the ranks do not run the same thing. {listed} Start all ranks alike.")


def _who_has_what(name: str, by_rank: Sequence[Mapping[str, str]]) -> str:
    """For example `ranks 0, 2 4.57.1; rank 1 4.56.0`."""
    ranks: dict[str, list[int]] = {}
    for rank, facts in enumerate(by_rank):
        ranks.setdefault(facts.get(name, "nothing"), []).append(rank)
    return "; ".join(
        f"rank{'s' if len(having) > 1 else ''} {', '.join(map(str, having))} {value}"
        for value, having in ranks.items()
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
