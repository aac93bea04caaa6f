"""Reading: a folder, taken apart and checked; or the trace of a report. What cannot be read is told in one message."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinfer.config import Config
from dinfer.kv.source import Subject
from dinfer.plan.ops import PlanError
from dinfer.plan.plan import Plan, parse_plan
from dinfer.saved.format import (
    FORMAT,
    HIDDEN,
    PLAN,
    RUN,
    TRACE,
    VERSION,
    SavedError,
    hidden_name,
    own_from,
    sha256_of,
)
from dinfer.saved.replay.record import RankRecord, check_rank, entered
from dinfer.saved.source import SavedSource, Tensors
from dinfer.trace.export import TraceError
from dinfer.trace.read import read_jsonl
from dinfer.trace.trace import Trace


def read_about(folder: Path) -> dict[str, Any]:
    """What `run.json` says. Raises SavedError where this is no saved run, or one of a newer format."""
    path = folder / RUN
    if not path.is_file():
        raise SavedError(f"{str(folder)!r} is no saved run: it has no {RUN}. run.save(folder) makes one.")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SavedError(f"{str(folder)!r} is damaged: {RUN} is no JSON ({error}).") from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise SavedError(f'{str(folder)!r} is no saved run: its {RUN} does not say "format": "{FORMAT}".')
    version = about.get("version")
    if not isinstance(version, int) or version < 1:
        raise SavedError(f"{str(folder)!r} is damaged: its {RUN} says no version of its format.")
    if version > VERSION:
        raise SavedError(
            f"{str(folder)!r} is of a newer dinfer: its format is version {version}, and this dinfer reads up to "
            f"{VERSION}. Update dinfer to open it."
        )
    return about


def read_plan(folder: Path, about: dict[str, Any]) -> Plan:
    check_sum(folder, PLAN, about)
    try:
        return parse_plan((folder / PLAN).read_text(encoding="utf-8"))
    except (PlanError, ValueError) as error:
        raise SavedError(f"{str(folder)!r} is damaged: {PLAN}: {error}") from None


def read_trace(folder: Path, about: dict[str, Any]) -> Trace:
    check_sum(folder, TRACE, about)
    try:
        return read_jsonl(folder / TRACE)
    except TraceError as error:
        raise SavedError(f"{str(folder)!r} is damaged: {error}") from None


def read_source(folder: Path, about: dict[str, Any], plan: Plan) -> SavedSource:
    with damage_told(folder):
        kv, texts = about["kv"], about.get("texts")
        subject = Subject(
            name=f"saved run {folder.name!r}",
            standing=tuple(about["standing"]),
            plan=plan,
            ids=(*about["ids"], *about["tokens"]),
            texts=tuple(texts or ()),
            kv_heads=int(kv["heads"]),
            head_dim=int(kv["head_dim"]),
            dtype=_dtype(kv["dtype"]),
            checkpoint=about["checkpoint"]["fingerprint"],
        )
        if len(about["ids"]) != plan.shape.tokens:
            raise ValueError(f"{len(about['ids'])} ids, and {plan.shape.tokens} tokens in {PLAN}")
        return SavedSource(folder, subject, about["ranks"], kv["layers"])


def check_sum(folder: Path, name: str, about: dict[str, Any]) -> None:
    """Raises SavedError where a file is missing, or is not the one that was written."""
    if not (folder / name).is_file():
        raise SavedError(f"{str(folder)!r} is damaged: {name} is missing.")
    said = about.get("files", {}).get(name)
    if said is not None and sha256_of(folder / name) != said:
        raise SavedError(f"{str(folder)!r} is damaged: {name} is not what was written (its SHA-256 differs).")


@contextmanager
def damage_told(folder: Path) -> Iterator[None]:
    """What `run.json` lacks, or says in another form."""
    try:
        yield
    except SavedError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise SavedError(f"{str(folder)!r} is damaged: {RUN} has {what}.") from None


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"the dtype {name!r}, which torch does not know")
    return found


def read_record(
    folder: Path, about: dict[str, Any], source: SavedSource, rank: int, failure: str
) -> RankRecord:
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
        return RankRecord(
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
