"""When ops on a device are over: by their Work, asked by a thread that never waits. Without a device here."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch

from dinfer.watch.probe.captures import captures
from dinfer.watch.probe.groups import NO_GROUP, facts_of
from dinfer.watch.probe.reading import read
from dinfer.watch.probe.recorder import OpRecorder, PendingOp
from dinfer.watch.probe.records import NOTHING
from dinfer.watch.probe.works import HELD_BYTES, Works


class DeviceWork:
    """As NCCL's: `wait` returns at once, and the end shows in `is_completed`."""

    def __init__(self) -> None:
        self.is_over = False

    def is_completed(self) -> bool:
        return self.is_over


def issue(
    recorder: OpRecorder, peer: int = NOTHING, nbytes: int = 4, is_async: bool | None = None
) -> PendingOp:
    """An op on a device."""
    kind = "all_reduce" if peer == NOTHING else "send"
    pending = recorder.issued(kind, NO_GROUP, peer, NOTHING, [torch.zeros(1)], is_async is not False, None)
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


def test_ops_without_a_work_are_over_when_their_stream_has_come_so_far(
    recorder: OpRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collective whose caller waits at once runs on the caller's stream, and NCCL gives no Work for it."""
    works, event = Works(recorder), DeviceWork()
    monkeypatch.setattr("dinfer.watch.probe.works.stream_event", lambda _: event)
    works.without_work(issue(recorder, is_async=False), torch.zeros(1))
    assert works.look()
    assert states(recorder) == ["waiting"]
    event.is_over = True
    assert not works.look()
    assert states(recorder) == ["done"]


def test_an_op_without_a_work_is_over_while_a_graph_is_captured(recorder: OpRecorder) -> None:
    works = Works(recorder)
    captures.beginning(lambda: works.without_work(issue(recorder), torch.zeros(1)))()
    captures.ending(lambda: None)()
    assert states(recorder) == ["done"]


class BatchingGroup:
    """As torch's ProcessGroup on NCCL: within a batch ops give no Work, its end gives one for all."""

    def __init__(self, work: object) -> None:
        self._work = work

    def start(self) -> None:
        """A batch begins."""

    def end(self, device: torch.device) -> object:
        """All of it is issued."""
        assert device.type == "cpu"  # there is no other here
        return self._work


def test_the_parts_of_a_batch_are_over_with_the_work_at_its_end(recorder: OpRecorder) -> None:
    works, work, lone = Works(recorder), DeviceWork(), DeviceWork()
    group = BatchingGroup(work)
    works.hand_over(lone, issue(recorder, peer=1))  # on a communicator of this pair alone
    works._starting(BatchingGroup.start)(group)
    for peer in (1, 2):
        works.without_work(issue(recorder, peer=peer), torch.zeros(1))
    assert works.look()
    assert works._ending(BatchingGroup.end)(group, torch.device("cpu")) is work
    assert states(recorder) == ["issued"] * 3
    work.is_over = True
    assert works.look()
    assert states(recorder) == ["issued", "done", "done"]


def test_a_batch_without_a_work_is_over_when_its_stream_has_come_so_far(
    recorder: OpRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    works, event, group = Works(recorder), DeviceWork(), BatchingGroup(None)
    monkeypatch.setattr("dinfer.watch.probe.works.stream_event", lambda _: event)
    works._starting(BatchingGroup.start)(group)
    works.without_work(issue(recorder), torch.zeros(1))
    works._ending(BatchingGroup.end)(group, torch.device("cpu"))
    assert works.look()
    assert states(recorder) == ["waiting"]
    event.is_over = True
    works.look()
    assert states(recorder) == ["done"]


def test_a_device_that_has_failed_is_said_of_the_op_and_switches_nothing_off(recorder: OpRecorder) -> None:
    class Failed(DeviceWork):
        def is_completed(self) -> bool:
            raise RuntimeError("device-side assert")

    works = Works(recorder)
    works.hand_over(Failed(), issue(recorder))
    assert not works.look()
    assert states(recorder) == ["failed"]
    assert not recorder.is_off


def test_no_work_is_kept_once_recording_is_off(tmp_path: Path) -> None:
    recorder = OpRecorder(tmp_path, on_off=lambda: works.clear())
    works = Works(recorder)
    made = [DeviceWork() for _ in range(2)]
    works.hand_over(made[0], issue(recorder))
    left = [weakref.ref(work) for work in made]
    recorder.switch_off("a part", ValueError("a bug"))
    late = issue(OpRecorder(tmp_path))
    works.hand_over(made[1], late)
    del made
    gc.collect()
    assert [one() for one in left] == [None, None]


class OnDevice:
    """Of a tensor, as far as ops are recorded, on a device that is not here."""

    is_cpu, is_meta, dtype = False, False, torch.float32
    device = torch.device("cuda", 0)

    def __init__(self, *shape: int) -> None:
        self.shape, self.nbytes = torch.Size(shape), 4 * shape[0]


def test_the_backend_that_serves_an_op_follows_its_device(recorder: OpRecorder) -> None:
    records = recorder.open()
    assert records is not None
    backend = "cpu:gloo,cuda:nccl"
    group = facts_of(records.groups.number((1, "0", (0, 1), backend, "default_pg")), (0, 1), backend)
    for tensor in (torch.zeros(1), OnDevice(1), OnDevice(1)):
        recorder.issued("send", group, 1, 7, [tensor], False, None)
    recorder.issued("barrier", group, NOTHING, NOTHING, (), False, None, OnDevice(1))
    recorder.issued("all_reduce", group, NOTHING, NOTHING, [torch.zeros(1)], False, None)
    ops = read(recorder.folder)[0].ops
    assert [(op.kind, op.backend, op.number) for op in ops] == [
        ("send", "gloo", 0),
        ("send", "nccl", 0),
        ("send", "nccl", 1),
        ("barrier", "nccl", 0),
        ("all_reduce", "gloo", 0),
    ]


def test_parts_that_differ_count_together(recorder: OpRecorder) -> None:
    """NCCL gathers parts of other sizes: of these each rank has all, and they must be as large on all ranks."""
    parts = [OnDevice(1), OnDevice(5)]
    recorder.issued("all_gather", NO_GROUP, NOTHING, NOTHING, parts[:1], False, None, None, parts)
    (op,) = read(recorder.folder)[0].ops
    assert (op.shape, op.nbytes) == ((1,), 24)
