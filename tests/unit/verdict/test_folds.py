"""The lines of code in which ranks are held up, from every form in which stacks are told, and their links."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

import dinfer
from dinfer.monitor.stacks import _as_answered
from dinfer.rank.stacks import stacks
from dinfer.trace.findings import Findings, WaitsFinding
from dinfer.verdict.blocked import blocked_threads, own_frames
from dinfer.verdict.folds import folds_html, source_link
from dinfer.verdict.kept import waits_html

DUMPED = """Thread 0x00007f6bb572b8d0 [rank 0 main] (most recent call first):
  File "/home/ann/infer.py", line 31 in exchange
  File "/home/ann/infer.py", line 52 in <module>

Current thread 0x00007f6bb572b8d1 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 327 in wait
  File "/usr/lib/python3.11/threading.py", line 1002 in _bootstrap
"""

SPIED = """rank 1 main, which holds the interpreter (the GIL):
  in usleep (libc.so.6)
  File "/home/ann/infer.py", line 7, in sleepy
    lib.usleep(5)
  File "/usr/lib/python3.11/threading.py", line 982, in run
    self._target(*self._args, **self._kwargs)
"""

WATCHED = """thread MainThread:
  infer.py:31 in exchange: dist.recv(x, 1)
  cell:2 in <module>
"""


def test_every_part_of_dinfer_is_known_as_its_own() -> None:
    root = Path(dinfer.__file__).parent
    parts = [path.parent for path in sorted(root.glob("*/__init__.py"))]
    assert len(parts) > 20
    stack = "rank 0 main:\n" + "\n".join(
        f'  File "/src/dinfer/{one.name}/a.py", line 1, in a' for one in parts
    )
    assert own_frames(stack) == []
    mine = own_frames('rank 0 main:\n  File "/src/dinfer/infer.py", line 1, in a')
    assert [str(frame) for frame in mine] == ["/src/dinfer/infer.py:1 in a"]


def test_what_a_rank_says_of_itself_is_cut_to_where_it_is_held_up() -> None:
    begun, ended = threading.Event(), threading.Event()

    def held_up() -> None:
        begun.set()
        ended.wait()

    thread = threading.Thread(target=held_up, name="rank 0 compute")
    thread.start()
    begun.wait()
    told = _as_answered(0, stacks(0, alone=False)).text
    ended.set()
    thread.join()
    [found] = blocked_threads(told)
    assert found.name == "rank 0 compute"
    assert [frame.function for frame in found.frames] == ["held_up"]
    [frame] = found.frames
    assert frame.file == __file__
    assert frame.text in ("ended.wait()", "begun.set()")
    assert frame.is_own


def test_a_dump_is_read_and_threads_of_python_alone_are_left_out() -> None:
    [found] = blocked_threads(DUMPED)
    assert found.name == "rank 0 main"
    assert [(frame.line, frame.function, frame.is_own) for frame in found.frames] == [
        (31, "exchange", True),
        (52, "<module>", True),
    ]


def test_functions_in_c_stay_on_top_of_the_line_that_called_them() -> None:
    [found] = blocked_threads(SPIED)
    assert [(frame.function, frame.line) for frame in found.frames] == [("usleep", 0), ("sleepy", 7)]
    assert found.frames[1].text == "lib.usleep(5)"


def test_what_a_watched_program_says_is_read_too() -> None:
    [found] = blocked_threads(WATCHED)
    assert [frame.file for frame in found.frames] == ["infer.py", "cell"]
    assert found.frames[0].text == "dist.recv(x, 1)"


@pytest.mark.parametrize("text", ["", "\n", "nothing of the kind", "    indented", '  File "x", line'])
def test_text_without_frames_has_no_threads(text: str) -> None:
    assert blocked_threads(text) == []


def test_only_threads_of_python_are_better_than_none() -> None:
    text = f'idle:\n  File "{sys.prefix}/lib/python3.11/queue.py", line 1, in get\n'
    assert [thread.name for thread in blocked_threads(text)] == ["idle"]


@pytest.mark.parametrize(
    ("file", "link"),
    [
        ("/home/ann/my code/infer.py", "vscode://file/home/ann/my%20code/infer.py:31"),
        ("/tmp/ipykernel_12/34.py", ""),
        ("infer.py", ""),
        ("<string>", ""),
    ],
)
def test_a_file_that_an_editor_can_open_is_a_link(file: str, link: str) -> None:
    found = source_link(file, 31)
    assert (f'href="{link}"' in found) == bool(link)
    assert ":31" in found


def test_each_rank_has_a_fold_and_that_of_the_culprit_is_open() -> None:
    lines = ["rank 0: waits for rank 1", "rank 1: in `<b>`", "ranks 2–5: wait"]
    found = folds_html(lines, {0: DUMPED, 1: SPIED}, [1])
    assert found.count("<details") == 2
    assert '<details data-rank="1" open><summary>✖ rank 1: in `&lt;b&gt;`' in found
    assert "<div>ranks 2–5: wait</div>" in found
    assert "threading.py" not in found
    assert folds_html([], {}) == ""


def test_findings_of_anybody_are_drawn_escaped() -> None:
    evil = "<script>alert(1)</script>"
    waits = WaitsFinding(
        ranks=((0, evil, evil, True, evil), (1, "rank 1", "", False, "")),
        waits=((0, 1, evil), (1, 9, "nobody")),
        lines=(evil,),
        stacks=((0, f'{evil}:\n  File "/{evil}", line 1, in {evil}\n    {evil}'),),
    )
    html = waits_html(Findings.of(Findings(waits=waits).as_dict()).waits or waits, evil)
    assert "<script" not in html
    assert html.count("<rect") == 2
    assert html.count("marker-end") == 1
