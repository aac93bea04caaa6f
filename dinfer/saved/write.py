"""Write: saves a run as a folder, from what its session knows and what its ranks hold.

What several ranks hold alike is written once. A folder appears only when all of it has been written.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dinfer.files import WrittenPath
from dinfer.kv.digests import as_numbers, block_digests
from dinfer.kv.source import HeldSpans, LiveSource, Source
from dinfer.kv.view import say_size
from dinfer.monitor.signs import HangEvidence
from dinfer.saved import format as layout
from dinfer.saved.format import SavedError
from dinfer.saved.replay.record import Own
from dinfer.trace.trace import Trace
from dinfer.version import __version__


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A new folder to write to, which replaces `path` at the end; if writing fails it is deleted, and `path` is left as
    it was. Raises SavedError as `check_free` does."""
    target = Path(path).expanduser().resolve()
    check_free(target)
    part, old = (target.with_name(f".{target.name}.{uuid4().hex[:8]}.{what}") for what in ("part", "old"))
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise SavedError(f"no folder can be made in {str(target.parent)!r}: {error.strerror}.") from None
    try:
        yield part
        if target.exists():
            target.rename(old)
        try:
            part.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
        if old.exists():
            shutil.rmtree(old)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_free(target: Path) -> None:
    """Raises SavedError unless `target` can be created, or is an empty folder or a saved run, which may be replaced."""
    if target.exists() and not target.is_dir():
        raise SavedError(f"{str(target)!r} is a file: a run is saved as a folder, so give another name.")
    names = sorted(one.name for one in target.iterdir()) if target.is_dir() else []
    others = [name for name in names if not layout.is_part(name)]
    if names and (others or layout.RUN not in names):
        found = ", ".join((others or names)[:3])
        raise SavedError(
            f"{str(target)!r} holds {found}, and is no saved run that could be replaced: give another folder."
        )
    there = next(one for one in target.parents if one.exists())  # at worst the root
    if not there.is_dir():
        raise SavedError(f"{str(there)!r} is a file, so no folder can be made in it: give another name.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise SavedError(f"no folder can be made in {str(there)!r}: you have no permission to write there.")


# -- what is saved of a source


class SavedDigests(NamedTuple):
    """What some ranks hold, and by rank and layer the digests of their rows; `tensors`: those of the digests file."""

    held: dict[int, HeldSpans]
    rows: dict[tuple[int, int], Tensor]
    tensors: dict[str, Tensor]


def digests_of(source: Source, ranks: Sequence[int]) -> SavedDigests:
    """The digests of all rows, and the ledgers."""
    layers = range(source.subject.plan.shape.layers)
    held = dict(zip(ranks, source.held(ranks), strict=True))
    rows = {
        (rank, layer): source.rows(rank, layer, range(held[rank].rows[layer]))
        for rank in ranks
        for layer in layers
    }
    tensors = dict[str, Tensor]()
    for (rank, layer), digests in rows.items():
        first = layout.first_holder(source.subject.plan, ranks, layer)
        if rank == first or not torch.equal(digests, rows[first, layer]):
            tensors[layout.rows_name(rank, layer)] = digests
    for rank, noted in zip(ranks, source.noted(ranks, layers), strict=True):
        lines = [[*key, one.edited, *one.came, *one.announced] for key, one in sorted(noted.items())]
        unsigned = np.array(lines, dtype=np.uint64).reshape(-1, layout.LEDGER_COLUMNS)
        tensors[layout.ledger_name(rank)] = torch.from_numpy(unsigned.view(np.int64))
        for (chunk, layer), one in noted.items():
            span = source.subject.spans[chunk]
            if one.came != as_numbers(block_digests(rows[rank, layer][span.start : span.stop])):
                came = source.noted_rows(rank, chunk, layer)
                tensors |= {} if came is None else {layout.came_name(rank, layer, chunk): came}
    return SavedDigests(held, rows, tensors)


def values_of(source: Source, taken: SavedDigests, layer: int) -> dict[str, Tensor]:
    """The values of one layer: those of the first holder, and of the other ranks those that differ."""
    ranks, spans = list(taken.held), source.subject.spans
    first = layout.first_holder(source.subject.plan, ranks, layer)
    right, found = taken.rows[first, layer], dict[str, Tensor]()
    for rank in ranks:
        mine = taken.rows[rank, layer]
        for piece in layout.pieces(spans, len(mine)):
            at = slice(piece.start, piece.stop)
            if rank == first or not torch.equal(mine[at], right[at]):
                found[layout.piece_name(rank, piece.start)] = source.values(rank, layer, piece)
    return found


def hidden_of(source: LiveSource, ranks: Sequence[int]) -> dict[str, Tensor]:
    """The hidden states that have entered these ranks."""
    return {
        layout.hidden_name(rank, chunk, layer): source.hidden(rank, chunk, layer)
        for rank in ranks
        for chunk, layer in sorted(source.hidden_first(rank).items())
    }


# -- the folder


@dataclass(frozen=True)
class Content:
    """What to save: of these `ranks` of `source`, which is a LiveSource if hidden states are saved; `told`: what the
    session knows, as plain values; `layers`: those whose values to save; `hidden`: whether to save hidden states;
    `texts`: whether to save the tokens' texts; `own`: by rank, what a replay needs, if hidden states are saved."""

    source: Source
    ranks: tuple[int, ...]
    trace: Trace
    evidence: HangEvidence
    told: Mapping[str, Any]
    layers: tuple[int, ...]
    hidden: bool
    texts: bool
    own: Mapping[int, Own]


def write(content: Content, path: str | Path) -> Path:
    """Write the folder, and return where it is. Raises SavedError, and what the source raises; then nothing is left."""
    source, plan = content.source, content.source.subject.plan
    taken = digests_of(source, content.ranks)
    rows = sum(
        len(taken.rows[layout.first_holder(plan, content.ranks, layer), layer]) for layer in content.layers
    )
    say_size(
        rows * source.subject.row_nbytes,
        "kv=[…] saves only some layers, and kv=False only digests, which tell where KV differs, and not by what",
    )
    with replacing(path) as folder:
        (folder / layout.DESCRIBED).write_text(layout.DESCRIPTION, encoding="utf-8")
        (folder / layout.PLAN).write_text(plan.text(), encoding="utf-8")
        content.trace.export("jsonl", folder / layout.TRACE)
        _write_tensors(folder / layout.DIGESTS, taken.tensors)
        for layer in content.layers:
            _write_tensors(folder / layout.kv_file(layer), values_of(source, taken, layer))
        if content.hidden:
            assert isinstance(source, LiveSource)
            states = hidden_of(source, content.ranks)
            for rank, own in content.own.items():
                states |= {} if own.final is None else {layout.final_name(rank): own.final}
                for number, edit in enumerate(own.edits):
                    for what, edited in (("kv", edit.kv), ("hidden", edit.hidden)):
                        states |= {
                            layout.edit_name(rank, number, what, *key): one for key, one in edited.items()
                        }
            _write_tensors(folder / layout.HIDDEN, states)
        checked = (
            layout.PLAN,
            layout.TRACE,
            layout.DIGESTS,
            layout.HIDDEN,
        )  # values are by their rows' digests
        sums = {name: layout.sha256_of(folder / name) for name in checked if (folder / name).exists()}
        about = {**_about(content, taken), "files": sums}
        (folder / layout.RUN).write_text(
            json.dumps(about, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
        )
    where: Path = WrittenPath(Path(path).expanduser())
    return where


def _about(content: Content, taken: SavedDigests) -> dict[str, Any]:
    subject = content.source.subject
    tokens = subject.plan.shape.tokens
    return {
        "format": layout.FORMAT,
        "version": layout.VERSION,
        "dinfer": __version__,
        "ids": subject.ids[:tokens],
        "tokens": subject.ids[tokens:],
        "texts": subject.texts if content.texts else None,
        "kv": {
            "heads": subject.kv_heads,
            "head_dim": subject.head_dim,
            "dtype": subject.dtype_name,
            "layers": content.layers,
        },
        "hidden": content.hidden,
        "standing": subject.standing,
        "ranks": [{"rank": rank, **held._asdict()} for rank, held in taken.held.items()],
        "own": {
            str(rank): {
                "device": own.device,
                "tokens": own.tokens,
                "begun": own.begun,
                "final": own.final is not None,
                "edits": [
                    {"positions": edit.positions, "kv": list(edit.kv), "hidden": list(edit.hidden)}
                    for edit in own.edits
                ],
                "faults": [fault.as_dict() for fault in own.faults],
            }
            for rank, own in content.own.items()
        },
        "evidence": content.evidence.as_dict(),
        **content.told,
    }


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # a full disk, mostly
        raise SavedError(f"{path.name} could not be written: {error}") from None
    shutil.copymode(path.parent / layout.PLAN, path)  # safetensors makes it readable for this user alone


def chosen_layers(kv: bool | Sequence[int], count: int) -> tuple[int, ...]:
    """The layers whose values to save. Raises SavedError for an unknown one."""
    if isinstance(kv, bool):
        return tuple(range(count)) if kv else ()
    if wrong := [layer for layer in kv if layer not in range(count)]:
        raise SavedError(
            f"kv names layer {wrong[0]}; the layers are 0 to {count - 1}: name some of them, or say True or False."
        )
    return tuple(sorted(set(kv)))
