"""Two faults in one run: the first line of a diff, and of a comparison with the reference, names both."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dinfer.run.run import Run
from dinfer.session.session import Session
from tests.support.threads import session_on_threads
from tests.support.traces import PROMPT

DEADLINE_S = 60.0

AGAINST = r"nan against 1\.7151\d+"
"""the last digits are the processor's"""


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with session_on_threads(2, Path("demo")) as session:
        yield session


def ended(session: Session, *faults: tuple[str, int, int, int]) -> Run:
    """A run with these faults in memory: kind, rank, layer, chunk."""
    run = session.prefill(PROMPT, chunk_size=8, paused=True)
    for kind, rank, layer, chunk in faults:
        run.inject(kind, rank=rank, layer=layer, chunk=chunk, where="memory")
    run.resume()
    run.wait(DEADLINE_S)
    return run


def headlines(run: Run) -> list[str]:
    return [str(run.kv().diff()).partition("\n")[0], str(run.compare("reference")).partition("\n")[0]]


def test_a_flipped_bit_and_a_nan(session: Session) -> None:
    diff, compared = headlines(ended(session, ("bitflip", 1, 1, 1), ("nan", 0, 4, 2)))
    assert diff.startswith("rank 1 differs at layer 1, K, head 0, token 8 ")
    assert "; also rank 0 differs at layer 4, K, head 0, token 16 " in diff
    assert re.search(rf"{AGAINST}$", diff)
    assert "bytes: rank 1 at layer 1, chunk 1, K" in compared
    assert "; also rank 0 at layer 4, chunk 2, K" in compared
    assert re.search(rf"{AGAINST}$", compared)


def test_a_nan_comes_before_others_and_those_are_counted(session: Session) -> None:
    faults = [("bitflip", 1, 1, 1), ("bitflip", 0, 3, 0), ("bitflip", 0, 4, 1), ("nan", 0, 4, 2)]
    diff, _ = headlines(ended(session, *faults))
    assert "; also rank 0 differs at layer 4, K, head 0, token 16 " in diff
    assert re.search(rf"{AGAINST}; and 2 more blocks$", diff)


def test_one_fault_is_named_alone(session: Session) -> None:
    diff, compared = headlines(ended(session, ("bitflip", 1, 1, 1)))
    assert "also" not in diff
    assert "also" not in compared
