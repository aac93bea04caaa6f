"""Where all ranks' threads stand: each rank is asked; where it does not answer, its watcher has it dump its stacks; and
py-spy sees C functions too."""

import linecache
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial

from dinfer.cluster.ranks import ANSWER_S, AskableRanks, Pending, RankRefused, RankState, answers
from dinfer.errors import NoAnswer
from dinfer.messages import (
    DumpStacks,
    GetStacks,
    SpiedFrame,
    SpiedThread,
    SpiedThreads,
    SpyOnRank,
    ThreadStack,
    ThreadStacks,
)
from dinfer.rank.pyspy import in_c
from dinfer.rank.stacks import TRANSPORT
from dinfer.verdict.signs import BUSY, StackFrame

DUMP_ANSWER_S = 60.0
"""A rank's watcher answers for a mute rank within about a second, on busy cores later."""

WATCHER_S = 5.0
"""A watcher that has not been heard for so long does not answer."""

LANES = frozenset(("engine/threads.py", "engine/streams.py"))
"""The files in which the threads of lanes begin."""

IDLE = frozenset(("_work", "_worker"))
"""The functions in which the thread for slow commands, in a process of its own or not, stands while it has none."""

_NAME = re.compile(r"hread 0x[0-9a-f]+ \[(.*?)\] \(most")
_FILE = re.compile(r'  File "(.*)", line (\d+) in (.*)')


@dataclass(frozen=True)
class Stacks:
    """Of one rank. `frames`: by lane name; `text`: all stacks, for people; `answers`: whether the rank itself has
    answered, None where it was not asked; `cpu_s`: CPU time of all its threads, where known; `holder`: the lane that
    holds the GIL, so that the rank cannot answer."""

    frames: Mapping[str, StackFrame] = field(default_factory=dict)
    text: str = ""
    answers: bool | None = None
    cpu_s: float | None = None
    holder: str = ""


def gather(ranks: AskableRanks, which: Sequence[int]) -> dict[int, Stacks]:
    """Ask these ranks, together; of one that is mute its watcher requests a dump. Takes a few milliseconds where all
    answer; else as long as the watchers of the mute ranks take, while they are heard."""
    answered = answers(ranks, dict.fromkeys(which, GetStacks()), ANSWER_S)
    found = {rank: _as_answered(rank, stacks) for rank, stacks in answered.items()}
    begun = {rank: ranks.begin({rank: DumpStacks()}) for rank in which if rank not in found}
    for rank, pending in begun.items():
        text = ""
        with suppress(NoAnswer, RankRefused):
            text = ranks.finish(pending, DUMP_ANSWER_S, partial(_check_watcher, ranks.ranks[rank]))[rank].text
        found[rank] = as_dumped(rank, text)
    return found


def _check_watcher(state: RankState) -> None:
    """Raises NoAnswer where nobody answers for a rank that is mute."""
    if state.process is None or state.gone or time.monotonic() - state.heard > WATCHER_S:
        raise NoAnswer("this rank has no watcher, or one that does not answer")


def _as_answered(rank: int, stacks: ThreadStacks) -> Stacks:
    frames, texts, cpu_s = dict[str, StackFrame](), list[str](), list[float]()
    # Who reads on wants to see the op first: a lane that computes, then those that wait for a peer, then other threads.
    for thread in sorted(stacks.threads, key=lambda one: (_is_aside(rank, one), one.waits)):
        if thread.frames:
            frame = StackFrame(*thread.frames[thread.at], thread.native, thread.waits, thread.held)
            frames[_lane(rank, thread.name)] = frame
        if thread.cpu_s is not None:
            cpu_s.append(thread.cpu_s)
        texts += [f"{thread.name}:", *(_line(*frame) for frame in thread.frames)]
    return Stacks(frames, "\n".join(texts), True, sum(cpu_s) if len(cpu_s) == len(stacks.threads) else None)


def as_dumped(rank: int, text: str) -> Stacks:
    """From faulthandler's text, which does not say which of several threads holds the GIL."""
    busy = []
    for thread in text.split("\n\n"):
        found = _FILE.findall(thread)
        places = {file.rpartition("/dinfer/")[2] for file, _, _ in found}
        if (
            places & LANES and not places & TRANSPORT
        ):  # it runs an op and does not wait for a peer, or at a gate
            file, line, name = found[0]
            head, text_of_line = _NAME.search(thread), linecache.getline(file, int(line)).strip()
            frame = StackFrame(file, int(line), name, text_of_line, native=True)
            busy.append((_lane(rank, head[1]) if head else "", frame))
    holder, frames = (busy[0][0], {BUSY: busy[0][1]}) if len(busy) == 1 else ("", {})
    return Stacks(frames, text.strip(), False, holder=holder)


def as_spied(rank: int, threads: Sequence[SpiedThread], known: Stacks) -> Stacks | None:
    """What is known, with what py-spy saw a little earlier; None where the rank has moved since."""
    seen = {_lane(rank, thread.name): thread.frames for thread in threads}
    text = "\n".join(map(_spied_text, sorted(threads, key=lambda one: _is_aside(rank, one))))
    if known.answers is None:  # it is stopped, so only py-spy can see it
        return replace(known, text=text)
    if not known.answers:
        holder = next((_lane(rank, thread.name) for thread in threads if thread.holds_gil), "")
        return _held(known, seen, holder, text) if holder else known
    frames = {}
    for lane, frame in known.frames.items():
        if frame.native and lane in seen:  # add the C functions that its line has called
            at = next(one for one in seen[lane] if one.line is not None)
            if (at.file, at.line) != (frame.file, frame.line):
                return None
            frame = frame._replace(c=in_c(seen[lane]))
        frames[lane] = frame
    return replace(known, text=text, frames=frames)


def _held(known: Stacks, seen: Mapping[str, Sequence[SpiedFrame]], holder: str, text: str) -> Stacks | None:
    """For a rank that does not answer: where the thread that holds its GIL stands."""
    file, line, function, source = next(frame for frame in seen[holder] if frame.line is not None)
    assert line is not None
    if known.text and f'"{file}", line {line} in ' not in known.text:
        return None
    frame = StackFrame(file, line, function, source, native=True, c=in_c(seen[holder]))
    return replace(known, frames={holder: frame, BUSY: frame}, text=text, holder=holder)


def _spied_text(thread: SpiedThread) -> str:
    lines = [f"{thread.name}{', which holds the interpreter (the GIL)' * thread.holds_gil}:"]
    for file, line, function, text in thread.frames:
        in_library = f"  in {function} ({file.rpartition('/')[2]})"
        lines.append(in_library if line is None else _line(file, line, function, text))
    return "\n".join(lines)


def _lane(rank: int, thread: str) -> str:
    if thread.startswith(f"rank {rank} "):
        return thread.removeprefix(f"rank {rank} ")
    is_slow = thread == "control, slow commands" or thread.startswith(f"dinfer rank {rank}_")
    return "decode" if is_slow else thread


def _is_aside(rank: int, thread: ThreadStack | SpiedThread) -> bool:
    """Whether it is in no op: it is no lane's thread, or that for slow commands, decode among them, and has none."""
    innermost = next((function for _, line, function, _ in thread.frames if line is not None), "")
    lane = _lane(rank, thread.name)
    return lane == thread.name or (lane == "decode" and innermost in IDLE)


def _line(file: str, line: int, function: str, text: str) -> str:
    return f'  File "{file}", line {line}, in {function}' + (f"\n    {text}" if text else "")


class Spied:
    """What py-spy sees of a session's ranks that are processes: each is read once, and again once it has moved."""

    def __init__(self, ranks: AskableRanks) -> None:
        self._ranks = ranks
        self._begun = Pending[SpiedThreads]()
        self._seen: dict[int, tuple[SpiedThread, ...]] = {}

    @property
    def ranks(self) -> frozenset[int]:
        """The ranks of which something has been seen."""
        return frozenset(rank for rank, threads in self._seen.items() if threads)

    def begin(self, which: Iterable[int]) -> None:
        """Have those of these ranks read that have not been."""
        states = self._ranks.ranks
        new = [rank for rank in which if rank not in {*self._begun, *self._seen} and states[rank].process]
        if new:  # a run that is over may ask nothing
            self._begun.update(self._ranks.begin(dict.fromkeys(new, SpyOnRank())))

    def looks_at(self, which: Iterable[int]) -> set[int]:
        """Those of these ranks that are being read, and so may be stopped meanwhile."""
        return {rank for rank in which if rank in self._begun}

    def collect(self) -> bool:
        """Whether something new has been seen."""
        come = self._ranks.collect(self._begun)
        new = {rank: answer.threads for rank, answer in come.items()}
        self._seen |= new
        return any(new.values())

    def added_to(self, stacks: Mapping[int, Stacks]) -> dict[int, Stacks]:
        """What is known by rank, with what was seen; forgets what was seen of ranks that have moved since."""
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
        self._begun, self._seen = Pending[SpiedThreads](), {}
