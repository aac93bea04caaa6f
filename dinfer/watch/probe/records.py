"""What a watched process leaves in the folder that DINFER_WATCH names: the writer, and the reader.

Each process writes two files of its own:

- `HOST-PID.jsonl`: one JSON object a line, only appended to. What is said once: the process, its groups, the strings
  that ops refer to by number, stacks that were asked for, the exception that ended it.
- `HOST-PID.ops`: one record of fixed size for each op, in memory that is mapped. So it costs no system call, survives
  SIGKILL and os._exit, and can be read while the process runs or hangs. It grows by segments up to a limit; from then
  on the oldest records make room, those of open ops last.

Another process reads while this one writes, without a lock: every word that changes later is one aligned 64-bit store,
and a record counts only while the first and the last word of it name its number. `struct.pack_into` writes bytes one by
one, so it is used only between these two. The words of a line are in the file before the op that refers to them.

Times are nanoseconds: in the files of the process's monotonic clock, read back with the offset added that it noted at
its start, as time since the epoch. The reader needs the standard library only.
"""

import itertools
import json
import mmap
import os
import socket
import stat
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

VERSION = 1

KINDS = (
    "other", "send", "recv", "all_gather", "all_reduce", "broadcast", "barrier", "reduce_scatter", "all_to_all",
    "gather", "scatter", "reduce", "init_group", "new_group",
)  # fmt: skip
"""What an op can be. The last two are not messages: a process that is making a group waits for the group's others."""

MAGIC = int.from_bytes(b"dinfops1", "little")

HEADER_BYTES = 65536  # also a page on machines with large ones
RECORD_WORDS = 12
SEGMENT_RECORDS = 4096
SEGMENT_BYTES = SEGMENT_RECORDS * RECORD_WORDS * 8  # a multiple of 65,536, too
MOST_SEGMENTS = 64
"""262,144 ops, 24 MiB; older ones are dropped."""

MOST_LINES_BYTES = 64 * 2**20
MOST_FILES = 4096
MOST_NAMES = 50_000
"""Of one kind: different lines of code, or different shapes, that a process tells apart."""

NOTHING = -(2**31)
"""No peer, tag, layer or chunk."""

# words of the header
_MAGIC, _FORMAT, _SEGMENTS, _BEAT, _ASKED, _ANSWERED, _NOW = range(7)

# words of a record; COMMIT and LAST are the op's number + 1
COMMIT, ISSUED, WAITED, DONE, STATE = range(5)
BODY = struct.Struct(
    "<BBHiiIIIqii"
)  # kind, is_async, group, peer, tag, place, form, thread, nbytes, layer, chunk
_BODY_AT = 5
WAIT_PLACE, LAST = 10, 11

_FAILED = 1

_WORD = struct.Struct("<q")
_RECORD = struct.Struct("<5qBBHiiIIIqii2q")
assert _RECORD.size == RECORD_WORDS * 8


class RecordsError(ValueError):
    """A file of a watched process cannot be read; the message names it and says why."""


# -- what is read


class WatchedGroup(NamedTuple):
    """A process group, as one of its members knows it."""

    name: str
    ranks: tuple[int, ...]
    """global ranks, in the group's order"""
    backend: str
    description: str = ""


class WatchedOp(NamedTuple):
    """One call of torch.distributed in one process."""

    seq: int
    """its number in the process, in the order of issue"""
    kind: str
    """one of KINDS"""
    group: str
    """a key of the process's groups; "" before there is one"""
    peer: int | None
    """the global rank to which it sends, from which it receives (None: from any), or that is a collective's root"""
    tag: int | None
    shape: tuple[int, ...]
    """of the first tensor: what this rank sends, or receives where it sends nothing"""
    dtype: str
    nbytes: int
    """of all of its tensors"""
    is_async: bool
    """whether the caller has to wait for it"""
    issued_ns: int
    waited_ns: int
    """when somebody began to wait for it; 0: nobody has yet. For a blocking op right after it was issued."""
    done_ns: int
    """when it was known to be over; 0: it is not. Later than it happened where nobody waited, by up to 0.25 s."""
    state: str
    """issued, waiting, done or failed"""
    file: str
    line: int
    function: str
    """the first frame outside torch, the probe and dinfer: who called"""
    layer: int | None
    chunk: int | None
    thread: str
    waited_file: str = ""
    waited_line: int = 0
    """who waits for it, or did; "" and 0 if nobody"""
    error: str = ""
    """why it failed"""


class ThreadLook(NamedTuple):
    """Where one thread stood in Python."""

    name: str
    ident: int
    frames: tuple[tuple[str, int, str, str], ...]
    """file, line, function and the line's text: those of user code first, then all others; the innermost first"""
    user_frames: int
    """how many of the frames are user code: no installed package, no standard library, no torch, dinfer or probe"""


class StacksTaken(NamedTuple):
    """Where all threads of a process stood when somebody asked."""

    number: int
    """of the request, as `ask_stacks` returned it; 0: the probe wrote it by itself"""
    at_ns: int
    threads: tuple[ThreadLook, ...]
    """the main thread first"""


class RaisedError(NamedTuple):
    """An exception."""

    type: str
    message: str
    file: str
    line: int
    """the innermost frame of user code"""
    thread: str = "MainThread"
    at_ns: int = 0
    seq: int = -1
    """how many ops the process had issued before"""


@dataclass
class WatchedProcess:
    """One process that was watched, as far as its files say."""

    host: str
    pid: int
    argv: tuple[str, ...]
    name: str
    """of its files, without suffix"""
    hook: str
    """how ops are seen: `hooks`, `kernels`, `patched` or `none`"""
    clock: int
    """nanoseconds since the epoch when its monotonic clock began; already added to all times"""
    started_ns: int = 0
    python: str = ""
    torch: str = ""
    parent: int = 0
    rank: int | None = None
    """in the default group; None before it exists"""
    world_size: int | None = None
    expected_rank: int | None = None
    """what the environment variable RANK said"""
    groups: dict[str, WatchedGroup] = field(default_factory=dict)
    """by name; a name that was used before, for other members or after the groups had been destroyed, has `#2` added"""
    ops: list[WatchedOp] = field(default_factory=list)
    """in the order of issue"""
    dropped: int = 0
    """how many older ops had to make room"""
    ended: str | None = None
    """how it ended by itself: `exit`, `os._exit(3)`, `exception`; None while it runs, and where it was killed"""
    exception: RaisedError | None = None
    """the last one that ended a thread or the process"""
    handled: list[RaisedError] = field(default_factory=list)
    """exceptions that were being handled while the process issued ops, each once: `seq` is the number of the first"""
    problems: list[str] = field(default_factory=list)
    """of the probe: what it could not see, and which of its parts switched themselves off"""
    heartbeat_ns: int = 0
    """when the probe's thread last ran: every 0.25 s, unless the process is stopped or C code holds the GIL"""
    now: tuple[int | None, int | None] = (None, None)
    """layer and chunk that the process is in, as labels and layers' hooks say, between ops too"""
    stacks: list[StacksTaken] = field(default_factory=list)
    taps: dict[int, tuple[str, tuple[int, ...], str]] = field(default_factory=dict)
    """by number: name, shape and dtype of what digests were taken of (see `rows`)"""
    dump: int | None = None
    """the signal on which it writes all threads' stacks into `HOST-PID.dump`, even while C code holds the GIL;
    None: it has none, and a signal would end it"""


# -- writing


def _map(descriptor: int, start: int, length: int) -> memoryview:
    """Words of the file, which grows to hold them. Raises OSError where the disk is full: written to unreserved, mapped
    memory would end the process then (SIGBUS)."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, start, length)
    else:
        os.ftruncate(descriptor, start + length)
    return memoryview(mmap.mmap(descriptor, length, offset=start)).cast("q")


class Ticket(NamedTuple):
    """Where the record of an op is: for what is known of it later."""

    words: memoryview
    base: int
    commit: int


class OpsWriter:
    """The records of this process's ops. Any thread may write; none waits for another, but while a segment is added."""

    def __init__(self, path: Path, most_segments: int = MOST_SEGMENTS) -> None:
        """Raises OSError."""
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._header = _map(self._descriptor, 0, HEADER_BYTES)
        self._segments: list[memoryview] = []
        self._most = most_segments
        self._count, self._slots = itertools.count(), itertools.count()
        # Reentrant: a signal's handler may issue an op while its thread is adding a segment.
        self._growing = threading.RLock()
        self.issued = 0
        self._header[_NOW] = _pair(NOTHING, NOTHING)
        self._header[_FORMAT] = VERSION
        self._header[_MAGIC] = MAGIC

    def begin(
        self, now: int, kind: int, is_async: bool, group: int, peer: int, tag: int, place: int, form: int,
        thread: int, nbytes: int, layer: int, chunk: int,
    ) -> Ticket:  # fmt: skip
        """Record that an op is issued. Numbers stand for what the lines of the same number say."""
        words, base = self._room(next(self._slots))
        commit = next(self._count) + 1
        words[base] = words[base + LAST] = 0
        words[base + ISSUED] = now
        words[base + WAITED] = words[base + DONE] = words[base + STATE] = words[base + WAIT_PLACE] = 0
        BODY.pack_into(
            words, (base + _BODY_AT) * 8, kind, is_async, group, peer, tag, place, form, thread, nbytes, layer, chunk
        )  # fmt: skip
        words[base + LAST] = commit
        words[base] = commit
        self.issued = commit
        return Ticket(words, base, commit)

    def waiting(self, ticket: Ticket, now: int, place: int) -> None:
        """Somebody begins to wait for the op. Only the first time counts."""
        words, base, commit = ticket
        if words[base] == commit and not words[base + WAITED]:
            words[base + WAIT_PLACE] = place
            words[base + WAITED] = now

    def done(self, ticket: Ticket, now: int, failed: bool = False) -> None:
        """The op is over. Only the first time counts."""
        words, base, commit = ticket
        if words[base] == commit and not words[base + DONE]:
            words[base + STATE] = _FAILED if failed else 0
            words[base + DONE] = now

    def is_done(self, ticket: Ticket) -> bool:
        """Whether the op's end is recorded, or the op has made room for another."""
        words, base, commit = ticket
        return words[base] != commit or words[base + DONE] != 0

    def set_peer(self, ticket: Ticket, peer: int) -> None:
        """The rank from which a receive from any rank has received."""
        words, base, commit = ticket
        if words[base] == commit:
            words[base + _BODY_AT] = (words[base + _BODY_AT] & 0xFFFFFFFF) | (peer << 32)

    def beat(self, now: int) -> None:
        """A sign of life."""
        self._header[_BEAT] = now

    def set_now(self, layer: int, chunk: int) -> None:
        """Layer and chunk that the process is in; NOTHING for none."""
        self._header[_NOW] = _pair(layer, chunk)

    @property
    def asked(self) -> int:
        """The number of the request for stacks that is unanswered; 0: none."""
        asked = int(self._header[_ASKED])
        return asked if asked != self._header[_ANSWERED] else 0

    def answered(self, number: int) -> None:
        """The stacks of this request are written."""
        self._header[_ANSWERED] = number

    def _room(self, slot: int) -> tuple[memoryview, int]:
        number, place = divmod(slot, SEGMENT_RECORDS)
        if number >= len(self._segments):
            if len(self._segments) < self._most:
                self._grow(number)
            if number >= len(self._segments):
                return self._reused(slot)
        return self._segments[number], place * RECORD_WORDS

    def _grow(self, number: int) -> None:
        with self._growing:
            while number >= len(self._segments) and len(self._segments) < self._most:
                start = HEADER_BYTES + len(self._segments) * SEGMENT_BYTES
                try:
                    self._segments.append(_map(self._descriptor, start, SEGMENT_BYTES))
                except OSError:
                    if not self._segments:
                        raise
                    self._most = len(self._segments)  # the disk is full: go on in what there is
                self._header[_SEGMENTS] = len(self._segments)

    def _reused(self, slot: int) -> tuple[memoryview, int]:
        """The place of an old op, rather of one that is over. Who waits is what a hang is about."""
        capacity = len(self._segments) * SEGMENT_RECORDS
        for _ in range(64):
            number, place = divmod(slot % capacity, SEGMENT_RECORDS)
            words, base = self._segments[number], place * RECORD_WORDS
            if words[base + DONE]:
                break
            slot = next(self._slots)
        return words, base


def _pair(layer: int, chunk: int) -> int:
    return int(_WORD.unpack(struct.pack("<ii", layer, chunk))[0])


class LinesWriter:
    """The lines of this process: each is one write at the end of the file, so that threads need no lock."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o600)
        self._left = MOST_LINES_BYTES

    def write(self, what: str, **fields: Any) -> bool:
        """Append a line. Returns False where the file has reached its limit. Raises OSError."""
        line = json.dumps({"is": what, **fields}, separators=(",", ":"), default=repr).encode() + b"\n"
        self._left -= len(line)
        if self._left < 0:
            return False
        os.write(self._descriptor, line)
        return True


class NumberedNames:
    """Numbers for values that many ops share. A value's line is written before its number is used."""

    def __init__(self, lines: LinesWriter, what: str, fields: Callable[[Any], dict[str, Any]]) -> None:
        self._lines, self._what, self._fields = lines, what, fields
        self._numbers: dict[Any, int] = {}
        self._next = itertools.count(1)

    def number(self, value: Any) -> int:
        """Its number; 0, which stands for none, once there are too many."""
        found = self._numbers.get(value)
        if found is None:
            found = next(self._next)
            if found > MOST_NAMES or not self._lines.write(self._what, id=found, **self._fields(value)):
                return 0
            self._numbers[value] = found
        return found


class Records:
    """All that this process writes."""

    def __init__(self, folder: Path, hook: str, **about: Any) -> None:
        """Makes the files, and the folder if need be. `about`: more fields of the first line. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        host, pid = socket.gethostname(), os.getpid()
        stem = f"{''.join(c if c.isalnum() or c in '._-' else '_' for c in host)}-{pid}"
        for count in itertools.count(
            1
        ):  # a process that replaced itself (exec) has the number of the one before
            self.name = stem if count == 1 else f"{stem}-{count}"
            try:
                self.lines = LinesWriter(folder / f"{self.name}.jsonl")
                break
            except FileExistsError:
                continue
        started = time.monotonic_ns()
        self.lines.write(
            "start",
            version=VERSION,
            host=host,
            pid=pid,
            parent=os.getppid(),
            argv=list(getattr(sys, "orig_argv", sys.argv)),
            python=sys.version.split()[0],
            hook=hook,
            clock_ns=time.time_ns() - started,
            started_ns=started,
            **about,
        )
        self.ops = OpsWriter(folder / f"{self.name}.ops")
        self.groups = NumberedNames(
            self.lines, "group", lambda value: dict(zip(_GROUP_FIELDS, value[1:], strict=True))
        )
        self.places = NumberedNames(
            self.lines, "place", lambda value: dict(zip(_PLACE_FIELDS, value, strict=True))
        )
        self.forms = NumberedNames(self.lines, "form", _form_fields)
        self.threads = NumberedNames(
            self.lines, "thread", lambda value: {"name": value[1], "ident": value[0]}
        )


def _form_fields(form: Any) -> dict[str, Any]:
    shape, dtype = form
    return {"shape": list(shape), "dtype": str(dtype).rpartition(".")[2]}


_GROUP_FIELDS = ("name", "ranks", "backend", "description")
_PLACE_FIELDS = ("file", "line", "function")


# -- reading


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
        number = int(header[_ASKED]) + 1
        header[_ASKED] = number
        return number


class Reader:
    """Reads a folder again and again; what has not changed since is not parsed again."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._files: dict[str, _ProcessFiles] = {}

    def read(self) -> list[WatchedProcess]:
        """As `read`: all processes, as they are now."""
        try:
            names = sorted(path.stem for path in self._folder.iterdir() if path.suffix == ".jsonl")
        except OSError as error:
            raise RecordsError(f"{self._folder}: {error.strerror}") from None
        if len(names) > MOST_FILES:
            raise RecordsError(f"{self._folder}: there are more than {MOST_FILES} processes in it")
        found = []
        for name in names:
            files = self._files.setdefault(name, _ProcessFiles(self._folder, name))
            if process := files.read():
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
        self._places: dict[int, tuple[str, int, str]] = {0: ("", 0, "")}
        self._forms: dict[int, tuple[tuple[int, ...], str]] = {0: ((), "")}
        self._threads: dict[int, str] = {}
        self._errors: dict[int, str] = {}
        self._segments: list[tuple[bytes, list[WatchedOp]]] = []
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

    def _read(self) -> WatchedProcess | None:
        # First the ops, then the lines that they refer to, which were written before them.
        header, segments = self._read_ops()
        self._read_lines()
        if self._process is None:
            return None
        process = self._process
        for number, data in enumerate(segments):
            if number == len(self._segments):
                self._segments.append((b"", []))
            if data != self._segments[number][0]:
                self._segments[number] = (data, self._ops_of(data, process.clock))
        ops = [op for _, found in self._segments for op in found]
        if len(self._segments) > 1:
            ops.sort(key=_seq)
        process.ops = ops
        if self._errors:
            process.ops = [op._replace(error=self._errors.get(op.seq, "")) for op in ops]
        process.dropped = ops[-1].seq + 1 - len(ops) if ops else 0
        if header:
            words = memoryview(header).cast("q")
            process.heartbeat_ns = words[_BEAT] and words[_BEAT] + process.clock
            layer, chunk = struct.unpack("<ii", _WORD.pack(words[_NOW]))
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
            if len(header) < 64:
                return b"", self._cut_short(descriptor)
            words = memoryview(header).cast("q")
            if words[_MAGIC] == 0:
                return b"", self._cut_short(descriptor)
            if words[_MAGIC] != MAGIC:
                raise RecordsError(f"{self._ops_path}: it is not a file of a watched process")
            if words[_FORMAT] != VERSION:
                raise RecordsError(f"{self._ops_path}: its format is {words[_FORMAT]}, not {VERSION}")
            count = words[_SEGMENTS]
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

    def _cut_short(self, descriptor: int) -> list[bytes]:
        """Nothing, if the file is only just being made."""
        if self._segments or os.fstat(descriptor).st_size > HEADER_BYTES:
            raise RecordsError(f"{self._ops_path}: it is not a file of a watched process")
        return []

    def _ops_of(self, data: bytes, clock: int) -> list[WatchedOp]:
        found = []
        for record in _RECORD.iter_unpack(data):
            commit = record[COMMIT]
            if commit == 0:
                continue
            if commit == record[-1]:  # else it is being written
                found.append(self._op(record, clock))
        found.sort(key=_seq)
        return found

    def _op(self, record: tuple[int, ...], clock: int) -> WatchedOp:
        (
            commit, issued, waited, done, failed, kind, is_async, group, peer, tag, place, form, thread, nbytes,
            layer, chunk, wait_place, _,
        ) = record  # fmt: skip
        if kind >= len(KINDS) or commit < 0 or min(issued, waited, done, nbytes) < 0:
            raise RecordsError(f"{self._ops_path}: the record of op {commit - 1} is damaged")
        file, line, function = self._places.get(place, self._places[0])
        waited_file, waited_line, _ = self._places.get(wait_place, self._places[0])
        shape, dtype = self._forms.get(form, self._forms[0])
        state = "failed" if done and failed else "done" if done else "waiting" if waited else "issued"
        return WatchedOp(
            commit - 1, KINDS[kind], self._groups.get(group, ""), _known(peer), _known(tag), shape, dtype, nbytes,
            bool(is_async), issued + clock, waited and waited + clock, done and done + clock, state,
            file, line, function, _known(layer), _known(chunk), self._threads.get(thread, ""),
            waited_file, waited_line,
        )  # fmt: skip

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
        )

    def _take_hook(self, line: "Fields", process: WatchedProcess) -> None:
        process.hook = line.text("name")
        process.torch = line.text("torch", process.torch)

    def _take_rank(self, line: "Fields", process: WatchedProcess) -> None:
        process.rank, process.world_size = line.number("rank"), line.number("world_size")

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
        self._forms[line.number("id")] = (tuple(line.numbers("shape")), line.text("dtype"))

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
            )
            for one in line.parts("threads")
        )  # fmt: skip
        taken = StacksTaken(line.number("number"), line.number("at_ns") + process.clock, threads)
        process.stacks.append(taken)


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
