"""Reads a recorder in a shared file until all has been written, and prints the numbers that it saw. Not a test.

Run as `python -m tests.support.perfetto_reader FILE CAPACITY LAST` from the repository's root.
"""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

from dinfer.trace.recorder import Recorder, unpack_records
from tests.support.made_events import numbered


def read_all(path: Path, capacity: int, last: int) -> list[int]:
    seen: list[int] = []
    cursor = [0]
    with path.open("r+b") as file:
        recorder = Recorder(3, ["main"], capacity, memoryview(mmap.mmap(file.fileno(), 0)))
    print("ready", flush=True)
    while not seen or seen[-1] != last:
        records, after = recorder.read_records(cursor)
        assert after >= cursor, f"the count fell from {cursor} to {after}"
        cursor = after
        if not records:
            continue  # look again at once: the shorter this way, the more often it meets a write
        events = unpack_records(records, 3, ("main",))
        assert all(event == numbered(event.end) for event in events), "an event that is not whole"
        seen += [event.end for event in events]
    return seen


if __name__ == "__main__":
    print(*read_all(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
