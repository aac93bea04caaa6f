"""Export: values of KV and hidden states as the rows of a table, and as a safetensors file."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dinfer.files import FolderError, WrittenPath, make_folder
from dinfer.kv.source import Subject
from dinfer.tabular import TableRow


def value_columns(dims: int) -> list[str]:
    """Of `value_rows`: K or V, the head, the token and its text, then each value."""
    return ["tensor", "head", "token", "text", *map(str, range(dims))]


def value_rows(subject: Subject, name: str, values: Tensor, places: Sequence[int]) -> Iterator[TableRow]:
    """A row for each head and token of K or V, [heads, places, head_dim]."""
    for head, tokens in enumerate(values):
        for place, row in zip(places, tokens.tolist(), strict=True):
            text = subject.texts[place] if place < len(subject.texts) else ""
            yield [name, head, place, text, *row]


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], about: Mapping[str, object]) -> Path:
    """Write tensors by name, and what they are as the file's metadata; the path of the file, which is replaced. Raises
    OSError."""
    target = make_folder(path)
    beside = target.with_name(
        f"{target.name}.{os.getpid()}.part"
    )  # what was there stays until all is written
    try:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            beside,
            metadata={name: str(value) for name, value in about.items()},
        )
        os.replace(beside, target)
    except SafetensorError as error:
        raise FolderError(None, f"{str(target)!r} cannot be written: {error}") from None
    finally:
        beside.unlink(missing_ok=True)
    return WrittenPath(target)
