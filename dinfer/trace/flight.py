"""Reads the dumps of PyTorch's flight recorder, JSON or pickled, as traces: one file for each rank.

A dump may come from anywhere, so pickles are read by an unpickler that makes plain containers, numbers and text only.
The recorder keeps the last ops of a rank, and says which collective of its group each is; messages have no such number,
so they are matched from the first one on that is in the dumps.
"""

import json
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any, NoReturn

from dinfer.files import FileError, as_json, read_bytes
from dinfer.trace.events import CallRecord, Event, Group
from dinfer.trace.export import TraceError
from dinfer.trace.trace import Trace

GROUPS = "groups"
"""the key of the process groups in a trace's `about`"""

MAX_BYTES = 1 << 28

_MESSAGE = re.compile(r"(send|recv) (\d+)(?:->|<-)(\d+)")
_RANK = re.compile(r"(\d+)(?:\.\w+)?$")

_KINDS = {
    "allreduce": "all_reduce",
    "all_reduce": "all_reduce",
    "allgather": "all_gather",
    "all_gather": "all_gather",
    "broadcast": "broadcast",
    "barrier": "barrier",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
    "all_to_all": "all_to_all",
    "gather": "gather",
    "scatter": "scatter",
    "reduce": "reduce",
}
"""by how the recorder's name of an op begins; longer ones first where one begins another"""

_BYTES = {
    "Float": 4, "Double": 8, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1,
    "ComplexFloat": 8, "ComplexDouble": 16,
}  # fmt: skip


class _PlainUnpickler(pickle.Unpickler):
    """Makes no objects but plain ones, whose opcodes need no class."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it would make a {module}.{name}; only plain values are admitted")

    def persistent_load(self, _: Any) -> NoReturn:
        raise pickle.UnpicklingError("it refers to something outside; only plain values are admitted")


def is_dump(path: Path) -> bool:
    """Whether a file looks like a flight recorder's dump, by its first bytes."""
    try:
        with path.open("rb") as file:
            start = file.read(1 << 16)
    except OSError:
        return False
    return start[:1] == b"\x80" or (start.lstrip()[:1] == b"{" and b'"entries"' in start)


def read_dumps(paths: Iterable[Path]) -> Trace:
    """The trace of all ranks. Which rank a dump is of is in its file's name, as torch writes it, or else in the names
    of its messages. Raises TraceError, OSError."""
    dumps = [(path, _load(path)) for path in paths]
    ranks = _ranks_of(dumps)
    groups: dict[str, Group] = {}
    events: list[Event] = []
    for (path, dump), rank in zip(dumps, ranks, strict=True):
        try:
            groups |= _groups_of(dump)
            events += _events_of(dump, rank, groups)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise TraceError(
                f"{str(path)!r} is a damaged dump of a flight recorder: {type(error).__name__}: {error}."
            ) from None
    about = {"recorded_by": "flight recorder", "world_size": len(dumps), "ranks": ranks}
    return Trace.merge([events], **about, **{GROUPS: groups_as_dict(groups)})


def groups_as_dict(groups: Mapping[str, Group]) -> dict[str, Any]:
    """As JSON has them."""
    return {name: {"ranks": list(group.ranks), "backend": group.backend} for name, group in groups.items()}


def groups_of(trace: Trace) -> dict[str, Group]:
    """The process groups in a trace of other people's code. Raises TraceError."""
    try:
        return {
            str(name): Group(tuple(int(rank) for rank in group["ranks"]), str(group.get("backend", "")))
            for name, group in trace.about.get(GROUPS, {}).items()
        }
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise TraceError(f"the trace's groups are damaged: {type(error).__name__}: {error}.") from None


def _load(path: Path) -> dict[str, Any]:
    try:
        data = read_bytes(path, MAX_BYTES)
        found = as_json(data) if data.lstrip()[:1] == b"{" else _PlainUnpickler(BytesIO(data)).load()
    except FileError as error:
        raise TraceError(f"{str(path)!r} cannot be read: {error}.") from None
    except (pickle.UnpicklingError, ValueError, EOFError, IndexError, KeyError, TypeError, AttributeError,
            MemoryError, OverflowError, RecursionError) as error:  # fmt: skip
        raise TraceError(f"{str(path)!r} is no dump of a flight recorder: {error}.") from None
    if not isinstance(found, dict) or not isinstance(found.get("entries"), list):
        raise TraceError(f"{str(path)!r} is no dump of a flight recorder: it has no entries.")
    return found


def _ranks_of(dumps: list[tuple[Path, dict[str, Any]]]) -> list[int]:
    """The rank of each dump. Raises TraceError where two are of one rank, or a name says none."""
    found = []
    for path, dump in dumps:
        named = _RANK.search(path.name)
        said = dump.get("rank")
        if isinstance(said, int):
            found.append(said)
        elif named:
            found.append(int(named[1]))
        else:
            raise TraceError(
                f"{str(path)!r}: the name must end in the rank's number, such as nccl_trace_rank_0."
            )
    if len(set(found)) < len(found):
        raise TraceError(f"two of the dumps are of one rank, by their names: ranks {sorted(found)}.")
    return found


def _groups_of(dump: Mapping[str, Any]) -> dict[str, Group]:
    groups = {}
    for name, group in dump["pg_config"].items():
        ranks = json.loads(group["ranks"]) if isinstance(group["ranks"], str) else group["ranks"]
        groups[_group_name(name, group.get("desc"))] = Group(tuple(int(rank) for rank in ranks), "nccl")
    return groups


def _group_name(name: Any, description: Any) -> str:
    """For example `default`, or `TENSOR_MODEL_PARALLEL_GROUP 35`."""
    if description == "default_pg":
        return "default"
    return str(name) if description in (None, "", "undefined") else f"{description} {name}"


def _events_of(dump: Mapping[str, Any], rank: int, groups: Mapping[str, Group]) -> list[Event]:
    found = []
    for number, entry in enumerate(dump["entries"]):
        name = _group_name(*entry["process_group"][:2])
        backend, _, what = str(entry["profiling_name"]).partition(":")
        group = groups.get(name, Group(()))
        message = _MESSAGE.match(what)
        kind, peer = message[1] if message else _kind_of(what), None
        if message:
            at = int(message[3])
            peer = group.ranks[at] if group.ranks else at
        shapes = entry["input_sizes"] or entry["output_sizes"] or [[]]
        types = entry["input_dtypes"] or entry["output_dtypes"] or [""]
        file, line, function = _frame(entry.get("frames") or ())
        began, ended = int(entry["time_created_ns"]), 0
        if entry["state"] == "completed":
            ended = max(int(entry.get("time_discovered_completed_ns") or 0), began + 1)
        call = CallRecord(
            group=name,
            backend=backend or "nccl",
            shape=tuple(int(size) for size in shapes[0]),
            dtype=str(types[0]),
            is_async=False,
            number=None if message else int(entry["collective_seq_id"]),
            file=file,
            line=line,
            function=function,
        )
        times = (began, began, ended or began, ended)
        event = Event(rank, name, kind, *times, peer=peer, index=number, call=call)
        found.append(replace(event, bytes=sum(map(_size, shapes, types))))
    return found


def _kind_of(name: str) -> str:
    plain = name.lstrip("_").lower()
    return next((kind for begin, kind in _KINDS.items() if plain.startswith(begin)), "other")


def _size(shape: list[int], dtype: str) -> int:
    size = _BYTES.get(dtype, 0)
    for length in shape:
        size *= int(length)
    return size


def _frame(frames: Iterable[Mapping[str, Any]]) -> tuple[str, int, str]:
    """The innermost frame outside torch."""
    for frame in frames:
        file = str(frame.get("filename", ""))
        if file and "/torch/" not in file:
            return file, int(frame.get("line", 0)), str(frame.get("name", ""))
    return "", 0, ""
