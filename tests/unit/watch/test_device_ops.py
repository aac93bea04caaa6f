"""When ops on a device are over: by their Work, asked by a thread that never waits. Without a device here."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dinfer.watch.probe.captures import captures
from dinfer.watch.probe.reading import read
from dinfer.watch.probe.recorder import NO_GROUP, OpRecorder, PendingOp
from dinfer.watch.probe.records import NOTHING
from dinfer.watch.probe.works import HELD_BYTES, Works


class DeviceWork:
    """As NCCL's: `wait` returns at once, and the end shows in `is_completed`."""

    def __init__(self) -> None:
        self.is_over = False

    def is_completed(self) -> bool:
        return self.is_over


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[OpRecorder]:
    """Records into a folder."""
    made = OpRecorder(tmp_path)
    yield made
    made.close()


def issue(recorder: OpRecorder, peer: int = NOTHING, nbytes: int = 4) -> PendingOp:
    """An op on a device."""
    kind = "all_reduce" if peer == NOTHING else "send"
    pending = recorder.issued(kind, NO_GROUP, peer, NOTHING, [torch.zeros(1)], True, None)
    assert pending is not None
    pending.on_device, pending.nbytes = True, nbytes
    return pending


def states(recorder: OpRecorder) -> list[str]:
    """Of all ops, in the order of issue."""
    return [op.state for op in read(recorder.folder)[0].ops]


def test_what_was_issued_before_an_op_that_is_over_is_over(recorder: OpRecorder) -> None:
    works = Works(recorder)
    made = [DeviceWork() for _ in range(3)]
    for number, work in enumerate(made):  # the first is too large to be asked itself
        works.hand_over(work, issue(recorder, nbytes=4 if number else HELD_BYTES + 1))
    assert works.look()
    assert states(recorder) == ["issued"] * 3
    made[1].is_over = True
    assert works.look()
    assert states(recorder) == ["done", "done", "issued"]
    made[2].is_over = True
    assert not works.look()
    assert states(recorder) == ["done"] * 3


def test_pairs_of_ranks_end_each_in_their_own_order(recorder: OpRecorder) -> None:
    works, first, second = Works(recorder), DeviceWork(), DeviceWork()
    works.hand_over(first, issue(recorder, peer=1))
    works.hand_over(second, issue(recorder, peer=2))
    second.is_over = True
    assert works.look()
    assert states(recorder) == ["issued", "done"]


def test_of_large_ops_only_the_last_is_held(recorder: OpRecorder) -> None:
    works, made = Works(recorder), [DeviceWork() for _ in range(2)]
    for work in made:
        works.hand_over(work, issue(recorder, nbytes=HELD_BYTES + 1))
    first, second = (weakref.ref(work) for work in made)
    del made, work
    gc.collect()
    assert first() is None
    last = second()
    assert last is not None
    last.is_over = True
    del last
    for _ in range(3):  # also what is on its way to the caller is let go
        works.look()
    gc.collect()
    assert second() is None
    assert states(recorder) == ["done", "done"]


def test_nothing_is_asked_while_a_graph_is_captured(recorder: OpRecorder) -> None:
    class Graph:
        def capture_begin(self) -> None:
            assert not works.look()
            works.hand_over(captured, issue(recorder))

        def capture_end(self) -> None:
            assert not works.look()

    works, before, captured = Works(recorder), DeviceWork(), DeviceWork()
    works.hand_over(before, issue(recorder))
    before.is_over = True
    graph = Graph()
    captures.beginning(graph.capture_begin)()
    captures.ending(graph.capture_end)()
    assert states(recorder) == ["issued", "done"]
    works.look()
    assert states(recorder) == ["done", "done"]
