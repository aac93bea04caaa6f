"""Where a rank's threads stand in Python: asked of the rank while it answers, dumped by a signal while it does not.

The signal's handler is C code, so it writes also while other C code holds the interpreter; the watcher sends it and
reads what was written. Nothing here judges.
"""

import ast
import builtins
import contextlib
import faulthandler
import inspect
import linecache
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

DUMP_SIGNAL = getattr(signal, "SIGUSR2", None)

DEEPEST = 40

LONGEST = 100

WRITTEN_S = 0.1
"""A dump that has not grown for so long is complete: on a busy core its writer is interrupted for less."""

_PACKAGE = Path(__file__).parent.parent

TRANSPORT = frozenset(f"transport/{name}.py" for name in ("gloo", "nccl", "in_process", "gate", "streams"))
"""the files of dinfer in which a thread waits for a peer, or for its limit"""

_INTERPRETER = frozenset(
    (
        "time", "_thread", "_queue", "select", "_socket", "posix", "nt", "_io", "builtins", "_asyncio",
        "_multiprocessing", "_posixsubprocess", "signal", "_signal",
    )
)  # fmt: skip
"""modules in C that are Python's own ways of waiting: a thread in one of these is still stuck in Python"""

_STANDARD = Path(threading.__file__).parent

_PACKAGES = frozenset(("site-packages", "dist-packages"))

_FOREIGN = frozenset(("ctypes", "_ctypes", "cffi", "_cffi_backend"))
"""ways into C code: what is called through them is that"""

_HEAD = re.compile(r"hread (0x[0-9a-f]+)(?: \[.*?\])?(?= \(most)")

Message = dict[str, Any]


def stacks(rank: int, *, alone: bool, decoding: str = "") -> Message:
    """Every thread of a rank; `alone`: its process is its own, so that all threads in it are; `decoding`: the name of
    the one that decodes, where it has another than a session's ranks give it."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    mine = (f"rank {rank} ", f"dinfer rank {rank}_")
    found = []
    for ident, frame in sys._current_frames().items():
        name = names.get(ident, f"thread {ident}")
        if ident != threading.get_ident() and (alone or name.startswith(mine)):
            name = "decode" if name == decoding else name
            found.append({"name": name, "cpu_s": _cpu_s(ident), **_described(frame)})
    return {"threads": found}


def _described(top: FrameType) -> Message:
    """The frames, the innermost first: [file, line, function, text]. `at`: the number of the one that says most."""
    frames = list(islice(_outwards(top), DEEPEST))
    files = [Path(frame.f_code.co_filename) for frame in frames]
    return {
        "frames": [_frame(frame) for frame in frames],
        "at": next((number for number, file in enumerate(files) if not _is_standard(file)), 0),
        "native": _calls_c(top),
        "waits": any(_is_transport(file) for file in files),
        "held": any("pydevd" in file.name or "_pydevd_bundle" in file.parts for file in files[:8]),
    }


def _is_transport(file: Path) -> bool:
    return _PACKAGE in file.parents and file.relative_to(_PACKAGE).as_posix() in TRANSPORT


def _is_standard(file: Path) -> bool:
    """Whether it is of Python's own library: who waits there does so for whoever has called it."""
    return _STANDARD in file.parents and not _PACKAGES & set(file.parts)


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _frame(frame: FrameType) -> list[object]:
    file, line = frame.f_code.co_filename, frame.f_lineno or 0
    text = linecache.getline(file, line, frame.f_globals).strip()
    return [file, line, frame.f_code.co_name, text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"]


def _calls_c(frame: FrameType) -> bool:
    """Whether the innermost line has called into C code that is not Python's own; False where that cannot be told."""
    try:
        named = _call_under_way(frame)
        try:
            called = _resolve(named, frame)
        except (AttributeError, KeyError, ValueError):
            return _home(_resolve(_root(named), frame)) in _FOREIGN
    except (SyntaxError, AttributeError, KeyError, ValueError, TypeError, StopIteration):
        return False
    return (
        not hasattr(called, "__code__") and not inspect.isclass(called) and _home(called) not in _INTERPRETER
    )


def _home(of: object) -> str:
    """The module, or outermost package, that something comes from."""
    owner = getattr(of, "__self__", of)
    if isinstance(owner, ModuleType):
        return owner.__name__.partition(".")[0]
    module = getattr(of, "__module__", None) or type(owner).__module__
    return str(module).partition(".")[0]


def _root(named: ast.expr) -> ast.expr:
    """What an expression begins with: of `ctypes.CDLL(None).usleep`, `ctypes`."""
    while isinstance(named, ast.Attribute | ast.Call | ast.Subscript):
        named = named.func if isinstance(named, ast.Call) else named.value
    return named


def _call_under_way(frame: FrameType) -> ast.expr:
    """What is called by the instruction at which the frame stands. Raises SyntaxError, ValueError or TypeError."""
    first, last, begin, end = next(islice(frame.f_code.co_positions(), frame.f_lasti // 2, None), (None,) * 4)
    if first is None or first != last:
        raise ValueError(first)
    line = linecache.getline(frame.f_code.co_filename, first, frame.f_globals).encode()
    tree = ast.parse(line[begin:end].decode().strip(), mode="eval").body
    if not isinstance(tree, ast.Call):
        raise ValueError(tree)
    return tree.func


def _resolve(named: ast.expr, frame: FrameType) -> object:
    """The object that a name, or names with dots, stand for; no code of the user's is run. Raises as its parts do."""
    if isinstance(named, ast.Name):
        spaces = (frame.f_locals, frame.f_globals, vars(builtins))
        return next(space[named.id] for space in spaces if named.id in space)
    if not isinstance(named, ast.Attribute):
        raise ValueError(named)
    of = _resolve(named.value, frame)
    return vars(of)[named.attr] if isinstance(of, ModuleType) else _attribute(of, named.attr)


def _attribute(of: object, name: str) -> object:
    found = inspect.getattr_static(of, name)
    # A method of a type in C is a descriptor, which says of which type it is.
    owner = getattr(found, "__objclass__", None)
    return _Method(owner.__module__) if owner is not None else found


class _Method:
    """Stands for a method in C of a type of this module."""

    def __init__(self, module: str) -> None:
        self.__module__ = module


def _cpu_s(ident: int) -> float | None:
    with contextlib.suppress(AttributeError, OSError):
        return time.clock_gettime(time.pthread_getcpuclockid(ident))
    return None


# -- by a signal


def thread_names() -> list[tuple[int | None, str]]:
    """Of all threads of this process, by what a dump calls them."""
    return [(thread.ident, thread.name) for thread in threading.enumerate()]


def named(dump: str, threads: Iterable[tuple[int, str]]) -> str:
    """The dump with these threads' names in it, after their numbers: faulthandler has none, or short ones."""
    names = dict(threads)

    def with_name(found: re.Match[str]) -> str:
        name = names.get(int(found[1], 16))
        return f"{found[0].partition(' [')[0]} [{name}]" if name else found[0]

    return _HEAD.sub(with_name, dump)


def dump_into(descriptor: int) -> bool:
    """From now on the signal has this process write where its threads stand; False, and then it must not be sent, where
    there is no such signal, or somebody else uses it."""
    if DUMP_SIGNAL is None or signal.getsignal(DUMP_SIGNAL) != signal.SIG_DFL:
        return False
    faulthandler.register(DUMP_SIGNAL, descriptor, all_threads=True)
    return True


def dump_of(pid: int, descriptor: int, patience_s: float) -> str:
    """What a process writes when it gets the signal; "" where it is stopped, or writes nothing within that time."""
    if DUMP_SIGNAL is None:
        return ""
    begin = os.fstat(descriptor).st_size
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, DUMP_SIGNAL)
    deadline, size, grown = time.monotonic() + patience_s, begin, time.monotonic()
    while time.monotonic() < deadline and not _is_stopped(pid):
        time.sleep(0.02)
        before, size = size, os.fstat(descriptor).st_size
        if size > before:
            grown = time.monotonic()
        elif size > begin and time.monotonic() - grown > WRITTEN_S:
            break
    return os.pread(descriptor, size - begin, begin).decode(errors="replace")


def _is_stopped(pid: int) -> bool:
    """Whether a process is stopped, or has ended, and so writes nothing; False where the system does not say."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] in "TtZX"
    return False
