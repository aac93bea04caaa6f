"""On three real ranks: a wrong bit found by a bisect, mended by a graft; and a link that is slow on purpose."""

from __future__ import annotations

from pathlib import Path

import pytest

import dinfer
from dinfer.run.run import Run
from dinfer.session.session import Session
from tests.support.twin import prompt

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

MODEL = {"layers": 6}
IDS = tuple(prompt(22))
MS = 20.0


def begun(session: Session) -> Run:
    return session.prefill(IDS, paused=True, chunk_size=8, max_new_tokens=4)


def finish(run: Run) -> None:
    run.resume()
    assert run.wait(60.0).state == "done"


def test_from_a_wrong_bit_to_its_block_and_back(session: Session, tmp_path: Path) -> None:
    run = begun(session)
    finish(run)
    assert not run.bisect().found  # bit for bit what this process computes
    right = dinfer.open(run.save(tmp_path / "right"))
    run = begun(session)
    run.inject("bitflip", rank=2, layer=3, chunk=1, tensor="V", bit=29)
    finish(run)
    wrong = run.sha256()
    for against in ("reference", right):
        answer = run.bisect(against)
        assert (answer.part, answer.chunk, answer.layer, answer.rank) == ("V", 1, 3, 2)
        assert (answer.alone, answer.also) == (True, None)
    assert run.sha256() == wrong
    assert not run.edited
    run.graft(layer=3, chunk=1, source=right)
    assert len(set(run.sha256())) == 1
    assert run.edited == ["K and V of block c1 l3 on rank 2"]
    assert "K and V of block c1 l3 is what it was on rank 2" in run.undo()
    assert run.sha256() == wrong


def test_a_slow_link_over_gloo(session: Session) -> None:
    run = begun(session)
    run.inject("slow link", source=0, target=2, ms=MS)
    finish(run)
    links = {(one.source, one.target): one.median_transfer_s for one in run.trace.link_figures()}
    assert links[0, 2] >= MS / 1e3
    assert max(links, key=links.__getitem__) == (0, 2)
    assert "hit: #1 slow link 0→2, 20 ms more for each message" in str(run.where())
    run.faults.clear()
    run.restart()
    finish(run)
    links = {(one.source, one.target): one.median_transfer_s for one in run.trace.link_figures()}
    assert links[0, 2] < MS / 1e3
