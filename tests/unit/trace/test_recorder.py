"""Recorder: rings, what is lost, cursors, and a reader in another process."""

from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinfer.trace.events import Event
from dinfer.trace.recorder import Recorder, recorder_size, unpack_records
from tests.support.made_events import numbered

LANES = ("main", "side")
ROOT = Path(__file__).parents[3]


def filled(recorder: Recorder, numbers: range, lane: int = 0) -> Recorder:
    for number in numbers:
        recorder.record(lane, numbered(number, recorder.lanes[lane]))
    return recorder


def ends(events: list[Event]) -> list[int]:
    return [event.end for event in events]


def test_events_come_by_lane_and_then_in_order() -> None:
    recorder = Recorder(3, LANES, 4)
    filled(recorder, range(2), lane=1)
    filled(recorder, range(2, 5), lane=0)
    assert recorder.events() == [
        *[numbered(n, "main") for n in (2, 3, 4)],
        *[numbered(n, "side") for n in (0, 1)],
    ]


def test_a_full_ring_overwrites_its_oldest_events() -> None:
    recorder = filled(Recorder(3, LANES, 4), range(4))
    assert (ends(recorder.events()), recorder.lost) == ([0, 1, 2, 3], 0)
    filled(recorder, range(4, 11))
    assert (ends(recorder.events()), recorder.lost) == ([7, 8, 9, 10], 7)


def test_rings_fill_on_their_own() -> None:
    recorder = filled(Recorder(3, LANES, 2), range(5))
    filled(recorder, range(1), lane=1)
    assert (ends(recorder.events()), recorder.lost) == ([3, 4, 0], 3)


def test_a_cursor_gives_what_came_after_it() -> None:
    recorder = filled(Recorder(3, LANES, 4), range(2))
    first, cursor = recorder.read()
    assert (ends(first), cursor) == ([0, 1], [2, 0])
    assert recorder.read(cursor) == ([], [2, 0])
    assert unpack_records(recorder.read_records()[0], 3, LANES) == first
    filled(recorder, range(2, 5))
    filled(recorder, range(9, 10), lane=1)
    second, cursor = recorder.read(cursor)
    assert (ends(second), cursor) == ([2, 3, 4, 9], [5, 1])


@given(st.integers(1, 5), st.lists(st.integers(0, 12), max_size=6))
def test_reading_now_and_then_gives_each_event_once_or_counts_it_as_lost(
    capacity: int, bursts: list[int]
) -> None:
    recorder, cursor, seen, written = Recorder(3, ["main"], capacity), [0], [], 0
    for burst in bursts:
        filled(recorder, range(written, written + burst))
        written += burst
        events, cursor = recorder.read(cursor)
        assert ends(events) == list(range(max(written - min(capacity, burst), 0), written))
        seen += ends(events)
    assert cursor == [written]
    assert seen == sorted(set(seen))
    assert recorder.lost == max(0, written - capacity)


def test_clear_forgets_all() -> None:
    recorder = filled(Recorder(3, LANES, 4), range(9))
    recorder.clear()
    assert (recorder.events(), recorder.lost) == ([], 0)
    assert ends(filled(recorder, range(20, 22)).events()) == [20, 21]


@given(st.integers(1, 6), st.integers(1, 50), st.integers(0, 40))
def test_a_recorder_over_memory_uses_all_that_fits(lanes: int, capacity: int, spare: int) -> None:
    names = [f"lane {n}" for n in range(lanes)]
    size = recorder_size(lanes, capacity)
    exact = Recorder.over(3, names, memoryview(bytearray(size)))
    assert exact.capacity == capacity
    roomy = Recorder.over(3, names, memoryview(bytearray(size + spare)))
    assert recorder_size(lanes, roomy.capacity) <= size + spare
    for lane in range(lanes):
        filled(roomy, range(roomy.capacity + 1), lane=lane)
    assert len(roomy.events()) == lanes * roomy.capacity


def test_two_recorders_over_one_memory_see_the_same() -> None:
    memory = memoryview(bytearray(recorder_size(2, 8) + 5))
    writer, reader = Recorder(3, LANES, 8, memory), Recorder.over(3, LANES, memory)
    filled(writer, range(11))
    assert reader.events() == writer.events()
    assert reader.lost == writer.lost == 3


class Interrupting(Recorder):
    """A recorder whose reader is overtaken by the writer while it copies: at its second look at the count."""

    looks = 0
    burst = 0

    def _count(self, lane: int) -> int:
        self.looks += 1
        if self.looks == 2:
            burst, self.burst = self.burst, 0
            first = super()._count(lane)
            filled(self, range(first, first + burst))
        return super()._count(lane)


@pytest.mark.parametrize("burst", [0, 1, 2, 3, 4, 9])
def test_what_the_writer_overwrites_while_it_is_read_is_left_out(burst: int) -> None:
    recorder = Interrupting(3, ["main"], 4)
    filled(recorder, range(6))
    recorder.looks, recorder.burst = 0, burst
    events, cursor = recorder.read()
    assert ends(events) == [n for n in (2, 3, 4, 5) if n >= 6 + burst - 4]
    assert cursor == [6]


def test_an_event_half_written_lies_over_none_that_is_held() -> None:
    recorder = filled(Recorder(3, ["main"], 4), range(7))
    numbered(99).pack_into(recorder._memory, recorder._slot(0, 7), 0)  # and killed before it is counted
    assert ends(recorder.events()) == [3, 4, 5, 6]


@pytest.mark.parametrize("capacity", [2, 64])
def test_a_reader_in_another_process_sees_whole_events_only(tmp_path: Path, capacity: int) -> None:
    last = 30_000
    path = tmp_path / "recorder"
    path.write_bytes(bytes(recorder_size(1, capacity)))
    command = [sys.executable, "-m", "tests.support.perfetto_reader", str(path), str(capacity), str(last)]
    with path.open("r+b") as file:
        recorder = Recorder(3, ["main"], capacity, memoryview(mmap.mmap(file.fileno(), 0)))
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
        filled(recorder, range(last + 1))
        out = reader.stdout.read()
    assert reader.returncode == 0
    seen = [int(word) for word in out.split()]
    assert seen == sorted(set(seen))
    assert seen[-1] == last
