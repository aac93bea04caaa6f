"""What a process waits for that is no part of its run, by its stacks: a request, a child process.

A rank that serves stands in `accept` or `select` for as long as nobody asks for anything, and its run is no hang. Where
a thread waits for another of its own process, such as in `queue.get`, or in `select` for a socket whose other end is
there, too, that other thread decides.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import psutil

from dinfer.watch.probe.records import StacksTaken, ThreadLook

Frames = Sequence[tuple[str, int, str, str]]

_INNERMOST = 6
"""frames that are looked at: standard libraries call themselves a few times"""

_OUTSIDE = {
    ("selectors.py", "select"): "a connection",
    ("socket.py", "accept"): "a connection",
    ("socket.py", "readinto"): "a connection",
    ("ssl.py", "read"): "a connection",
    ("poll.py", "poll"): "a connection",
    ("socketserver.py", "serve_forever"): "a connection",
    ("fileinput.py", "readline"): "input",
}
"""by file and function of a library's innermost frame"""

_CHILD_FILES = ("subprocess.py", "popen_fork.py", "popen_spawn_posix.py", "popen_forkserver.py")

_MESSAGE = "a message from outside"

_LIBRARY_LINE = re.compile(r"\brecv_(json|pyobj|multipart|string)\(")
"""of a library whose own thread receives, and tells the one that waits by a descriptor of the process"""

_BARE_RECV = re.compile(r"\.recv\(\s*(\)|flags\s*=|copy\s*=|zmq\.)")
"""ZeroMQ's, in C: torch.distributed's takes a tensor, a socket's a size"""

_PIPE = "multiprocessing/connection.py"
"""whose `recv` is written like that too, and has a frame of its own"""

_LINES = (
    (
        re.compile(r"\baccept\(|\bselect\(|\bpoll\(|\bserve_forever\(|\bwait_for_termination\("),
        "a connection",
    ),
    (_LIBRARY_LINE, _MESSAGE),
    (re.compile(r"\brecv_into\(|\brecvfrom\("), _MESSAGE),
    (re.compile(r"\brun_forever\(|\brun_until_complete\(|\basyncio\.run\(|\buvicorn\.run\("), "a connection"),
    (re.compile(r"\binput\(|\bstdin\b"), "input"),
)
"""by the user's line, where it has called into C"""

_WAIT_LINE = re.compile(r"\.(get|wait|acquire|join)\(")
"""of queues, events and locks in C"""

_CHILD_LINE = re.compile(r"\bos\.wait(pid|3|4)?\(")

_SERVERS = re.compile(
    r"/(socketserver|http/server|uvicorn|hypercorn|aiohttp|tornado|werkzeug|grpc|gunicorn|xmlrpc/server)\b"
)
"""files of servers"""

_KERNEL = re.compile(r"/(ipykernel|ipyparallel|debugpy)/")
"""An engine of a notebook stands in its loop once its cell is over: that is no service of the user's."""


def outside_of(taken: StacksTaken, thread: str) -> str:
    """What outside of the run that thread waits for, in words; "" if nothing says that it does."""
    mine = _named(taken, thread)
    if mine is None or _is_of_kernel(mine) or child_waited(taken, thread):
        return ""
    if mine.for_itself:
        if mine.user_frames and (_LIBRARY_LINE.search(mine.frames[0][3]) or _receives_bare(mine)):
            return _MESSAGE
    else:
        if found := _of_thread(mine):
            return found
        if not _waits_for_thread(mine):
            return ""
    others = (
        one
        for one in taken.threads
        if one is not mine and not one.for_itself and not _is_of_kernel(one) and _serves(one)
    )
    return next((found for one in others if (found := _of_thread(one))), "")


def child_waited(taken: StacksTaken, thread: str) -> bool:
    """Whether that thread waits for a child process."""
    mine = _named(taken, thread)
    if mine is None:
        return False
    library = _library(mine)
    is_in_wait = any(
        os.path.basename(file) in _CHILD_FILES
        or ("torch/multiprocessing" in file and name == "join")
        or (file.endswith("multiprocessing/process.py") and name == "join")
        for file, _, name, _ in library
    )
    return is_in_wait or bool(mine.user_frames and _CHILD_LINE.search(mine.frames[0][3]))


def child_text(pid: int, host_is_here: bool) -> str:
    """The child processes of a process of this host, in words; without numbers where it is of another."""
    names = [] if not host_is_here else [f"{child} ({_name_of(child)})" for child in children_of(pid)]
    if not names:
        return "a child process"
    some = f"{', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
    return f"its child process{'es' * (len(names) > 1)} {some}"


def children_of(pid: int) -> list[int]:
    """The numbers of the children of a process, in order; [] where the system does not say."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(word) for word in path.read_text(encoding="ascii").split()]
        except (OSError, ValueError):
            continue
    return sorted(found)


def descendants_of(pid: int) -> list[int]:
    """Its children, and theirs."""
    found, new = list[int](), children_of(pid)
    while new and len(found) < 1000:
        found += new
        new = [child for one in new for child in children_of(one)]
    return found


def _name_of(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return "ended"


def _named(taken: StacksTaken, thread: str) -> ThreadLook | None:
    """That thread, or the main one where it is gone."""
    return next((one for one in taken.threads if one.name == thread), next(iter(taken.threads), None))


def _library(thread: ThreadLook) -> Frames:
    """The innermost frames that are not the user's. They are inside of the user's, unless a library has called back:
    then they are of the library's way to its callback, which waits for nothing."""
    return thread.frames[thread.user_frames :][:_INNERMOST]


def _of_thread(thread: ThreadLook) -> str:
    library = _library(thread)
    if library:
        file, _, name, _ = library[0]
        if found := _OUTSIDE.get((os.path.basename(file), name)):
            return found
    if thread.user_frames:
        line = thread.frames[0][3]
        found = next((words for pattern, words in _LINES if pattern.search(line)), "")
        return found or (_MESSAGE if _receives_bare(thread) else "")
    return ""


def _receives_bare(thread: ThreadLook) -> bool:
    library = _library(thread)
    is_pipe = bool(library) and library[0][0].endswith(_PIPE)
    return bool(_BARE_RECV.search(thread.frames[0][3])) and not is_pipe


def _waits_for_thread(thread: ThreadLook) -> bool:
    library = _library(thread)
    in_library = bool(library) and os.path.basename(library[0][0]) in ("threading.py", "queue.py")
    if in_library or thread.for_lock is False:  # the user's line may have called any C code
        return in_library
    return bool(thread.user_frames and _WAIT_LINE.search(thread.frames[0][3]))


def _serves(thread: ThreadLook) -> bool:
    return bool(thread.user_frames) or any(_SERVERS.search(file) for file, *_ in thread.frames)


def _is_of_kernel(thread: ThreadLook) -> bool:
    return any(_KERNEL.search(file) for file, *_ in thread.frames)
