"""Writing: a run as a folder, from what its session knows and what its ranks hold."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dinfer import __version__
from dinfer.session.hangs.evidence import Evidence
from dinfer.session.kv.live import Live
from dinfer.session.kv.view import say_size
from dinfer.session.replaying.recorded import Own
from dinfer.session.saved.description import DESCRIPTION
from dinfer.session.saved.folder import check_free, replacing
from dinfer.session.saved.format import (
    DESCRIBED,
    DIGESTS,
    FORMAT,
    HIDDEN,
    PLAN,
    RUN,
    TRACE,
    VERSION,
    SavedError,
    kv_file,
)
from dinfer.session.saved.own import own_tensors, own_values
from dinfer.session.saved.taking import Taken, size_of, take_digests, take_hidden, take_layer
from dinfer.trace.trace import Trace

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
    evidence: Evidence
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


def sha256_of(path: Path) -> str:
    """In hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
