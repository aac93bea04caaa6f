"""How far it is from `run.kv().diff()` to the ranks: counted in functions of dinfer, not in time."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import dinfer
from dinfer.run.run import Run
from tests.support.threads import session_on_threads
from tests.support.tiny import tiny_checkpoint
from tests.support.twin import prompt

SOURCE = str(Path(dinfer.__file__).parent)
PASSED = 24
"""functions that `run.kv().diff()` enters before the first request of the diff leaves for a rank, half of them to see
whether and where the run stands, and three to answer for a run that is over; it was 42"""
OF_KV = 4
"""those of them in dinfer/kv; it was 12"""
DEEPEST = 8
"""frames of dinfer from the user's call to that request, both included; one of them checks the call's arguments"""


def calls_before_a_rank(run: Run) -> tuple[list[tuple[str, str]], int]:
    """The functions of dinfer, comprehensions left out, that `run.kv().diff()` enters until it sends the diff's first
    request to a rank, without that one; and the frames on the stack just then."""
    passed, depth = list[tuple[str, str]](), list[int]()

    def entered(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or depth or not is_of_dinfer(frame):
            return
        if code.co_name == "_send":
            depth.append(depth_of(frame))
        elif (called := (code.co_filename.removeprefix(SOURCE), code.co_qualname)) not in passed:
            passed.append(called)

    sys.setprofile(entered)
    try:
        assert run.kv().diff().equal
    finally:
        sys.setprofile(None)
    return passed, depth[0]


def is_of_dinfer(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(SOURCE) and "<" not in frame.f_code.co_name


def depth_of(frame: FrameType | None) -> int:
    found = 0
    while frame:
        found += is_of_dinfer(frame)
        frame = frame.f_back
    return found


def test_a_diff_passes_few_functions_before_it_asks_a_rank(tmp_path: Path) -> None:
    with session_on_threads(3, tiny_checkpoint(tmp_path, layers=4)) as session:
        run = session.prefill(prompt(26), chunk_size=8)
        run.wait(60)
        run.kv().diff()  # what is known of the run once is kept
        passed, depth = calls_before_a_rank(run)
    assert len(passed) <= PASSED, "\n".join(map(str, passed))
    assert sum(file.startswith("/kv/") for file, _ in passed) <= OF_KV, passed
    assert depth <= DEEPEST
