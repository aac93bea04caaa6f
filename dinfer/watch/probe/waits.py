"""What a thread of this process waits for in the system: whether anybody else could wake it. On Linux, by /proc.

A thread that waits in `select` for a connection serves others, and its run is no hang. One that waits for a descriptor
both ends of which this process has waits for itself.
"""

import _socket  # as socket.socket may have been replaced, by one that changes descriptors
import os
import platform
import socket
import stat
import struct
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from functools import cached_property
from itertools import islice

_X86 = {
    "read": (0,), "poll": (7, 271), "select": (23, 270), "one": (43, 45, 47, 288), "epoll": (232, 281, 441),
}  # fmt: skip
_ARM = {"read": (63,), "poll": (73,), "select": (72,), "one": (202, 207, 212, 242), "epoll": (22, 441)}
_BY_MACHINE = {"x86_64": _X86, "aarch64": _ARM}
"""the numbers of the system calls that wait, by what their arguments are"""

_LOCKS = {"x86_64": (202, 449, 455), "aarch64": (98, 449, 455)}
"""the numbers of the system calls in which a thread waits for a lock or a condition"""

MOST = 4096
"""descriptors that are looked at"""

_POLLED = struct.Struct("<ihh")

_ASKED = struct.Struct("=IHHIIBBHIIIII")
"""a request of netlink's sock_diag for one unix socket"""
_SOCK_DIAG, _BY_FAMILY, _REQUEST, _SHOW_PEER, _PEER, _ANY = 4, 20, 1, 4, 2, 2**32 - 1


def waits_for_itself(thread: int) -> bool:
    """Whether that thread, by its number in the system, waits for descriptors, and this process has the other end of
    each. False where the system does not say. Never raises."""
    try:
        found = _waited(thread)
        return bool(found) and all(map(_Own().has_both_ends, found))
    except Exception:  # what the system says may be of any form, and this is called amid the user's program
        return False


def waits_for_lock(thread: int) -> bool | None:
    """Whether that thread waits for a lock or a condition, which another thread has to free; None where the system does
    not say. Never raises."""
    try:
        words = _call_of(thread)
        numbers = _LOCKS[platform.machine()]
        return words[0] != "running" and int(words[0]) in numbers
    except Exception:  # as above
        return None


def _call_of(thread: int) -> list[str]:
    """The system call in which the thread is: its number and arguments, or `running`."""
    with open(f"/proc/self/task/{thread}/syscall", encoding="ascii") as file:
        return file.read().split()


def _waited(thread: int) -> list[int]:
    """The descriptors that the thread waits for; [] if it waits for none, or for something else."""
    words = _call_of(thread)
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
            return [int(line.split()[1]) for line in islice(file, MOST) if line.startswith("tfd:")]
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
        self._descriptors = [int(name) for name in os.listdir("/proc/self/fd")[:MOST]]

    def has_both_ends(self, descriptor: int) -> bool:
        """Whether what comes out of it can only be put in by this process's Python code. Not that of an eventfd: what
        puts into that is mostly a library's own thread, for what has come from outside, as that of ZeroMQ is."""
        look = os.fstat(descriptor)
        if stat.S_ISSOCK(look.st_mode):
            return self._is_own_socket(descriptor)
        if stat.S_ISFIFO(look.st_mode):
            # A child may have the other end as well: then that is waited for as a child.
            others = self._pipes.get((look.st_dev, look.st_ino), set())
            return descriptor != 0 and bool(others - {_access(descriptor)})
        return False

    def _is_own_socket(self, descriptor: int) -> bool:
        with _looked_at(descriptor) as mine:
            if mine.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                return False
            if mine.family == socket.AF_UNIX:
                return _peer_of(os.fstat(descriptor).st_ino) in self._sockets
            return (mine.getpeername(), mine.getsockname()) in self._connections

    @cached_property
    def _pipes(self) -> dict[tuple[int, int], set[int]]:
        """By device and number, for what they are open here: for reading, for writing."""
        found: dict[tuple[int, int], set[int]] = {}
        for descriptor, look in self._open():
            if stat.S_ISFIFO(look.st_mode):
                found.setdefault((look.st_dev, look.st_ino), set()).add(_access(descriptor))
        return found

    @cached_property
    def _sockets(self) -> set[int]:
        return {look.st_ino for _, look in self._open() if stat.S_ISSOCK(look.st_mode)}

    @cached_property
    def _connections(self) -> set[tuple[object, object]]:
        """Of each socket that is connected, its own address and that of its peer."""
        found: set[tuple[object, object]] = set()
        for descriptor, look in self._open():
            if stat.S_ISSOCK(look.st_mode):
                try:
                    with _looked_at(descriptor) as one:
                        found.add((one.getsockname(), one.getpeername()))
                except OSError:  # it is not connected, or not open any more
                    continue
        return found

    def _open(self) -> Iterable[tuple[int, os.stat_result]]:
        for descriptor in self._descriptors:
            try:
                yield descriptor, os.fstat(descriptor)
            except OSError:  # it has been closed meanwhile
                continue


def _access(descriptor: int) -> int:
    import fcntl  # not on every system

    return fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE


@contextmanager
def _looked_at(descriptor: int) -> Iterator[_socket.socket]:
    """The user's socket. The type says that the descriptor is set as it shall be: else, where the user has called
    `socket.setdefaulttimeout`, Python would set it not to block, and the user's own with it."""
    copy = os.dup(descriptor)
    try:
        found = _socket.socket(type=socket.SOCK_STREAM | socket.SOCK_NONBLOCK, fileno=copy)
        try:
            yield found
        finally:
            found.detach()
    finally:
        os.close(copy)


def _peer_of(number: int) -> int:
    """Of a unix socket, by its number in the system, that of the one it is connected to; 0 if it is not, or if its
    other end is closed. Raises OSError where the system does not say."""
    request = _ASKED.pack(
        _ASKED.size, _BY_FAMILY, _REQUEST, 1, 0,
        socket.AF_UNIX, 0, 0, _ANY, number, _SHOW_PEER, _ANY, _ANY,
    )  # fmt: skip
    # It is answered while it is sent: there is nothing to wait for.
    kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    with closing(_socket.socket(socket.AF_NETLINK, kind, _SOCK_DIAG)) as asked:
        asked.send(request)
        answer = asked.recv(4096)
    if struct.unpack_from("=H", answer, 4)[0] != _BY_FAMILY:
        return 0
    at = 32
    while at + 8 <= len(answer):
        size, what, value = struct.unpack_from("=HHI", answer, at)
        if what == _PEER:
            return int(value)
        at += max(size + 3 & ~3, 4)
    return 0
