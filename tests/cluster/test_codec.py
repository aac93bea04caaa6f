"""Codecs between processes, over gloo: ranks hold the same bytes, fewer travel, and a fault is still found."""

from __future__ import annotations

import pytest

from dinfer.run.run import Run
from dinfer.session.session import Session
from dinfer.severity import Severity
from tests.support.twin import prompt

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

IDS = tuple(prompt(40))


def ended(session: Session, codec: str, strategy: str) -> Run:
    run = session.prefill(
        IDS, chunk_size=8, max_new_tokens=4, codec=codec, sync_strategy=strategy, paused=True
    )
    run.step("layer", 3)
    run.step_back("layer", 2)
    run.resume()
    assert run.wait(60).state == "done"
    return run


def wire_bytes(run: Run) -> int:
    return sum(e.bytes or 0 for e in run.trace.events if (e.kind, e.what) == ("recv", "kv"))


def test_ranks_hold_the_same_in_fewer_bytes(session: Session) -> None:
    plain = wire_bytes(ended(session, "none", "pairwise"))
    run = ended(session, "k=int8,v=fp8", "pairwise")
    assert wire_bytes(run) < plain / 2
    expected = run.sha256()
    assert len(set(expected)) == 1
    run = ended(session, "k=int8,v=fp8", "ring")
    assert run.sha256() == expected
    run.decode()
    assert run.kv().diff().equal
    assert run.compare("reference").severity == Severity.NOTE
    run.inject("bitflip", rank=2, layer=0, chunk=1, where="memory")
    assert run.kv().diff().severity == Severity.ERROR
