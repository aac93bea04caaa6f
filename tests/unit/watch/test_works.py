"""When ops on the CPU are over that nobody in Python waits for: C++ code may, as DDP's does, which drops the Work."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import torch

from dinfer.watch.probe.groups import NO_GROUP
from dinfer.watch.probe.reading import read
from dinfer.watch.probe.recorder import OpRecorder, PendingOp
from dinfer.watch.probe.records import NOTHING
from dinfer.watch.probe.start import Probe
from dinfer.watch.probe.works import MOST_HELD, Works

LOOKS = 5


class CpuWork:
    """As gloo's of a collective: it says when it is over."""

    over = False

    def is_completed(self) -> bool:
        return self.over


def issue(recorder: OpRecorder, kind: str, peer: int = NOTHING) -> PendingOp:
    """An op on the CPU."""
    pending = recorder.issued(kind, NO_GROUP, peer, NOTHING, [torch.zeros(1)], True, None)
    assert pending is not None
    return pending


def states(recorder: OpRecorder) -> list[str]:
    """Of all ops, in the order of issue."""
    return [op.state for op in read(recorder.folder)[0].ops]


def test_a_dropped_collective_is_followed_until_it_is_over_and_not_longer(recorder: OpRecorder) -> None:
    works, made = Works(recorder), [CpuWork(), CpuWork()]
    dropped = [weakref.ref(work) for work in made]
    for work in made:  # as DDP's buckets: the next one is issued while the first is under way
        works.hand_over(work, issue(recorder, "all_reduce"))
    del work, made
    for _ in range(LOOKS):
        works.look()
    assert states(recorder) == ["issued", "issued"]
    for reference in dropped:
        found = reference()
        assert found is not None
        found.over = True
    del found
    for _ in range(LOOKS):
        works.look()
    assert states(recorder) == ["done", "done"]
    gc.collect()
    assert [reference() for reference in dropped] == [None, None]


def test_a_dropped_message_is_not_held_since_nothing_says_that_it_is_over(recorder: OpRecorder) -> None:
    works, work = Works(recorder), CpuWork()
    dropped = weakref.ref(work)
    works.hand_over(work, issue(recorder, "send", peer=1))
    del work
    for _ in range(LOOKS):
        works.look()
    gc.collect()
    assert dropped() is None


def test_at_its_end_a_process_asks_once_more(tmp_path: Path) -> None:
    probe, work = Probe(tmp_path), CpuWork()
    probe._works.hand_over(work, issue(probe.recorder, "all_reduce"))
    work.over = True
    probe.stop()
    assert [op.state for op in read(tmp_path)[0].ops] == ["done"]


def test_no_more_than_some_are_held(recorder: OpRecorder) -> None:
    works = Works(recorder)
    held = []
    for _ in range(MOST_HELD + 10):
        work = CpuWork()
        held.append(weakref.ref(work))
        works.hand_over(work, issue(recorder, "all_reduce"))
    del work
    gc.collect()
    assert sum(one() is not None for one in held) <= MOST_HELD + 1
