"""Runs to be saved, and their ranks' memory. Not a test."""

from __future__ import annotations

from typing import Any

from dinfer.engine.engine import Engine
from dinfer.model.cache import KVCache
from dinfer.run.run import Run
from dinfer.session.session import Session
from tests.support.threads import engines

FILES = ["plan.txt", "trace.jsonl", "digests.safetensors", "hidden.safetensors", "kv.layer2.safetensors"]
"""of a saved run"""

PROMPT = "Lima 是秘鲁的首都, isn't it so?"
LAYERS, HEADS, DIMS, TOKENS = 4, 2, 16, 37


def done(session: Session, **parameters: Any) -> Run:
    """A run at the end of its prefill."""
    run = session.prefill(PROMPT, **{"chunk_size": 8, **parameters})
    run.wait(60)
    return run


def decoded(session: Session) -> Run:
    """A run with prefill done, of TOKENS tokens in 5 chunks, and 4 new tokens."""
    run = done(session)
    run.decode(4)
    return run


def cache(session: Session, rank: int) -> KVCache:
    """A rank's memory of the current run."""
    engine = engines(session)[rank]
    assert isinstance(engine, Engine)
    return engine.prompt.state.cache
