"""What transformers itself makes of a prompt, kept for all tests of a session. Not a test."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

from dinfer.model.cache import KVCache
from dinfer.model.decoder import Decoder
from tests.support.reference import chunked_forward, generate


class Expected(NamedTuple):
    """`kv_sha256` is of the chunked forward; `tokens` are those of greedy `generate`."""

    kv_sha256: str
    tokens: list[int]


@cache
def expected(model: Path, ids: tuple[int, ...], chunk_size: int, new_tokens: int) -> Expected:
    """The answer for a prompt."""
    decoder = Decoder.load(model)
    kv = chunked_forward(decoder, ids, chunk_size).kv
    cache = KVCache(len(kv), len(ids), decoder.kv_heads, decoder.head_dim, decoder.dtype, "cpu")
    for layer, rows in enumerate(kv):
        cache.block(layer, 0, len(ids)).copy_(rows)
    return Expected(cache.sha256(len(ids)), generate(decoder, ids, new_tokens))
