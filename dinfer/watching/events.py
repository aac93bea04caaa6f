"""Makes a trace of what watched processes have recorded: their ops as events, and their process groups."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from dinfer.trace.events import CallRecord, Event, Group
from dinfer.trace.flight import GROUPS, groups_as_dict
from dinfer.trace.trace import Trace
from dinfer.verdict.matching import MESSAGES, MatchedOps
from dinfer.watch.probe.records import WatchedGroup, WatchedOp, WatchedProcess

WORLD = "default"


def ranks_of(processes: Iterable[WatchedProcess]) -> dict[int, WatchedProcess]:
    """The process of each rank: of those that said to be it, the one that began last; else the first that was meant to
    be. Launchers, and helpers of ranks, are none."""
    found: dict[int, WatchedProcess] = {}
    meant: dict[int, WatchedProcess] = {}
    for process in sorted(processes, key=lambda one: one.started_ns):
        if process.rank is not None:
            found[process.rank] = process
        elif process.expected_rank is not None:
            meant.setdefault(process.expected_rank, process)
    has_begun = any(process.ops for process in meant.values()) or found
    return dict(sorted({**(meant if has_begun else {}), **found}.items()))


def trace_of(ranks: Mapping[int, WatchedProcess], command: Sequence[str] = ()) -> Trace:
    """The trace of these ranks. Times are nanoseconds since the epoch, as each host knows it."""
    keys, groups = _named(ranks)
    events = [_event(op, rank, keys, groups) for rank, process in ranks.items() for op in process.ops]
    about = {
        "recorded_by": "dinfer watch",
        "command": list(command) or list(next(iter(ranks.values())).argv if ranks else ()),
        "world_size": max([len(ranks), *(process.world_size or 0 for process in ranks.values())]),
        "hooks": {str(rank): process.hook for rank, process in ranks.items()},
        GROUPS: groups_as_dict(groups),
    }
    return Trace.merge([_with_met(events, groups)], **about)


def _named(
    ranks: Mapping[int, WatchedProcess],
) -> tuple[dict[tuple[int, str], str], dict[str, Group]]:
    """A key for each group of each rank, and the groups by key. Names that mean different members on different ranks
    have these added. Of groups that a process made one after another under one name, the last has it: a rank that was
    started again has made that one alone."""
    size = max([1 + max(ranks, default=0), *(process.world_size or 0 for process in ranks.values())])
    groups = {"": Group(tuple(range(size)))} if ranks else {}
    members: dict[str, set[tuple[int, ...]]] = {}
    for process in ranks.values():
        for name, group in process.groups.items():
            members.setdefault(_plain(name, group), set()).add(group.ranks)
    keys = {}
    for rank, process in ranks.items():
        latest = {_plain(name, group): name for name, group in process.groups.items()}
        for name, group in process.groups.items():
            plain = _plain(name, group)
            key = plain if len(members[plain]) == 1 else f"{plain} {list(group.ranks)}"
            if latest[plain] != name:
                key += f" (before it was made anew, {name})"
            keys[rank, name] = key
            groups[key] = Group(group.ranks, group.backend)
    return keys, groups


def _plain(name: str, group: WatchedGroup) -> str:
    """The name that people know: `default`, or a group's description before its name."""
    name = name.partition("#")[0]
    if group.description == "default_pg" or name in ("default_pg", "0"):
        return WORLD
    if group.description in ("", "undefined") or group.description == name:
        return name
    return f"{group.description} {name}"


def _event(
    op: WatchedOp, rank: int, keys: Mapping[tuple[int, str], str], groups: Mapping[str, Group]
) -> Event:
    key = keys.get((rank, op.group), op.group)
    call = CallRecord(
        group=key,
        backend=op.backend or (groups[key].backend if key in groups else ""),
        tag=op.tag or 0,
        shape=op.shape,
        dtype=op.dtype.removeprefix("torch."),
        is_async=op.is_async,
        is_waited=bool(op.waited_ns),
        is_followed=op.is_followed,
        number=op.number,
        file=op.waited_file if op.is_async and op.waited_line and not op.line else op.file,
        line=op.line or op.waited_line,
        function=op.function,
    )
    began, done = op.issued_ns, op.done_ns
    start = max(began, op.waited_ns) if op.waited_ns else began
    if done:
        done = max(done, began)
        start = min(start, done)
    peer = op.peer if op.kind in MESSAGES else None
    times = (began, start, start, done)
    return Event(rank, op.thread, op.kind, *times, "", op.chunk, op.layer, peer, 0, op.nbytes, op.seq, call)


def _with_met(events: Sequence[Event], groups: Mapping[str, Group]) -> list[Event]:
    """The events, in which `met` says when the last of those who take part had come."""
    ops = MatchedOps(events, groups)
    came: dict[int, int] = {}
    for send, recv in ops.messages():
        came[id(send.event)], came[id(recv.event)] = recv.event.ready, send.event.ready
    for parts in ops.collectives():
        last = max(op.event.ready for op in parts.values())
        came |= {id(op.event): last for op in parts.values()}
    found = []
    for event in events:
        at = came.get(id(event), event.start)
        met = max(event.start, min(at, event.end)) if event.end else event.start
        found.append(event if met == event.met else replace(event, met=met))
    return found
