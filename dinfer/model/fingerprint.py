"""A fingerprint of a checkpoint, so that ranks can tell at the start whether they loaded the same one.

Cheap, because it reads samples: the configs, each safetensors file's name, size and header (names, dtypes,
shapes, places of all weights), and 16 spans of 64 KiB of each file's data, spread evenly from first to last
byte. Files of up to 1 MiB are read whole.

What it cannot see: a change of the data between the spans (one damaged bit, one edited row; a training step
changes all weights, so it is seen), the tokenizer, and weights edited after they were loaded. It is no
protection against someone who wants to deceive. Checkpoints with equal weights in other files have other
fingerprints.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dinfer.model.checkpoint import Spec, weight_files

SPAN = 64 * 1024
"""Bytes of one sample."""

SPANS = 16
"""Samples of one file."""

_CONFIGS = ("config.json", "generation_config.json")


def fingerprint(spec: Spec) -> str:
    """Return 64 hex digits, equal for copies of one checkpoint; `ModelError` where files are missing."""
    digest = hashlib.sha256(b"dinfer checkpoint 1")
    for name in _CONFIGS:
        file = spec.path / name
        _add(digest, name.encode(), file.read_bytes() if file.is_file() else b"")
    for file in weight_files(spec.path):
        _add(digest, file.name.encode(), *_sampled(file))
    return digest.hexdigest()


def sampled_spans(start: int, size: int) -> list[tuple[int, int]]:
    """Return what is read, as (from, to), of a file of `size` bytes whose data begins at `start`."""
    data = size - start
    if data <= SPANS * SPAN:
        return [(start, size)]
    begins = [start + (data - SPAN) * index // (SPANS - 1) for index in range(SPANS)]
    return [(begin, begin + SPAN) for begin in begins]


def _sampled(file: Path) -> Iterator[bytes]:
    """Yield a file's size, its header, and its samples."""
    size = file.stat().st_size
    yield str(size).encode()
    with file.open("rb", buffering=0) as stream:
        start = 8 + int.from_bytes(_read(stream, 0, 8), "little")
        yield _read(stream, 0, start)
        for begin, end in sampled_spans(start, size):
            yield _read(stream, begin, end)


def _read(stream: BinaryIO, begin: int, end: int) -> bytes:
    stream.seek(begin)
    return stream.read(end - begin)


def _add(digest: hashlib._Hash, *parts: bytes) -> None:
    """Add parts with their lengths, so that none can pass for the end of another."""
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
