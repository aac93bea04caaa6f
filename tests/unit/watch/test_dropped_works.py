"""Ops on the CPU for which C++ code waits, as DDP's does: Python has no Work of them any more, and never waits."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dinfer.watch.probe.reading import read
from dinfer.watch.probe.recorder import NO_GROUP, OpRecorder, PendingOp
from dinfer.watch.probe.records import NOTHING
from dinfer.watch.probe.works import MOST_HELD, Works


class UnseenWork:
    """One for which C++ code waits."""

    def __init__(self) -> None:
        self.is_over = False

    def is_completed(self) -> bool:
        return self.is_over


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[OpRecorder]:
    made = OpRecorder(tmp_path)
    yield made
    made.close()


def issue(recorder: OpRecorder, peer: int = NOTHING) -> PendingOp:
    kind = "all_reduce" if peer == NOTHING else "send"
    pending = recorder.issued(kind, NO_GROUP, peer, NOTHING, [torch.zeros(1)], False, None)
    assert pending is not None
    return pending


def states(recorder: OpRecorder) -> list[str]:
    return [op.state for op in read(recorder.folder)[0].ops]


@pytest.mark.parametrize("goes_on", [False, True], ids=["nothing follows", "another op follows"])
def test_a_collective_that_takes_longer_than_some_looks_has_its_end(
    recorder: OpRecorder, goes_on: bool
) -> None:
    works, work = Works(recorder), UnseenWork()
    works.hand_over(work, issue(recorder))
    unseen = weakref.ref(work)
    del work
    if goes_on:
        works.hand_over(UnseenWork(), issue(recorder, peer=1))
    for _ in range(4):
        works.look()
    gc.collect()
    under_way = unseen()
    assert under_way is not None
    assert states(recorder)[0] == "waiting"
    under_way.is_over = True
    del under_way
    works.look()
    assert states(recorder)[0] == "done"
    gc.collect()
    assert unseen() is None, "nothing is held that is over"


def test_a_message_is_not_held_since_nobody_says_its_end(recorder: OpRecorder) -> None:
    works, work = Works(recorder), UnseenWork()
    works.hand_over(work, issue(recorder, peer=1))
    unseen = weakref.ref(work)
    del work
    for _ in range(3):
        works.look()
    gc.collect()
    assert unseen() is None


def test_no_more_than_some_are_held(recorder: OpRecorder) -> None:
    works = Works(recorder)
    held = []
    for _ in range(MOST_HELD + 10):
        work = UnseenWork()
        held.append(weakref.ref(work))
        works.hand_over(work, issue(recorder))
    del work
    gc.collect()
    assert sum(one() is not None for one in held) <= MOST_HELD + 1
