"""Where a rank's threads stand in Python: from the rank itself, or, if it does not answer, dumped on a signal.

The signal's handler is C code, so it works even while other C code holds the GIL; the watcher sends the signal and
reads what was written. Nothing here judges.
"""

import ast
import builtins
import faulthandler
import inspect
import linecache
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from types import FrameType, ModuleType

from dinfer.messages import StackLine, ThreadStack, ThreadStacks
from dinfer.rank.process import sign_of_life

DUMP_SIGNAL = getattr(signal, "SIGUSR2", None)
DEEPEST = 40

WRITTEN_S = 0.1
"""A dump that has not grown for so long is complete: on a busy core its writer is interrupted for less."""

_PACKAGE = Path(__file__).parent.parent

TRANSPORT = frozenset(
    f"transport/{name}.py"
    for name in ("gloo", "nccl", "ipc", "cuda_streams", "in_process", "gate", "streams")
)
"""Files of dinfer in which a thread waits for a peer, or for its limit."""

_INTERPRETER = frozenset(
    (
        "time", "_thread", "_queue", "select", "_socket", "posix", "nt", "_io", "builtins", "_asyncio",
        "_multiprocessing", "_posixsubprocess", "signal", "_signal",
    )
)  # fmt: skip
"""Modules in C by which Python itself waits: a thread in one of these does not count as in C code."""

_STANDARD = Path(threading.__file__).parent

_FOREIGN = frozenset(("ctypes", "_ctypes", "cffi", "_cffi_backend"))
"""Modules that call C code: what is called through them is C code."""

_HEAD = re.compile(r"hread (0x[0-9a-f]+)(?: \[.*?\])?(?= \(most)")


def stacks(rank: int, *, alone: bool, decoding: str = "") -> ThreadStacks:
    """Where every thread of a rank stands. `alone`: no other rank is in this process, so all threads are this rank's;
    `decoding`: the name of the thread that decodes, if it is not the usual one."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    mine = (f"rank {rank} ", f"dinfer rank {rank}_")
    found = []
    for ident, frame in sys._current_frames().items():
        name = names.get(ident, f"thread {ident}")
        if ident != threading.get_ident() and (alone or name.startswith(mine)):
            name = "decode" if name == decoding else name
            found.append(_described(name, ident, frame))
    return ThreadStacks(tuple(found))


def _described(name: str, ident: int, top: FrameType) -> ThreadStack:
    frames = [frame for frame, _ in islice(traceback.walk_stack(top), DEEPEST)]
    files = [Path(frame.f_code.co_filename) for frame in frames]
    ours = [file.relative_to(_PACKAGE).as_posix() for file in files if _PACKAGE in file.parents]
    return ThreadStack(
        name=name,
        cpu_s=_cpu_s(ident),
        frames=tuple(map(_stack_line, frames)),
        at=next((number for number, file in enumerate(files) if not _is_standard(file)), 0),
        native=_calls_c(top),
        waits=not TRANSPORT.isdisjoint(ours),
        held=any("pydevd" in file.name or "_pydevd_bundle" in file.parts for file in files[:8]),
    )


def _is_standard(file: Path) -> bool:
    """Whether it is in Python's standard library: a thread that waits there does so for its caller."""
    return _STANDARD in file.parents and not {"site-packages", "dist-packages"} & {*file.parts}


def _stack_line(frame: FrameType) -> StackLine:
    file, line = frame.f_code.co_filename, frame.f_lineno or 0
    text = linecache.getline(file, line, frame.f_globals).strip()
    return file, line, frame.f_code.co_name, shortened(text)


def shortened(text: str) -> str:
    """A line of source, or a function's name, cut to 100 characters."""
    return text if len(text) <= 100 else f"{text[:99]}…"


def _calls_c(frame: FrameType) -> bool:
    """Whether the innermost line has called into C code other than Python's own; False if unknown."""
    try:
        named = _call_under_way(frame)
        try:
            called = _resolve(named, frame)
        except (AttributeError, KeyError, ValueError):
            return _home(_resolve(_root(named), frame)) in _FOREIGN
    except (SyntaxError, AttributeError, KeyError, ValueError, TypeError, StopIteration):
        return False
    is_python = hasattr(called, "__code__") or inspect.isclass(called)
    return not is_python and _home(called) not in _INTERPRETER


def _home(of: object) -> str:
    """The module, or outermost package, that an object comes from."""
    of = getattr(of, "__objclass__", of)  # a method of a type in C is a descriptor that names its type
    owner = getattr(of, "__self__", of)
    if isinstance(owner, ModuleType):
        return owner.__name__.partition(".")[0]
    module = getattr(of, "__module__", None) or type(owner).__module__
    return str(module).partition(".")[0]


def _root(named: ast.expr) -> ast.expr:
    """What an expression begins with, such as `ctypes` in `ctypes.CDLL(None).usleep`."""
    while isinstance(named, ast.Attribute | ast.Call | ast.Subscript):
        named = named.func if isinstance(named, ast.Call) else named.value
    return named


def _call_under_way(frame: FrameType) -> ast.expr:
    """The callee of the call at which the frame stands. Raises SyntaxError, ValueError or TypeError."""
    first, last, begin, end = next(islice(frame.f_code.co_positions(), frame.f_lasti // 2, None), (None,) * 4)
    if first is None or first != last:
        raise ValueError(first)
    line = linecache.getline(frame.f_code.co_filename, first, frame.f_globals).encode()
    tree = ast.parse(line[begin:end].decode().strip(), mode="eval").body
    if not isinstance(tree, ast.Call):
        raise ValueError(tree)
    return tree.func


def _resolve(named: ast.expr, frame: FrameType) -> object:
    """The object that a dotted name stands for, found without running the user's code. Raises as its parts do."""
    if isinstance(named, ast.Name):
        spaces = (frame.f_locals, frame.f_globals, vars(builtins))
        return next(space[named.id] for space in spaces if named.id in space)
    if not isinstance(named, ast.Attribute):
        raise ValueError(named)
    of = _resolve(named.value, frame)
    return vars(of)[named.attr] if isinstance(of, ModuleType) else inspect.getattr_static(of, named.attr)


def _cpu_s(ident: int) -> float | None:
    """CPU seconds of one thread. To the microsecond, where psutil's have hundredths: two samples a moment apart tell
    whether it moves."""
    with suppress(AttributeError, OSError):
        return time.clock_gettime(time.pthread_getcpuclockid(ident))
    return None


# -- by a signal


def thread_names() -> tuple[tuple[int | None, str], ...]:
    """The number, by which a dump calls it, and name of each thread of this process."""
    return tuple((thread.ident, thread.name) for thread in threading.enumerate())


def named(dump: str, threads: Iterable[tuple[int | None, str]]) -> str:
    """The dump with these threads' names behind their numbers; faulthandler writes none, or cuts them short."""
    names = dict(threads)

    def with_name(found: re.Match[str]) -> str:
        name = names.get(int(found[1], 16))
        return f"{found[0].partition(' [')[0]} [{name}]" if name else found[0]

    return _HEAD.sub(with_name, dump)


def dump_into(descriptor: int) -> bool:
    """From now on the signal has this process write where its threads stand. Returns False, and the signal must not be
    sent, if the system has none, or somebody else uses it."""
    if DUMP_SIGNAL is None or signal.getsignal(DUMP_SIGNAL) != signal.SIG_DFL:
        return False
    faulthandler.register(DUMP_SIGNAL, descriptor, all_threads=True)
    return True


def dump_of(pid: int, descriptor: int, patience_s: float) -> str:
    """What a process writes when it gets the signal; "" where it is stopped, or writes nothing within that time."""
    if DUMP_SIGNAL is None:
        return ""
    begin = os.fstat(descriptor).st_size
    with suppress(ProcessLookupError):
        os.kill(pid, DUMP_SIGNAL)
    deadline, size, grown = time.monotonic() + patience_s, begin, time.monotonic()
    while time.monotonic() < deadline:
        life = sign_of_life(pid)
        if life is None or life.state in "TtZX":  # one that is stopped, or has ended, writes nothing
            break
        time.sleep(0.02)
        before, size = size, os.fstat(descriptor).st_size
        if size > before:
            grown = time.monotonic()
        elif size > begin and time.monotonic() - grown > WRITTEN_S:
            break
    return os.pread(descriptor, size - begin, begin).decode(errors="replace")
