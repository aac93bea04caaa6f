"""Record: from a folder, all that one rank needs to run again alone."""

from pathlib import Path
from typing import Any

from torch import Tensor

from dinfer.config import Config
from dinfer.session.replaying.recorded import Recorded, check_rank, entered
from dinfer.session.saved.format import HIDDEN, SavedError, hidden_name
from dinfer.session.saved.own import own_from
from dinfer.session.saved.reading import check_sum, damage_told
from dinfer.session.saved.source import SavedSource
from dinfer.session.saved.tensors import Tensors


def read_record(
    folder: Path, about: dict[str, Any], source: SavedSource, rank: int, failure: str
) -> Recorded:
    """Of that rank. Raises PlanError for no such rank, SavedError where the folder does not hold what is needed."""
    subject, plan = source.subject, source.subject.plan
    check_rank(rank, plan)
    if str(rank) not in about.get("own", {}) or not about.get("positions"):
        there = "it was saved with hidden=False" if not about.get("hidden") else "the rank could not be asked"
        raise SavedError(f"{subject.name} holds nothing to replay rank {rank} from: {there}.")
    check_sum(folder, HIDDEN, about)
    states = Tensors(folder / HIDDEN)
    with damage_told(folder):
        own = own_from(about["own"][str(rank)], rank, states.one)
        positions = tuple(about["positions"][rank])
        return Recorded(
            name=subject.name,
            config=_config(about, subject.prompt),
            checkpoint=subject.checkpoint,
            dtype=str(subject.dtype).removeprefix("torch."),
            device=own.device,
            plan=plan,
            ids=subject.prompt,
            tokens=own.tokens,
            rank=rank,
            positions=positions,
            begun=own.begun,
            hidden={
                (op.chunk, op.layer): state[None]
                for op in entered(plan, rank, positions)
                if op.what == "hidden"
                and (state := states.get(hidden_name(rank, op.chunk, op.layer))) is not None
            },
            final=own.final,
            block=lambda chunk, layer: _block(source, rank, chunk, layer),
            noted=source.noted([rank], range(plan.shape.layers))[0],
            edits=own.edits,
            faults=own.faults,
            failure=failure,
        )


def _config(about: dict[str, Any], ids: tuple[int, ...]) -> Config:
    parameters: dict[str, Any] = about["parameters"]
    given: dict[str, Any] = {
        name: tuple(one) if isinstance(one, list) else one for name, one in parameters.items()
    }
    return Config(**given, prompt_ids=ids, log_dir="")


def _block(source: SavedSource, rank: int, chunk: int, layer: int) -> Tensor:
    """Raises KeyError where its values were not saved."""
    if not source.has_values(layer):
        raise KeyError((chunk, layer))
    return source.values(rank, layer, source.subject.spans[chunk])
