"""What a watched process leaves in the folder that DINFER_WATCH names: the form, for `writing` and `reading`.

Each process writes two files of its own:

- `HOST-PID.jsonl`: one JSON object a line, only appended to. What is said once: the process, its groups, the strings
  that ops refer to by number, stacks that were asked for, the exception that ended it.
- `HOST-PID.ops`: one record of fixed size for each op, in memory that is mapped. So it costs no system call, survives
  SIGKILL and os._exit, and can be read while the process runs or hangs. It grows by segments up to a limit; from then
  on the oldest records make room, those of open ops last.

Another process reads while this one writes, without a lock: every word that changes later is one aligned 64-bit store,
and a record counts only while the first and the last word of it name its number. `struct.pack_into` zeroes its target
and then writes byte after byte, so the first word is 0 when it begins. The words of a line are in the file before the
op that refers to them.

Each op says its number: what of its kind this process did before. Who reads can thus tell which send a recv meets, and
what the ranks of a group do together, though older ops are gone, on each rank others. Messages are numbered for each
group, backend, direction and peer, and for each tag where the backend heeds tags; collectives for each group and
backend; groups that are made, for each way to make one.

Times are nanoseconds: in the files of the process's monotonic clock, read back with the offset added that it noted at
its start, as time since the epoch. The reader needs the standard library only.
"""

import struct
from dataclasses import dataclass, field
from typing import NamedTuple

VERSION = 2

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

NOWHERE = ("", 0, "")
"""No file, line and function: the place 0."""

UNNUMBERED = -1
"""The number of an op that meets no other: it failed before it was issued; or a recv of which nobody can say which
message it gets, as another one was open that takes a message from any rank."""

TAGGED = frozenset({"gloo", "mpi"})
"""backends that heed the tags of messages"""

# words of the header
MAGIC_AT, FORMAT_AT, SEGMENTS_AT, BEAT_AT, ASKED_AT, ANSWERED_AT, NOW_AT = range(7)

# words of a record; COMMIT and LAST are the op's number + 1
COMMIT, ISSUED, WAITED, DONE, NUMBER = range(5)
BODY_AT = 5  # kind, is_async, group, peer; tag, place; form, thread; nbytes; layer, chunk
WAIT_PLACE, LAST = 10, 11
# DONE is negative where the op failed; of the byte is_async, FOLLOWED is a bit of its own
FOLLOWED = 2

WORD = struct.Struct("<q")
RECORD = struct.Struct("<5qBBHiiIIIqii2q")
assert RECORD.size == RECORD_WORDS * 8


class RecordsError(ValueError):
    """A file of a watched process cannot be read; the message names it and says why."""


# -- what is read


class WatchedGroup(NamedTuple):
    """A process group, as one of its members knows it."""

    name: str
    ranks: tuple[int, ...]
    """global ranks, in the group's order"""
    backend: str
    """for example `gloo`; `cpu:gloo,cuda:nccl` where it depends on the tensors' device"""
    description: str = ""


def backend_for(backend: str, device: str) -> str:
    """Of a group's backend, which may be `cpu:gloo,cuda:nccl`, the one that serves tensors on such a device; all, where
    that is unknown."""
    by_device = dict(one.split(":", 1) for one in backend.split(",") if ":" in one)
    return by_device.get(device, backend)


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
    backend: str = ""
    """that serves it; "" where that is unknown"""
    is_followed: bool = False
    """somebody took its future, and may act on its end without waiting for it"""
    number: int | None = None
    """how many of its kind the process issued before, or UNNUMBERED; None: as counted from the ops"""


class ThreadLook(NamedTuple):
    """Where one thread stood in Python."""

    name: str
    ident: int
    frames: tuple[tuple[str, int, str, str], ...]
    """file, line, function and the line's text: those of user code first, then all others; the innermost first"""
    user_frames: int
    """how many of the frames are user code: no installed package, no standard library, no torch, dinfer or probe"""
    for_itself: bool = False
    """it waits in the system for something that only its own process can do: see `waits`"""
    for_lock: bool | None = None
    """it waits in the system for a lock or a condition; None: not known"""


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
    store: str = ""
    """host and port, or file, at which its default group met; "" if unknown"""
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
    cell: str = ""
    """of a process that runs a notebook's cells: `running`, or `ended` between them"""
    cell_raised: RaisedError | None = None
    """what ended its last cell, as long as no other has begun"""
    problems: list[str] = field(default_factory=list)
    """of the probe: what it could not see, and which of its parts switched themselves off"""
    heartbeat_ns: int = 0
    """when the probe's thread last ran: every 0.25 s, unless the process is stopped or C code holds the GIL"""
    now: tuple[int | None, int | None] = (None, None)
    """layer and chunk that the process is in, as labels and layers' hooks say, between ops too"""
    stacks: list[StacksTaken] = field(default_factory=list)
    taps: dict[int, tuple[str, tuple[int, ...], str]] = field(default_factory=dict)
    """by number: name, shape and dtype of what digests were taken of (see `rows`)"""
    places: dict[int, tuple[str, int, str]] = field(default_factory=lambda: {0: NOWHERE})
    """by number: file, line and function"""
    dump: int | None = None
    """the signal on which it writes all threads' stacks into `HOST-PID.dump`, even while C code holds the GIL;
    None: it has none, and a signal would end it"""
