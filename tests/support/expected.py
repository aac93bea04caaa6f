"""What transformers makes of a prompt, kept for all tests, and comparisons with it. Not a test."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from dinfer.engine.engine import Engine
from dinfer.model.decoder import Decoder
from dinfer.plan.ops import Op
from tests.support import reference
from tests.support.twin import Twin

NEW_TOKENS = 6


class Expected(NamedTuple):
    """`kv` and `final` of the chunked forward, KV of the unchunked one, and the greedy tokens of generate."""

    kv: list[Tensor]
    final: Tensor
    unchunked: list[Tensor]
    tokens: list[int]


def expected(decoder: Decoder, ids: Sequence[int], chunk_size: int) -> Expected:
    """The answer for a prompt; computed once."""
    return _expected(decoder, tuple(ids), chunk_size)


@cache
def _expected(decoder: Decoder, ids: tuple[int, ...], chunk_size: int) -> Expected:
    chunked = reference.chunked_forward(decoder, ids, chunk_size)
    tokens = reference.generate(decoder, ids, NEW_TOKENS)
    return Expected(chunked.kv, chunked.hidden[:, -1:], reference.unchunked(decoder, ids).kv, tokens)


def same_kv(engine: Engine, kv: Sequence[Tensor]) -> bool:
    """Whether the rank's cache holds exactly these bits, layer by layer."""
    assert engine.cache is not None
    return all(torch.equal(engine.cache.block(layer, 0, len(rows)), rows) for layer, rows in enumerate(kv))


def differing_blocks(engine: Engine, kv: Sequence[Tensor]) -> list[tuple[int, int]]:
    """The blocks (chunk, layer) that the rank says it has and that are not these bits."""
    assert engine.cache is not None
    made = [op for op in _done(engine) if op.kind == "layer" or (op.kind == "recv" and op.what == "kv")]
    rows = [(op.chunk, op.layer, engine.executor.state.rows(op.chunk)) for op in made]
    return [
        (chunk, layer)
        for chunk, layer, at in rows
        if not torch.equal(engine.cache.block(layer, at.start, at.stop), kv[layer][at.start : at.stop])
    ]


def _done(engine: Engine) -> list[Op]:
    stand = engine.executor.stand()
    lanes = engine.executor.plan.lanes[engine.rank]
    return [op for lane, n in zip(lanes, stand.positions, strict=True) for op in lane.ops[:n]]


def is_complete(twin: Twin, wanted: Expected) -> bool:
    """Whether every rank has come to its end with the reference's KV and final state, bit for bit."""
    for engine in twin.engines:
        executor = engine.executor
        if executor.failure or not executor.is_done() or executor.state.final is None:
            return False
        if not torch.equal(executor.state.final, wanted.final) or not same_kv(engine, wanted.kv):
            return False
    return True


def lane_threads() -> list[str]:
    """Names of the lane threads that live in this process."""
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("rank "))


def panel_threads() -> list[str]:
    """Names of the threads that panels have now."""
    return [thread.name for thread in threading.enumerate() if "panel" in thread.name]
