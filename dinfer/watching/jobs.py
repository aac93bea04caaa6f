"""Tells apart the jobs whose processes record into one folder: a shell script may start two torchruns, one after the
other or side by side.

Processes are of one job if they met at one store. Where that is unknown, as for those that have not met yet, they are
if one launcher started them. A launcher that starts ranks again, after some have failed, goes on with the same job.
"""

import os
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from dinfer.watch.probe.records import WatchedProcess
from dinfer.watching.events import ranks_of
from dinfer.watching.signs import last_sign

SHOWN = 60
"""characters of a command in a job's name"""

_LOCAL = ("localhost", "127.", "::1", "0.0.0.0")


@dataclass(frozen=True)
class WatchedJob:
    """`key`: the same at each look; `name`: for people, "" where there is one job only; `ranks`: as `ranks_of`."""

    key: str
    name: str
    ranks: dict[int, WatchedProcess]


def jobs_of(
    processes: Iterable[WatchedProcess], is_over: Callable[[WatchedProcess], bool] | None = None
) -> list[WatchedJob]:
    """The jobs, the oldest first. `is_over`: whether a process is known to have ended, by itself or not."""
    has_ended = is_over or _has_ended
    of_ranks = [one for one in processes if one.rank is not None or one.expected_rank is not None]
    own = {(one.host, one.pid) for one in of_ranks if one.rank is not None}
    # What a rank has started and that has met nobody is a helper of it: it only has its variables.
    of_ranks = [one for one in of_ranks if one.rank is not None or (one.host, one.parent) not in own]
    parts: list[list[WatchedProcess]] = []
    for process in sorted(of_ranks, key=lambda one: (one.rank is None, one.started_ns)):
        fits = [part for part in parts if _is_of(process, part, has_ended)]
        lacking = [part for part in fits if not _numbers([process]) & _numbers(part)]
        if fits:
            (lacking[:1] or fits[-1:])[0].append(process)
        else:
            parts.append([process])
    parts = _joined(parts, has_ended)
    found = [part for part in parts if ranks_of(part)]
    found.sort(key=lambda part: min(one.started_ns for one in part))
    named = _names(found) if len(found) > 1 else [""] * len(found)
    return [
        WatchedJob(_identity(min(part, key=lambda one: one.started_ns)), name, ranks_of(_newest(part)))
        for part, name in zip(found, named, strict=True)
    ]


def _identity(process: WatchedProcess) -> str:
    return f"{process.host} {process.name}"


def _is_of(
    process: WatchedProcess, part: Sequence[WatchedProcess], is_over: Callable[[WatchedProcess], bool]
) -> bool:
    """Whether a process that began later is of the same job."""
    same_parent = any((one.host, one.parent) == (process.host, process.parent) for one in part)
    stores = {store for one in part if (store := _store(one))}
    store = _store(process)
    before = [one for one in part if one.host == process.host]  # the clocks of others may be hours off
    if before and all(
        is_over(one) and last_sign(one) <= process.started_ns for one in before
    ):  # another job, unless a launcher has started its ranks again
        return same_parent and process.parent > 0 and not all(map(_went_well, part))
    if store and stores:
        return store in stores
    return same_parent


def _joined(
    parts: list[list[WatchedProcess]], is_over: Callable[[WatchedProcess], bool]
) -> list[list[WatchedProcess]]:
    """Parts of several launchers, or hosts, that make up one world together."""
    while pair := next((pair for pair in combinations(parts, 2) if _complete(*pair, is_over)), None):
        others = [part for part in parts if part is not pair[0] and part is not pair[1]]
        parts = [*others, [*pair[0], *pair[1]]]
    return parts


def _complete(
    one: Sequence[WatchedProcess], other: Sequence[WatchedProcess], is_over: Callable[[WatchedProcess], bool]
) -> bool:
    sizes = {process.world_size for process in (*one, *other) if process.world_size is not None}
    ranks, others = _numbers(one), _numbers(other)
    if len(sizes) != 1 or ranks & others or not max(ranks | others) < next(iter(sizes)):
        return False
    ports = [
        {_store(process).rpartition(":")[2] for process in part if _store(process)} for part in (one, other)
    ]
    if all(ports) and not ports[0] & ports[1]:
        return False
    return _overlap(one, other, is_over) and _overlap(other, one, is_over)


def _overlap(
    one: Sequence[WatchedProcess], other: Sequence[WatchedProcess], is_over: Callable[[WatchedProcess], bool]
) -> bool:
    """Whether some of the one still ran when the other began; of other hosts that is not known."""
    began: dict[str, int] = {}
    for process in other:
        began[process.host] = min(began.get(process.host, process.started_ns), process.started_ns)
    same = [process for process in one if process.host in began]
    return not same or any(
        not is_over(process) or last_sign(process) > began[process.host] for process in same
    )


def _numbers(part: Iterable[WatchedProcess]) -> set[int]:
    found = (one.rank if one.rank is not None else one.expected_rank for one in part)
    return {number for number in found if number is not None}


def _newest(part: Sequence[WatchedProcess]) -> list[WatchedProcess]:
    """Without ranks of an attempt before that had more of them."""
    last = max(part, key=lambda one: one.started_ns)
    size = last.world_size
    return [one for one in part if size is None or max(_numbers([one]), default=0) < size]


def _store(process: WatchedProcess) -> str:
    """The address at which its ranks met; on another host, a local one is another."""
    if process.store.startswith(_LOCAL):
        return f"{process.host}:{process.store.rpartition(':')[2]}"
    return process.store


def _has_ended(process: WatchedProcess) -> bool:
    return process.ended is not None


def _went_well(process: WatchedProcess) -> bool:
    return process.ended in ("exit", "os._exit(0)")


def _names(parts: Collection[Sequence[WatchedProcess]]) -> list[str]:
    """For example `job 2 (infer.py --tp 2)`."""
    return [f"job {number} ({_command(part[0].argv)})" for number, part in enumerate(parts, 1)]


def _command(argv: Sequence[str]) -> str:
    """Without the interpreter and the folders."""
    words = list(argv)
    if words and "python" in os.path.basename(words[0]):
        del words[0]
    while words and words[0] in ("-u", "-m", "-I", "-E", "-s", "-B"):
        del words[0]
    text = " ".join([os.path.basename(words[0]), *words[1:]]) if words else "python"
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
