"""What a thread of this process waits for in the system: whether anybody else could wake it. On Linux, by /proc.

A thread that waits in `select` for a connection serves others, and its run is no hang. One that waits for a descriptor
both ends of which this process has waits for itself.
"""

import os
import platform
import socket
import stat
import struct
from collections.abc import Iterable

_X86 = {
    "read": (0,), "poll": (7, 271), "select": (23, 270), "one": (43, 45, 47, 288), "epoll": (232, 281, 441),
}  # fmt: skip
_ARM = {"read": (63,), "poll": (73,), "select": (72,), "one": (202, 207, 212, 242), "epoll": (22, 441)}
_BY_MACHINE = {"x86_64": _X86, "aarch64": _ARM}
"""the numbers of the system calls that wait, by what their arguments are"""

MOST = 4096
"""descriptors that are looked at"""

_POLLED = struct.Struct("<ihh")


def waits_for_itself(thread: int) -> bool:
    """Whether that thread, by its number in the system, waits for descriptors, and this process has the other end of
    each. False where the system does not say. Never raises."""
    try:
        found = _waited(thread)
        return bool(found) and all(map(_Own().has_both_ends, found))
    except (OSError, ValueError, struct.error):
        return False


def _waited(thread: int) -> list[int]:
    """The descriptors that the thread waits for; [] if it waits for none, or for something else."""
    with open(f"/proc/self/task/{thread}/syscall", encoding="ascii") as file:
        words = file.read().split()
    if len(words) < 4 or words[0] == "running":
        return []
    number, arguments = int(words[0]), [int(word, 16) for word in words[1:5]]
    calls = _BY_MACHINE.get(platform.machine(), {})
    kind = next((kind for kind, numbers in calls.items() if number in numbers), "")
    if kind in ("read", "one"):
        return [arguments[0]]
    if kind == "poll":
        data = _memory(arguments[0], _POLLED.size * min(arguments[1], MOST))
        return [descriptor for descriptor, _, _ in _POLLED.iter_unpack(data) if descriptor >= 0]
    if kind == "select":
        size = (min(arguments[0], MOST) + 63) // 64 * 8
        sets = [int.from_bytes(_memory(at, size), "little") for at in arguments[1:3] if at]
        return [bit for bit in range(size * 8) if any(one >> bit & 1 for one in sets)]
    if kind == "epoll":
        with open(f"/proc/self/fdinfo/{arguments[0]}", encoding="ascii") as file:
            return [int(line.split()[1]) for line in file if line.startswith("tfd:")]
    return []


def _memory(address: int, size: int) -> bytes:
    """Of this process; read by the system, as the thread may have gone on, and the place be no more."""
    descriptor = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(descriptor, size, address)
    finally:
        os.close(descriptor)


class _Own:
    """This process's descriptors."""

    def __init__(self) -> None:
        self._descriptors = [int(name) for name in os.listdir("/proc/self/fd")]

    def has_both_ends(self, descriptor: int) -> bool:
        """Whether what comes out of it can only be put in by this process."""
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISSOCK(mode):
            return self._is_own_socket(descriptor)
        if stat.S_ISFIFO(mode):
            return descriptor != 0 and self._is_own_pipe(descriptor)
        return "eventfd" in os.readlink(f"/proc/self/fd/{descriptor}")

    def _is_own_pipe(self, descriptor: int) -> bool:
        """The end for writing is there, too. (A child may have it as well: then that is waited for as a child.)"""
        which = os.fstat(descriptor).st_ino
        return any(os.fstat(other).st_ino == which for other in self._open() if other != descriptor)

    def _is_own_socket(self, descriptor: int) -> bool:
        with socket.socket(fileno=os.dup(descriptor)) as mine:
            if mine.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                return False
            peer = mine.getpeername()
            if mine.family == socket.AF_UNIX and not peer:
                # Of a pair, the system knows who made it.
                made_by = struct.unpack(
                    "3i", mine.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
                )
                return bool(made_by[0] == os.getpid())
        return any(name == peer for name in self._names(descriptor))

    def _names(self, besides: int) -> Iterable[object]:
        for other in self._open():
            if other != besides and stat.S_ISSOCK(os.fstat(other).st_mode):
                with socket.socket(fileno=os.dup(other)) as one:
                    if not one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                        yield one.getsockname()

    def _open(self) -> Iterable[int]:
        for descriptor in self._descriptors:
            try:
                os.fstat(descriptor)
            except OSError:  # it has been closed meanwhile
                continue
            yield descriptor
