"""Checkpoints whose rotary angles may depend on the length are also compared with the prompt fed at once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from dinfer.cluster.threads import LocalRanks
from dinfer.run.run import Run
from dinfer.session.session import Session
from tests.support.threads import session_on_threads
from tests.support.tiny import tiny_checkpoint
from tests.support.twin import prompt

RANKS, CHUNK, NEW = 2, 4, 2
SHORT, LONG = 32, 128
FACTORS = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}


@pytest.fixture
def long_rope(tmp_path: Path) -> Iterator[Session]:
    """Its angles change beyond 32 tokens, up to which dinfer runs it."""
    model = tiny_checkpoint(tmp_path / "model", "phi3", layers=2, max_position_embeddings=LONG)
    config = json.loads((model / "config.json").read_text())
    scaling = {"type": "longrope", **FACTORS}
    changes = {"rope_parameters": None, "rope_scaling": scaling, "original_max_position_embeddings": SHORT}
    (model / "config.json").write_text(json.dumps({**config, **changes}))
    with session_on_threads(RANKS, model) as session:
        yield session


def done(session: Session, tokens: int = 12, chunk_size: int = CHUNK) -> Run:
    run = session.prefill(prompt(tokens), chunk_size=chunk_size, max_new_tokens=NEW)
    run.decode(NEW)
    return run


def test_both_results_are_in_the_answer(long_rope: Session) -> None:
    found = done(long_rope).compare("reference")
    assert found.equal
    assert found.at_once is not None
    assert not found.at_once.chunked
    assert found.at_once.within_tolerance
    first, second = str(found).splitlines()[:2]
    assert first.startswith("equal: both ranks hold")
    assert second.startswith("with the prompt fed at once, within tolerance: ")


def test_angles_that_change_with_the_chunks_are_seen_by_the_second_alone(long_rope: Session) -> None:
    """As if dinfer had misjudged where they change: the run and its chunked reference are then wrong alike."""
    assert isinstance(long_rope.ranks, LocalRanks)
    decoder = long_rope.ranks.hosts[0].decoder
    assert decoder is not None
    config = decoder.model.config
    config.original_max_position_embeddings = config.rope_parameters["original_max_position_embeddings"] = 6
    found = done(long_rope).compare("reference")
    assert found.equal
    assert found.at_once is not None
    assert not found.at_once.within_tolerance
    assert "with the prompt fed at once, beyond tolerance: first at layer 0, chunk 0, K" in str(found)


def test_who_asks_for_one_gets_one(long_rope: Session) -> None:
    run = done(long_rope)
    assert run.compare(chunked=True).at_once is None
    assert not run.compare(chunked=False).chunked
    assert done(long_rope, chunk_size=12).compare().at_once is None  # one chunk: it was fed at once


def test_other_checkpoints_are_compared_once(model: Path) -> None:
    with session_on_threads(RANKS, model) as session:
        assert done(session).compare().at_once is None
