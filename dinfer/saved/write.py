"""Writing: a run as a folder, from what its session knows and what its ranks hold."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dinfer.cluster.kv import Live
from dinfer.kv.view import say_size
from dinfer.monitor.signs import HangEvidence
from dinfer.saved.collect import Taken, size_of, take_digests, take_hidden, take_layer
from dinfer.saved.format import (
    DESCRIBED,
    DESCRIPTION,
    DIGESTS,
    FORMAT,
    HIDDEN,
    PLAN,
    RUN,
    TRACE,
    VERSION,
    SavedError,
    is_part,
    kv_file,
    own_tensors,
    own_values,
    sha256_of,
)
from dinfer.saved.replay.record import Own
from dinfer.trace.trace import Trace
from dinfer.version import __version__


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A folder to write to, which takes the place of `path` once all is written, and is gone if that fails. Raises
    SavedError where something is there that is not a saved run."""
    target = Path(path).expanduser().resolve()
    check_free(target)
    part = _beside(target, "part")
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise SavedError(f"no folder can be made in {str(target.parent)!r}: {error.strerror}.") from None
    try:
        yield part
        _put(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_free(target: Path) -> None:
    """Raises SavedError unless nothing is there, or an empty folder, or a saved run, and the folder can be made."""
    if target.exists() and not target.is_dir():
        raise SavedError(f"{str(target)!r} is a file: a run is saved as a folder, so give another name.")
    names = sorted(one.name for one in target.iterdir()) if target.is_dir() else []
    others = [name for name in names if not is_part(name)]
    if names and (others or RUN not in names):
        found = ", ".join((others or names)[:3])
        raise SavedError(
            f"{str(target)!r} holds {found}, and is no saved run that could be replaced: give another folder."
        )
    there = next(one for one in target.parents if one.exists())  # the root at last
    if not there.is_dir():
        raise SavedError(f"{str(there)!r} is a file, so no folder can be made in it: give another name.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise SavedError(f"no folder can be made in {str(there)!r}: you may not write there.")


def _put(part: Path, target: Path) -> None:
    if not target.exists():
        part.rename(target)
        return
    old = _beside(target, "old")
    target.rename(old)
    try:
        part.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)


def _beside(target: Path, what: str) -> Path:
    return target.with_name(f".{target.name}.{uuid4().hex[:8]}.{what}")


CHECKED = (PLAN, TRACE, DIGESTS, HIDDEN)
"""files whose SHA-256 is written down; values are checked by their rows' digests"""


@dataclass(frozen=True)
class Content:
    """What to save. `source` is asked of these `ranks`; `told`: what the session knows, as plain values; `layers`: of
    which to save values; `texts`: whether to save those of tokens; `own`: by rank, for replays, where hidden states are
    to be saved."""

    source: Live
    ranks: tuple[int, ...]
    trace: Trace
    evidence: HangEvidence
    told: Mapping[str, Any]
    layers: tuple[int, ...]
    hidden: bool
    texts: bool
    own: Mapping[int, Own]


def write(content: Content, path: str | Path) -> Path:
    """Write the folder; where it is. Raises SavedError, and what a source raises; nothing is left behind then."""
    check_free(Path(path).expanduser().resolve())  # before anything is fetched
    source, plan = content.source, content.source.subject.plan
    taken = take_digests(source, content.ranks)
    size = size_of(source, taken, content.layers)
    say_size(
        size, "kv=[…] saves some layers only, and kv=False digests alone, which tell where, and not what"
    )
    with replacing(path) as folder:
        (folder / DESCRIBED).write_text(DESCRIPTION, encoding="utf-8")
        (folder / PLAN).write_text(plan.text(), encoding="utf-8")
        content.trace.export("jsonl", folder / TRACE)
        _write_tensors(folder / DIGESTS, taken.tensors)
        for layer in content.layers:
            _write_tensors(folder / kv_file(layer), take_layer(source, taken, layer))
        if content.hidden:
            states = take_hidden(source, content.ranks)
            for rank, own in content.own.items():
                states |= own_tensors(rank, own)
            _write_tensors(folder / HIDDEN, states)
        about = {**_about(content, taken), "files": _sums(folder)}
        (folder / RUN).write_text(json.dumps(about, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return Path(path).expanduser()


def _about(content: Content, taken: Taken) -> dict[str, Any]:
    subject = content.source.subject
    tokens = subject.plan.shape.tokens
    return {
        "format": FORMAT,
        "version": VERSION,
        "dinfer": __version__,
        "ids": list(subject.ids[:tokens]),
        "tokens": list(subject.ids[tokens:]),
        "texts": list(subject.texts) if content.texts else None,
        "kv": {
            "heads": subject.kv_heads,
            "head_dim": subject.head_dim,
            "dtype": str(subject.dtype).removeprefix("torch."),
            "layers": list(content.layers),
        },
        "hidden": content.hidden,
        "standing": list(subject.standing),
        "ranks": [{"rank": rank, **held._asdict()} for rank, held in taken.held.items()],
        "own": {str(rank): own_values(own) for rank, own in content.own.items()},
        "evidence": content.evidence.as_dict(),
        **content.told,
    }


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # a full disk, mostly
        raise SavedError(f"{path.name} could not be written: {error}") from None
    shutil.copymode(path.parent / PLAN, path)  # not this user's alone, as safetensors makes it


def _sums(folder: Path) -> dict[str, str]:
    return {name: sha256_of(folder / name) for name in CHECKED if (folder / name).exists()}


def chosen_layers(kv: bool | Sequence[int], count: int) -> tuple[int, ...]:
    """Which layers' values to save. Raises SavedError for one that there is not."""
    if isinstance(kv, bool):
        return tuple(range(count)) if kv else ()
    if isinstance(kv, str) or not isinstance(kv, Iterable):
        raise SavedError(
            f"kv is {kv!r}; it must be True, False, or a list of layers, such as kv=[0, {count - 1}]."
        )
    if wrong := [layer for layer in kv if layer not in range(count)]:
        raise SavedError(
            f"kv names layer {wrong[0]}; the layers are 0 to {count - 1}: name some of them, or say True or False."
        )
    return tuple(sorted(set(kv)))
