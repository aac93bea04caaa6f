"""Stacks: where all ranks' threads stand in Python: asked of each rank, dumped by its watcher where it is mute; and in
C, where py-spy has looked."""

import linecache
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from dinfer.engine.hosting.commands import Message
from dinfer.engine.hosting.spying import Seen, in_c
from dinfer.engine.hosting.stacks import TRANSPORT
from dinfer.session.states import RankRefused, States
from dinfer.verdict.signs import BUSY, Frame

ANSWER_S = 0.5
DUMP_ANSWER_S = 1.0
LANES = ("executor.py", "issuer.py")
"""where the threads of lanes begin"""
_NAME = re.compile(r"hread 0x[0-9a-f]+ \[(.*?)\] \(most")
_FILE = re.compile(r'  File "(.*)", line (\d+) in (.*)')


@dataclass(frozen=True)
class Stacks:
    """Of one rank. `frames` are by lane name; `text` is all of it, for people; `answers`: whether the rank itself has
    said it; `cpu_s`: CPU time of its threads together, where they say it; `holder`: the lane that keeps it mute."""

    frames: Mapping[str, Frame] = field(default_factory=dict)
    text: str = ""
    answers: bool | None = None
    cpu_s: float | None = None
    holder: str = ""


def gather(ranks: States, which: Sequence[int]) -> dict[int, Stacks]:
    """Ask these ranks, together; those that are mute are dumped. Takes 1.5 s at most, mostly a few milliseconds."""
    said = answers(ranks, {rank: {"do": "stacks"} for rank in which}, ANSWER_S)
    found = {rank: _as_asked(rank, message) for rank, message in said.items()}
    mute = [rank for rank in which if rank not in found]
    dumps = answers(ranks, {rank: {"do": "dump"} for rank in mute}, DUMP_ANSWER_S) if mute else {}
    for rank in mute:
        found[rank] = as_dumped(rank, dumps.get(rank, {}).get("text", ""))
    return found


def answers(ranks: States, requests: dict[int, Message], timeout: float) -> dict[int, Message]:
    """What those ranks say that answer in time and do not refuse; all are asked together."""
    begun = ranks.begin(requests)
    deadline = time.monotonic() + timeout
    found = dict[int, Message]()
    for rank, number in begun.items():
        with suppress(TimeoutError, RankRefused):
            found |= ranks.finish({rank: number}, max(0.0, deadline - time.monotonic()))
    return found


def _as_asked(rank: int, message: Message) -> Stacks:
    threads = message["threads"]
    frames = {_lane(rank, thread["name"]): _frame(thread) for thread in threads if thread["frames"]}
    text = "\n".join(
        f"{thread['name']}:\n" + "\n".join(_line(*frame) for frame in thread["frames"]) for thread in threads
    )
    times = [thread["cpu_s"] for thread in threads]
    return Stacks(frames, text, True, None if None in times else sum(times))


def as_dumped(rank: int, text: str) -> Stacks:
    """What faulthandler has written, which does not say which of several threads holds the interpreter."""
    busy = []
    for thread in text.split("\n\n"):
        found = [(file, int(line), name) for file, line, name in _FILE.findall(thread)]
        if _is_in_op(file for file, _, _ in found):
            file, line, name = found[0]
            head = _NAME.search(thread)
            frame = Frame(file, line, name, linecache.getline(file, line).strip(), native=True)
            busy.append((_lane(rank, head[1]) if head else "", frame))
    holder, frames = (busy[0][0], {BUSY: busy[0][1]}) if len(busy) == 1 else ("", {})
    return Stacks(frames, text.strip(), False, holder=holder)


def as_spied(rank: int, threads: Sequence[Message], known: Stacks) -> Stacks | None:
    """What is known, and what py-spy has seen a little earlier; None where that is not so any more."""
    seen = {_lane(rank, thread["name"]): [Seen(*frame) for frame in thread["frames"]] for thread in threads}
    text = "\n".join(_spied_text(thread) for thread in threads)
    if known.answers is None:  # it is stopped: nobody else can see it
        return replace(known, text=text)
    if not known.answers:
        holder = next((_lane(rank, thread["name"]) for thread in threads if thread["holds_gil"]), "")
        return _held(known, seen, holder, text) if holder else known
    frames = {lane: _with_c(frame, seen.get(lane, ())) for lane, frame in known.frames.items()}
    if None in frames.values():
        return None
    return replace(known, text=text, frames={lane: frame for lane, frame in frames.items() if frame})


def _held(known: Stacks, seen: Mapping[str, Sequence[Seen]], holder: str, text: str) -> Stacks | None:
    """Of a mute rank, by the thread that holds its interpreter."""
    file, line, function, source = next(frame for frame in seen[holder] if frame.line is not None)
    assert line is not None
    if known.text and f'"{file}", line {line} in ' not in known.text:
        return None
    frame = Frame(file, line, function, source, native=True, c=in_c(seen[holder]))
    return replace(known, frames={holder: frame, BUSY: frame}, text=text, holder=holder)


def _with_c(frame: Frame, seen: Sequence[Seen]) -> Frame | None:
    """A frame that has called into C, with what it has called; None where the thread was seen elsewhere."""
    if not frame.native or not seen:
        return frame
    at = next(one for one in seen if one.line is not None)
    return frame._replace(c=in_c(seen)) if (at.file, at.line) == (frame.file, frame.line) else None


def _spied_text(thread: Message) -> str:
    holds = ", which holds the interpreter (the GIL)" if thread["holds_gil"] else ""
    return f"{thread['name']}{holds}:\n" + "\n".join(_seen_line(Seen(*frame)) for frame in thread["frames"])


def _seen_line(seen: Seen) -> str:
    if seen.line is None:
        return f"  in {seen.function} ({seen.file.rpartition('/')[2]})"
    return _line(seen.file, seen.line, seen.function, seen.text)


def _is_in_op(files: Iterable[str]) -> bool:
    """Whether a thread runs an op, and does not wait in the transport or at a gate."""
    names = {file.rpartition("/")[2] for file in files if "/dinfer/engine/" in file}
    return bool(names & set(LANES)) and not names & set(TRANSPORT)


def _lane(rank: int, thread: str) -> str:
    if thread.startswith(f"rank {rank} "):
        return thread.removeprefix(f"rank {rank} ")
    is_slow = thread == "control, slow commands" or thread.startswith(f"dinfer rank {rank}_")
    return "decode" if is_slow else thread


def _frame(thread: Message) -> Frame:
    file, line, function, text = thread["frames"][thread["at"]]
    return Frame(file, line, function, text, thread["native"], thread["waits"], thread["held"])


def _line(file: str, line: int, function: str, text: str) -> str:
    return f'  File "{file}", line {line}, in {function}' + (f"\n    {text}" if text else "")
