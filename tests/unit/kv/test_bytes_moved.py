"""What a diff moves of caches of Qwen3-4B's KV shape: little where they are equal, and of others what differs. `-s`
prints it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dinfer.kv.difference import Diff
from dinfer.run.run import Run
from dinfer.session.session import Session
from tests.support.threads import session_on_threads
from tests.support.tiny import tiny_checkpoint
from tests.support.twin import prompt

LAYERS = 4
SHAPE: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128}
"""4 KiB a token and layer in bf16, as Qwen3-4B"""
MOST = 0.05


MODEL = {"layers": LAYERS, "dtype": "bfloat16", **SHAPE}


def share(run: Run, found: Diff) -> float:
    """Of the bytes of one rank's cache, though three are compared."""
    subject = run.source().subject
    return found.bytes_moved / (len(subject.prompt) * subject.plan.shape.layers * subject.row_nbytes)


def done(session: Session, tokens: int, chunk_size: int) -> Run:
    run = session.prefill(prompt(tokens), chunk_size=chunk_size)
    run.wait(60)
    return run


@pytest.mark.parametrize(("tokens", "chunk_size"), [(26, 8), (512, 128), (512, 16)])
def test_a_diff_of_equal_caches_moves_under_a_twentieth_of_one(
    session: Session, tokens: int, chunk_size: int
) -> None:
    run = done(session, tokens, chunk_size)
    found = run.kv().diff()
    assert found.equal
    moved = share(run, found)
    print(f"\n{tokens} tokens by {chunk_size}: {found.bytes_moved:,} bytes, {moved:.3%} of one rank's cache")
    assert 0 < moved < MOST


def test_a_diff_of_one_wrong_value_moves_little_more(session: Session) -> None:
    run = done(session, 512, 128)
    run.inject("bitflip", rank=2, layer=1, token=300, head=5, dim=17)
    found = run.kv().diff()
    assert [(one.token, one.head, one.dim) for one in found.differences] == [(300, 5, 17)]
    moved = share(run, found)
    print(f"\none wrong value: {found.bytes_moved:,} bytes, {moved:.3%} of one rank's cache")
    assert moved < MOST


def test_equal_runs_are_compared_as_cheaply(session: Session, tmp_path: Path) -> None:
    run = done(session, 512, 128)
    model = tiny_checkpoint(tmp_path, layers=LAYERS, dtype="bfloat16", **SHAPE)
    with session_on_threads(2, model) as other:
        found = run.kv().diff(done(other, 512, 128))
        assert found.equal
        moved = share(run, found)
        print(f"\ntwo runs: {found.bytes_moved:,} bytes, {moved:.3%} of one rank's cache")
        assert moved < MOST
