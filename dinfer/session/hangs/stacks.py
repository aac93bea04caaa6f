"""Stacks: where all ranks' threads stand in Python: asked of each rank, dumped by its watcher where it is mute."""

import linecache
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from dinfer.engine.hosting.commands import Message
from dinfer.engine.hosting.stacks import TRANSPORT
from dinfer.session.states import RankRefused, States
from dinfer.verdict.signs import BUSY, Frame

ANSWER_S = 0.5
DUMP_ANSWER_S = 1.0
LANES = ("executor.py", "issuer.py")
"""where the threads of lanes begin"""
_FILE = re.compile(r'  File "(.*)", line (\d+) in (.*)')


@dataclass(frozen=True)
class Stacks:
    """Of one rank. `frames` are by lane name; `text` is all of it, for people; `answers`: whether the rank itself has
    said it; `cpu_s`: CPU time of its threads together, where they say it."""

    frames: Mapping[str, Frame] = field(default_factory=dict)
    text: str = ""
    answers: bool | None = None
    cpu_s: float | None = None


def gather(ranks: States, which: Sequence[int]) -> dict[int, Stacks]:
    """Ask these ranks, together; those that are mute are dumped. Takes 1.5 s at most, mostly a few milliseconds."""
    said = answers(ranks, {rank: {"do": "stacks"} for rank in which}, ANSWER_S)
    found = {rank: _as_asked(rank, message) for rank, message in said.items()}
    mute = [rank for rank in which if rank not in found]
    dumps = answers(ranks, {rank: {"do": "dump"} for rank in mute}, DUMP_ANSWER_S) if mute else {}
    for rank in mute:
        found[rank] = as_dumped(dumps.get(rank, {}).get("text", ""))
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


def as_dumped(text: str) -> Stacks:
    """What faulthandler has written, which does not say which thread is which lane's."""
    frames = {}
    for thread in text.split("\n\n"):
        found = [(file, int(line), name) for file, line, name in _FILE.findall(thread)]
        if _is_in_op(file for file, _, _ in found):
            file, line, name = found[0]
            frames[BUSY] = Frame(file, line, name, linecache.getline(file, line).strip(), native=True)
    return Stacks(frames, text.strip(), False)


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
