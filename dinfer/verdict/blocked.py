"""Blocked frames: of a rank's stacks, as text, the lines in which it is held up. Pure.

Reads what dinfer writes of a rank that answers, what faulthandler dumps of one that does not, what py-spy has seen, and
what a watched program tells of itself.
"""

import re
from typing import NamedTuple

from dinfer.trace.events import is_cell, place_of

_HEAD = re.compile(
    r"(?:Current t|T|t)hread (?:0x[0-9a-f]+ )?\[?(.*?)\]? ?\(most recent call first\):|(?:thread )?(\S.*):"
)
_FRAME = re.compile(r'  File "(.*)", line (\d+),? in (.*)')
_PLACE = re.compile(r"  (\S+):(\d+) in ([^:]+)(?:: (.*))?")
_LIBRARY = re.compile(r"  in (.*) \((.*)\)")
_STANDARD = re.compile(r"[/\\]python3[^/\\]*[/\\](?!(?:site|dist)-packages)|^<frozen ", re.IGNORECASE)
_INSTALLED = re.compile(r"(?:site|dist)-packages|[/\\]python3[^/\\]*[/\\]|^<frozen ", re.IGNORECASE)
_PARTS = (
    "bench", "cli", "cluster", "codec", "dap", "doctor", "engine", "kv", "lab", "launch", "magics", "model", "monitor",
    "plan", "planner", "rank", "run", "saved", "session", "trace", "transport", "verdict", "views", "watch", "watching",
)  # fmt: skip
_OURS = re.compile(rf"[/\\]dinfer[/\\](?:{'|'.join(_PARTS)})[/\\]")
"""dinfer's own files. A user's may be in a folder called dinfer, such as its repository, too."""


class BlockedFrame(NamedTuple):
    """A line in which a thread stands. `line`: 0 for a function in C; `text`: its source, if known; `is_own`: it is the
    user's code: no library's, Python's or dinfer's."""

    file: str
    line: int
    function: str
    text: str = ""
    is_own: bool = False

    def __str__(self) -> str:
        """For example `/home/me/infer.py:31 in stage: sync(layer)`."""
        place = place_of(self.file, self.line) if is_cell(self.file) else f"{self.file}:{self.line}"
        return f"{place} in {self.function}{f': {self.text}' if self.text else ''}"


class BlockedThread(NamedTuple):
    """A thread that is held up, and its frames, the innermost first."""

    name: str
    frames: tuple[BlockedFrame, ...]


def blocked_threads(stacks: str) -> list[BlockedThread]:
    """The threads of these stacks that stand in code of dinfer, of a library or of the user, without the frames by
    which Python begins a thread and waits. A thread that Python alone keeps, such as an idle worker, is left out,
    unless there is no other."""
    threads = _threads(stacks)
    cut = [BlockedThread(name, _without_standard(frames)) for name, frames in threads]
    found = [thread for thread in cut if thread.frames]
    return found or [BlockedThread(name, tuple(frames[:1])) for name, frames in threads if frames]


def own_frames(stacks: str) -> list[BlockedFrame]:
    """The frames of the user's code, the innermost first, of the threads in their order."""
    return [frame for thread in blocked_threads(stacks) for frame in thread.frames if frame.is_own]


def _threads(stacks: str) -> list[tuple[str, list[BlockedFrame]]]:
    found: list[tuple[str, list[BlockedFrame]]] = []
    for line in stacks.splitlines():
        if frame := _frame(line):
            if not found:
                found.append(("", []))
            found[-1][1].append(frame)
        elif line.startswith("    ") and found and found[-1][1]:  # the source of the frame above
            found[-1][1][-1] = found[-1][1][-1]._replace(text=line.strip())
        elif head := _HEAD.fullmatch(line.strip()):
            found.append(((head[1] or head[2] or "").strip(), []))
    return found


def _frame(line: str) -> BlockedFrame | None:
    if found := _FRAME.fullmatch(line):
        file, number, function = found.groups()
        return BlockedFrame(file, int(number), function, is_own=_is_own(file))
    if found := _PLACE.fullmatch(line):
        place, number, function, text = found.groups()
        return BlockedFrame(place, int(number), function, text or "", is_own=True)
    if found := _LIBRARY.fullmatch(line):
        return BlockedFrame(found[2], 0, found[1])
    return None


def _is_own(file: str) -> bool:
    return not (_INSTALLED.search(file) or _OURS.search(file))


def _without_standard(frames: list[BlockedFrame]) -> tuple[BlockedFrame, ...]:
    """From the innermost frame that is not Python's own to the outermost; with functions in C that it has called."""
    numbers = [n for n, frame in enumerate(frames) if frame.line and not _STANDARD.search(frame.file)]
    if not numbers:
        return ()
    first = 0 if not frames[0].line else numbers[0]
    return tuple(frames[first : numbers[-1] + 1])
