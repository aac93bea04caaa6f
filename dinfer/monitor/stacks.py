"""Stacks: where all ranks' threads stand in Python: asked of each rank, dumped by its watcher where it is mute; and in
C, where py-spy has looked."""

import linecache
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial

from dinfer.cluster.ranks import ANSWER_S, RankRefused, RankState, RankStates, answers
from dinfer.errors import NoAnswer
from dinfer.messages import Message
from dinfer.rank.pyspy import Seen, in_c
from dinfer.rank.stacks import TRANSPORT
from dinfer.verdict.signs import BUSY, StackFrame

DUMP_ANSWER_S = 60.0
"""A rank's watcher answers for a mute rank within about a second, on busy cores later."""

WATCHER_S = 5.0
"""A watcher that has not been heard for so long does not answer."""

LANES = frozenset(("engine/threads.py", "engine/streams.py"))
"""where the threads of lanes begin"""

_NAME = re.compile(r"hread 0x[0-9a-f]+ \[(.*?)\] \(most")

_FILE = re.compile(r'  File "(.*)", line (\d+) in (.*)')


@dataclass(frozen=True)
class Stacks:
    """Of one rank. `frames` are by lane name; `text` is all of it, for people; `answers`: whether the rank itself has
    said it; `cpu_s`: CPU time of its threads together, where they say it; `holder`: the lane that keeps it mute."""

    frames: Mapping[str, StackFrame] = field(default_factory=dict)
    text: str = ""
    answers: bool | None = None
    cpu_s: float | None = None
    holder: str = ""


def gather(ranks: RankStates, which: Sequence[int]) -> dict[int, Stacks]:
    """Ask these ranks, together; of one that is mute its watcher requests a dump. Takes a few milliseconds where all
    answer; else as long as the watchers of the mute ranks take, while they are heard."""
    said = answers(ranks, {rank: {"do": "stacks"} for rank in which}, ANSWER_S)
    found = {rank: _as_asked(rank, message) for rank, message in said.items()}
    for rank, number in ranks.begin({rank: {"do": "dump"} for rank in which if rank not in found}).items():
        text = ""
        with suppress(NoAnswer, RankRefused):
            answer = ranks.finish({rank: number}, DUMP_ANSWER_S, partial(_check_watcher, ranks.ranks[rank]))
            text = answer[rank]["text"]
        found[rank] = as_dumped(rank, text)
    return found


def _check_watcher(state: RankState) -> None:
    """Raises NoAnswer where nobody answers for a rank that is mute."""
    if state.process is None or state.gone or time.monotonic() - state.heard > WATCHER_S:
        raise NoAnswer("this rank has no watcher, or one that does not answer")


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
            frame = StackFrame(file, line, name, linecache.getline(file, line).strip(), native=True)
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
    frame = StackFrame(file, line, function, source, native=True, c=in_c(seen[holder]))
    return replace(known, frames={holder: frame, BUSY: frame}, text=text, holder=holder)


def _with_c(frame: StackFrame, seen: Sequence[Seen]) -> StackFrame | None:
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
    places = {file.rpartition("/dinfer/")[2] for file in files}
    return bool(places & LANES) and not places & TRANSPORT


def _lane(rank: int, thread: str) -> str:
    if thread.startswith(f"rank {rank} "):
        return thread.removeprefix(f"rank {rank} ")
    is_slow = thread == "control, slow commands" or thread.startswith(f"dinfer rank {rank}_")
    return "decode" if is_slow else thread


def _frame(thread: Message) -> StackFrame:
    file, line, function, text = thread["frames"][thread["at"]]
    return StackFrame(file, line, function, text, thread["native"], thread["waits"], thread["held"])


def _line(file: str, line: int, function: str, text: str) -> str:
    return f'  File "{file}", line {line}, in {function}' + (f"\n    {text}" if text else "")


class Spied:
    """Of the ranks of one session that are processes: each is looked at once, and again when it has moved since."""

    def __init__(self, ranks: RankStates) -> None:
        self._ranks = ranks
        self._begun: dict[int, int] = {}
        self._seen: dict[int, list[Message]] = {}

    @property
    def ranks(self) -> frozenset[int]:
        """Of which something has been seen."""
        return frozenset(rank for rank, threads in self._seen.items() if threads)

    def begin(self, which: Iterable[int]) -> None:
        """Have these looked at that are not yet."""
        states = self._ranks.ranks
        new = [rank for rank in which if rank not in {*self._begun, *self._seen} and states[rank].process]
        if new:  # a run that is over may ask nothing
            self._begun |= self._ranks.begin({rank: {"do": "spy"} for rank in new})

    def looks_at(self, which: Iterable[int]) -> set[int]:
        """Those of these that are being looked at, and so may have been stopped for it."""
        return {rank for rank in which if rank in self._begun}

    def collect(self) -> bool:
        """Whether something new has been seen."""
        come = self._ranks.collect(self._begun)
        new = {rank: message.get("threads", []) for rank, message in come.items()}
        self._seen |= new
        return any(new.values())

    def added_to(self, stacks: Mapping[int, Stacks]) -> dict[int, Stacks]:
        """What is known by rank, and what was seen; what is not so any more is forgotten."""
        found = dict(stacks)
        for rank, threads in list(self._seen.items()):
            if not threads:  # there is no py-spy, or it may not look
                continue
            if (more := as_spied(rank, threads, stacks.get(rank, Stacks()))) is not None:
                found[rank] = more
            else:
                del self._seen[rank]
        return found

    def forget(self) -> None:
        self._ranks.forget(self._begun)
        self._begun, self._seen = {}, {}
