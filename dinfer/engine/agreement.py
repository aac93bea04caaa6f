"""Do all ranks run the same thing? Asked once they have met, before anything is computed."""

import json
from collections.abc import Mapping

import torch
import transformers

from dinfer import __version__
from dinfer.config import Config
from dinfer.engine.comm import Comm
from dinfer.model.checkpoint import Spec
from dinfer.model.fingerprint import fingerprint

_BYTES = 4096
_OWN = frozenset({"log_dir", "log_level", "master_addr", "master_port", "model_path", "prompt_file"})
"""What may differ from rank to rank: where things lie on its host."""


class RanksDisagree(RuntimeError):
    """Ranks were started with different parameters, versions or checkpoints."""


def facts_of(config: Config, spec: Spec, plan_id: int) -> dict[str, str]:
    """What must be the same on every rank, by name."""
    given = {
        name: str(value) for name, value in vars(config).items() if name not in _OWN and name != "prompt"
    }
    return {
        "dinfer": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "checkpoint": fingerprint(spec)[:16],
        "plan": f"{plan_id:016x}",
        **given,
    }


def agree(comm: Comm, facts: Mapping[str, str]) -> None:
    """Raises RanksDisagree, on every rank alike, naming what differs and on which ranks."""
    data = json.dumps(dict(facts)).encode().ljust(_BYTES)
    by_rank = [json.loads(part) for part in comm.all_gather(data)]
    for name in facts:
        values = [said.get(name, "nothing") for said in by_rank]
        if len(set(values)) > 1:
            listed = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
            raise RanksDisagree(
                f"the ranks do not run the same thing; {name} differs: {listed}. Start all ranks alike."
            )
