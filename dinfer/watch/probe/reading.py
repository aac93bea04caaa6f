"""Reads what watched processes have left in a folder, also while they write; see `records` for the form."""

import json
import mmap
import os
import stat
import struct
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

from .records import (
    ASKED_AT,
    BEAT_AT,
    COMMIT,
    FOLLOWED,
    FORMAT_AT,
    HEADER_BYTES,
    KINDS,
    MAGIC,
    MAGIC_AT,
    MOST_FILES,
    MOST_LINES_BYTES,
    MOST_SEGMENTS,
    NOTHING,
    NOW_AT,
    NOWHERE,
    RECORD,
    SEGMENT_BYTES,
    SEGMENTS_AT,
    UNNUMBERED,
    VERSION,
    WORD,
    RaisedError,
    RecordsError,
    StacksTaken,
    ThreadLook,
    WatchedGroup,
    WatchedOp,
    WatchedProcess,
    backend_for,
)


def read(folder: str | Path) -> list[WatchedProcess]:
    """What the watched processes have written so far, by host and process number. Raises RecordsError."""
    return Reader(folder).read()


def ask_stacks(folder: str | Path, process: WatchedProcess) -> int:
    """Ask a running process where its threads stand. Returns the number of the answer, which will be among its
    `stacks`, unless the process is stopped or C code holds the GIL. Raises RecordsError."""
    path = Path(folder) / f"{process.name}.ops"
    with _opened(path, os.O_RDWR) as descriptor:
        try:
            if os.fstat(descriptor).st_size < HEADER_BYTES:
                raise RecordsError(f"{path}: it is cut short")
            header = memoryview(mmap.mmap(descriptor, HEADER_BYTES)).cast("q")
        except OSError as error:
            raise RecordsError(f"{path}: {error.strerror}") from None
        number = int(header[ASKED_AT]) + 1
        header[ASKED_AT] = number
        return number


class Reader:
    """Reads a folder again and again; what has not changed since is not parsed again."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._files: dict[str, _ProcessFiles] = {}
        self.broken: dict[str, str] = {}
        """by the name of a process, why its files could not be read; of the last call of `read_all`"""

    def read(self) -> list[WatchedProcess]:
        """As `read`: all processes, as they are now. Raises RecordsError where one cannot be read."""
        found = self.read_all()
        for error in self.broken.values():
            raise RecordsError(error)
        return found

    def read_all(self) -> list[WatchedProcess]:
        """All that can be read; `broken` says what could not. A process whose ops alone cannot be read is there,
        without these. Raises RecordsError where the folder cannot be read."""
        try:
            there = {path.name for path in self._folder.iterdir()}
        except OSError as error:
            raise RecordsError(f"{self._folder}: {error.strerror}") from None
        stems = (name.removesuffix(".ops") for name in there if name.endswith(".ops"))
        # A trace may lie beside the records.
        names = sorted(stem for stem in stems if f"{stem}.jsonl" in there)
        if len(names) > MOST_FILES:
            raise RecordsError(f"{self._folder}: there are more than {MOST_FILES} processes in it")
        found, self.broken = [], {}
        for name in names:
            files = self._files.setdefault(name, _ProcessFiles(self._folder, name))
            try:
                process = files.read()
            except RecordsError as error:
                self.broken[name] = str(error)
                process = files.without_ops()
            if process:
                found.append(process)
        return sorted(found, key=lambda one: (one.host, one.pid, one.started_ns))


class _opened:  # noqa: N801 - a context manager, used like a function
    """A plain file, never one that blocks, such as a pipe."""

    def __init__(self, path: Path, flags: int = os.O_RDONLY) -> None:
        try:
            self._descriptor = os.open(
                path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
            )
        except OSError as error:
            raise RecordsError(f"{path}: {error.strerror}") from None
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            os.close(self._descriptor)
            raise RecordsError(f"{path}: it is not a plain file")

    def __enter__(self) -> int:
        return self._descriptor

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


class _ProcessFiles:
    """The two files of one process, and what was read of them before."""

    def __init__(self, folder: Path, name: str) -> None:
        self._lines_path, self._ops_path = folder / f"{name}.jsonl", folder / f"{name}.ops"
        self._name = name
        self._process: WatchedProcess | None = None
        self._offset = self._line = 0
        self._groups: dict[int, str] = {}
        self._places: dict[int, tuple[str, int, str]] = {0: NOWHERE}
        self._forms: dict[int, tuple[tuple[int, ...], str, str]] = {0: ((), "", "")}
        self._backends: dict[tuple[int, str], str] = {}
        """by the group's number and the device"""
        self._threads: dict[int, str] = {}
        self._errors: dict[int, str] = {}
        self._segments: list[_SegmentOps] = []
        self._broken: RecordsError | None = None

    def read(self) -> WatchedProcess | None:
        """None for a process that is only just starting. Raises RecordsError; once it has, again and again."""
        try:
            if self._broken:
                raise self._broken
            return self._read()
        except RecordsError as error:
            self._broken = error
            raise

    def without_ops(self) -> WatchedProcess | None:
        """What the lines say of the process, where they can be read."""
        try:
            if self._process is None:
                self._read_lines()
        except RecordsError:
            return None
        if self._process is not None:
            self._process.ops = []
        return self._process

    def _read(self) -> WatchedProcess | None:
        # First the ops, then the lines that they refer to, which were written before them.
        header, segments = self._read_ops()
        self._read_lines()
        if self._process is None:
            return None
        process = self._process
        for number, data in enumerate(segments):
            if number == len(self._segments):
                self._segments.append(_SegmentOps())
            self._segments[number].take(data, lambda record: self._op(record, process.clock))
        ops = [op for segment in self._segments for op in segment.ops]
        if len(self._segments) > 1:
            ops.sort(key=_seq)
        process.ops = ops
        if self._errors:
            process.ops = [op._replace(error=self._errors.get(op.seq, "")) for op in ops]
        process.dropped = ops[-1].seq + 1 - len(ops) if ops else 0
        if header:
            words = memoryview(header).cast("q")
            process.heartbeat_ns = words[BEAT_AT] and words[BEAT_AT] + process.clock
            layer, chunk = struct.unpack("<ii", WORD.pack(words[NOW_AT]))
            process.now = (_known(layer), _known(chunk))
        return process

    # -- ops

    def _read_ops(self) -> tuple[bytes, list[bytes]]:
        try:
            opened = _opened(self._ops_path)
        except RecordsError:
            if not self._ops_path.exists():  # not made yet
                return b"", []
            raise
        with opened as descriptor:
            header = os.pread(descriptor, 64, 0)
            if not any(header) and not self._segments:  # it is only just being made
                return b"", []
            words = memoryview(header.ljust(64, b"\0")).cast("q")
            if words[MAGIC_AT] != MAGIC:
                raise RecordsError(f"{self._ops_path}: it is not a file of a watched process")
            if words[FORMAT_AT] != VERSION:
                raise RecordsError(f"{self._ops_path}: its format is {words[FORMAT_AT]}, not {VERSION}")
            count = words[SEGMENTS_AT]
            if not 0 <= count <= MOST_SEGMENTS:
                raise RecordsError(f"{self._ops_path}: it says that it has {count} segments")
            segments = []
            for number in range(count):
                data = os.pread(descriptor, SEGMENT_BYTES, HEADER_BYTES + number * SEGMENT_BYTES)
                if len(data) != SEGMENT_BYTES:
                    raise RecordsError(
                        f"{self._ops_path}: it is cut short: segment {number} of {count} is not whole"
                    )
                segments.append(data)
            return header, segments

    def _op(self, record: tuple[int, ...], clock: int) -> WatchedOp:
        (
            commit, issued, waited, done, number, kind, is_async, group, peer, tag, place, form, thread, nbytes,
            layer, chunk, wait_place, _,
        ) = record  # fmt: skip
        failed, done = done < 0, abs(done)
        if kind >= len(KINDS) or commit < 0 or min(issued, waited, nbytes, number - UNNUMBERED) < 0:
            raise RecordsError(f"{self._ops_path}: the record of op {commit - 1} is damaged")
        file, line, function = self._places.get(place, NOWHERE)
        waited_file, waited_line, _ = self._places.get(wait_place, NOWHERE)
        shape, dtype, device = self._forms.get(form, self._forms[0])
        state = "failed" if done and failed else "done" if done else "waiting" if waited else "issued"
        return WatchedOp(
            commit - 1, KINDS[kind], self._groups.get(group, ""), _known(peer), _known(tag), shape, dtype, nbytes,
            bool(is_async & 1), issued + clock, waited and waited + clock, done and done + clock, state,
            file, line, function, _known(layer), _known(chunk), self._threads.get(thread, ""),
            waited_file, waited_line, "", self._backend(group, device), bool(is_async & FOLLOWED), number,
        )  # fmt: skip

    def _backend(self, group: int, device: str) -> str:
        found = self._backends.get((group, device))
        if found is None:
            known = self._process.groups.get(self._groups.get(group, "")) if self._process else None
            if known is None:
                return ""
            found = self._backends[group, device] = backend_for(known.backend, device)
        return found

    # -- lines

    def _read_lines(self) -> None:
        with _opened(self._lines_path) as descriptor:
            size = os.fstat(descriptor).st_size
            if size > MOST_LINES_BYTES:
                raise RecordsError(f"{self._lines_path}: it has more than {MOST_LINES_BYTES:,} bytes")
            if size < self._offset:
                raise RecordsError(f"{self._lines_path}: it has become shorter while it was read")
            data = os.pread(descriptor, size - self._offset, self._offset)
        whole, newline, _ = data.rpartition(b"\n")  # the last line may be under way
        self._offset += len(whole) + len(newline)
        for line in whole.split(b"\n") if newline else ():
            self._line += 1
            try:
                self._take(Fields(json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise RecordsError(f"{self._lines_path}: line {self._line}: {error}") from None

    def _take(self, line: "Fields") -> None:
        what = line.text("is")
        if what == "start":
            self._start(line)
            return
        if self._process is None:
            raise ValueError("it does not begin with the process's start")
        taker = getattr(self, f"_take_{what}", None)
        if taker is not None:  # a newer probe may write more
            taker(line, self._process)

    def _start(self, line: "Fields") -> None:
        if self._process is not None:
            raise ValueError("a second start")
        if (version := line.number("version")) != VERSION:
            raise ValueError(f"its format is {version}, not {VERSION}")
        clock = line.number("clock_ns")
        self._process = WatchedProcess(
            host=line.text("host"),
            pid=line.number("pid"),
            argv=tuple(line.texts("argv")),
            name=self._name,
            hook=line.text("hook"),
            clock=clock,
            started_ns=line.number("started_ns") + clock,
            python=line.text("python", ""),
            torch=line.text("torch", ""),
            parent=line.number("parent", 0),
            expected_rank=line.optional("expected_rank"),
            places=self._places,
        )

    def _take_hook(self, line: "Fields", process: WatchedProcess) -> None:
        process.hook = line.text("name")
        process.torch = line.text("torch", process.torch)

    def _take_meant(self, line: "Fields", process: WatchedProcess) -> None:
        process.expected_rank = line.number("rank")

    def _take_rank(self, line: "Fields", process: WatchedProcess) -> None:
        process.rank, process.world_size = line.number("rank"), line.number("world_size")
        process.store = line.text("store", "")

    def _take_group(self, line: "Fields", process: WatchedProcess) -> None:
        name = first = line.text("name")
        count = 1
        while name in process.groups:
            count += 1
            name = f"{first}#{count}"
        process.groups[name] = WatchedGroup(
            name, tuple(line.numbers("ranks")), line.text("backend"), line.text("description", "")
        )
        self._groups[line.number("id")] = name

    def _take_place(self, line: "Fields", _: WatchedProcess) -> None:
        self._places[line.number("id")] = (line.text("file"), line.number("line"), line.text("function"))

    def _take_form(self, line: "Fields", _: WatchedProcess) -> None:
        form = (tuple(line.numbers("shape")), line.text("dtype"), line.text("device"))
        self._forms[line.number("id")] = form

    def _take_thread(self, line: "Fields", _: WatchedProcess) -> None:
        self._threads[line.number("id")] = line.text("name")

    def _take_tap(self, line: "Fields", process: WatchedProcess) -> None:
        facts = (line.text("name"), tuple(line.numbers("shape")), line.text("dtype"))
        process.taps[line.number("id")] = facts

    def _take_error(self, line: "Fields", _: WatchedProcess) -> None:
        self._errors[line.number("seq")] = line.text("text")

    def _take_problem(self, line: "Fields", process: WatchedProcess) -> None:
        process.problems.append(line.text("text"))

    def _take_dump(self, line: "Fields", process: WatchedProcess) -> None:
        process.dump = line.optional("signal")

    def _take_exception(self, line: "Fields", process: WatchedProcess) -> None:
        process.exception = _raised(line, process.clock)

    def _take_handled(self, line: "Fields", process: WatchedProcess) -> None:
        process.handled.append(_raised(line, process.clock))

    def _take_cell(self, line: "Fields", process: WatchedProcess) -> None:
        process.cell = line.text("state")
        if process.cell == "running":
            process.cell_raised = None

    def _take_cell_raised(self, line: "Fields", process: WatchedProcess) -> None:
        process.cell_raised = _raised(line, process.clock)

    def _take_end(self, line: "Fields", process: WatchedProcess) -> None:
        process.ended = line.text("how")

    def _take_stacks(self, line: "Fields", process: WatchedProcess) -> None:
        threads = tuple(
            ThreadLook(
                one.text("name"),
                one.number("ident"),
                tuple(
                    (frame.text("file"), frame.number("line"), frame.text("function"), frame.text("text"))
                    for frame in one.parts("frames")
                ),
                one.number("user_frames"),
                bool(one.number("for_itself", 0)),
                None if (locked := one.optional("for_lock")) is None else bool(locked),
            )
            for one in line.parts("threads")
        )  # fmt: skip
        taken = StacksTaken(line.number("number"), line.number("at_ns") + process.clock, threads)
        process.stacks.append(taken)


BLOCK_BYTES = 32 * RECORD.size
"""of a segment, so many are compared at a time with what was read before"""


class _SegmentOps:
    """The ops of a segment. Of a long run most are over, so that a look finds few records that have changed."""

    def __init__(self) -> None:
        self.ops: list[WatchedOp] = []
        self._data = b""
        self._blocks: list[list[WatchedOp]] = []

    def take(self, data: bytes, op: Callable[[tuple[int, ...]], WatchedOp]) -> None:
        """The segment as it is now; `op`: makes one of a record. Raises RecordsError."""
        if data == self._data:
            return
        before, self._data = self._data, b""
        for number, start in enumerate(range(0, len(data), BLOCK_BYTES)):
            block = data[start : start + BLOCK_BYTES]
            if number == len(self._blocks):
                self._blocks.append([])
            if block != before[start : start + BLOCK_BYTES]:
                # A record counts while its first and its last word name it: else it is empty, or being written.
                self._blocks[number] = [
                    op(record) for record in RECORD.iter_unpack(block) if record[COMMIT] == record[-1] != 0
                ]
        self.ops = [op for block in self._blocks for op in block]
        self.ops.sort(key=_seq)
        self._data = data


_seq = attrgetter("seq")


def _known(number: int) -> int | None:
    return None if number == NOTHING else number


def _raised(line: "Fields", clock: int) -> RaisedError:
    return RaisedError(
        line.text("type"),
        line.text("message"),
        line.text("file"),
        line.number("line"),
        line.text("thread"),
        line.number("at_ns") + clock,
        line.number("seq"),
    )


def _fits(value: int) -> bool:
    return not isinstance(value, bool) and abs(value) < 2**63


class Fields:
    """An object of JSON, each of whose fields is checked as it is read. Raises ValueError."""

    def __init__(self, value: object) -> None:
        if not isinstance(value, dict):
            raise ValueError("it is not a JSON object")
        self._value = value

    def _field(self, name: str, kind: type[Any], *default: Any) -> Any:
        value: Any = self._value.get(name, *default)
        if value is None and not default:
            raise ValueError(f"it has no `{name}`")
        if default and value is default[0]:
            return value
        if not isinstance(value, kind) or (kind is int and not _fits(value)):
            raise ValueError(f"`{name}` is {str(value)[:40]!r}")
        return value

    def text(self, name: str, *default: str) -> str:
        """Text."""
        return str(self._field(name, str, *default))

    def number(self, name: str, *default: int) -> int:
        """An integer of 64 bits."""
        return int(self._field(name, int, *default))

    def optional(self, name: str) -> int | None:
        """An integer, or None where there is none."""
        return None if self._value.get(name) is None else self.number(name)

    def texts(self, name: str) -> list[str]:
        """A list of texts."""
        return [Fields({name: one}).text(name) for one in self._field(name, list)]

    def numbers(self, name: str) -> list[int]:
        """A list of integers."""
        return [Fields({name: one}).number(name) for one in self._field(name, list)]

    def parts(self, name: str) -> "Iterator[Fields]":
        """A list of objects."""
        return map(Fields, self._field(name, list))
