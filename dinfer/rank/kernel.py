"""A rank inside an ipyparallel engine, where the user's `%%px` cells run too.

A session calls these functions in the engine. What they make stays there between runs, and when the session's own
kernel is restarted: the next session finds weights, group and prompt as they are.
"""

import time
from contextlib import suppress
from typing import Any

import msgspec

from dinfer.errors import DinferError, ipython
from dinfer.messages import HandedOn, Holder, JoinGroup, OpenStore, RankLink, StoreAddress
from dinfer.rank.control import Control
from dinfer.rank.debugger import FIRST_PORT, listen
from dinfer.rank.service import RankService
from dinfer.transport.connect import open_comm
from dinfer.transport.gloo import Comm, Store, join_store, open_store
from dinfer.watch.probe.start import start as begin_probe

_current: "Kernel | None" = None

_debug_port = 0
"""Where a debugger may attach; 0: nowhere yet."""


CONNECT_S = 60.0
"""how long a session that holds a rank may take to connect"""


class RankHeld(DinferError, RuntimeError):
    """The session of another process holds this rank."""


class Kernel:
    """One rank's service and its connection to the session. It meets the other ranks at a store that rank 0 opens."""

    def __init__(self, link: RankLink, world_size: int) -> None:
        self.rank, self.world_size = link.rank, world_size
        self.holder, self._held_since = link.holder, time.monotonic()
        self.control = control = Control(link)
        self._store: Store | None = None
        self.host = RankService(
            self.rank, control, self,
            board=control.board, memory=control.recorder_memory, on_change=_bind,
        )  # fmt: skip
        control.table = self.host.table()

    def is_held(self) -> bool:
        """Whether a session is there, or about to come."""
        if self.control.watcher.poll() is not None:
            return False
        session = self.control.board.session
        return session == "there" or (
            session == "awaited" and time.monotonic() - self._held_since < CONNECT_S
        )

    def go_on(self, link: RankLink) -> None:
        """Belong to another session from now on, with all that is here."""
        before = self.control
        _end(before, link)
        self.holder, self._held_since = link.holder, time.monotonic()
        before.board.set_session("awaited")  # at once: the new watcher takes a moment to say so
        self.control = Control(link, before.memory)
        self.host.go_on(self.control)
        self.control.table = self.host.table()

    def open(self, command: OpenStore) -> StoreAddress:
        self._store, port = open_store(command.address, command.port)
        return StoreAddress(command.address, port)

    def join(self, command: JoinGroup) -> Comm:
        timeout = command.timeout
        store = self._store if self.rank == 0 else join_store(command.address, command.port, timeout)
        assert store
        return open_comm(command.backend, self.rank, self.world_size, store, timeout)


class _NoEngine:
    """What a `%%px` cell finds as `engine` before there is a run, or once it is over."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"engine has no {name!r} while there is no run: session.prefill(prompt, paused=True) begins one"
        )

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return "no engine while there is no run: session.prefill(…, paused=True) begins one"


def holder() -> dict[str, Any] | None:
    """The Holder, as builtins, of the session that holds this rank; None where none does."""
    held = _current is not None and _current.is_held()
    return msgspec.to_builtins(_current.holder) if _current and held else None


def start(given: dict[str, Any], world_size: int, take: bool = False) -> None:
    """Make this process a rank of a session, or hand it to another one: weights stay, and in a session of as many ranks
    the run as well. Raises RankHeld where another process's session holds it, unless `take`.

    `given` is a RankLink as builtins: what an engine is called with must survive JSON.
    """
    global _current
    link = msgspec.convert(given, RankLink)
    before = _current
    if before and not take and before.is_held() and not _same(before.holder, link.holder):
        raise RankHeld(f"{before.holder} holds this rank")
    if before and (before.rank, before.world_size) == (link.rank, world_size):
        before.go_on(link)
        return
    _current = None
    kernel = Kernel(link, world_size)
    if before:
        kernel.host.inherit(before.host)
        _end(before.control, link)
        before.control.memory.close()
    _current = kernel
    _bind(kernel.host)


def _same(one: Holder | None, other: Holder | None) -> bool:
    return one is not None and other is not None and one.key == other.key


def _end(control: Control, link: RankLink) -> None:
    """Tell a session that another one has its rank now, and end the line to it."""
    with suppress(OSError):  # its watcher may have ended already
        control.report(HandedOn(str(link.holder)))
    control.close()


def listen_for_debugger(port: int = 0) -> int:
    """Let a client of debugpy attach to this rank. Returns the port; a later call returns the same. Raises
    DebuggerError."""
    global _debug_port
    assert _current
    if not _debug_port:
        port = port or FIRST_PORT + _current.rank
        listen(port)
        _debug_port = port
    return _debug_port


def watch(folder: str, compare: bool = False) -> None:
    """Record from now on what this process calls of torch.distributed, into that folder; with `compare` also what a
    comparison with a reference needs."""
    probe = begin_probe(folder, compares=compare)
    if shell := ipython():
        probe.follow_cells(shell)


def _bind(host: RankService) -> None:
    """Set the names that `%%px` cells find."""
    shell = ipython()
    if shell is not None and _current is not None:
        shell.user_ns.update(
            rank=host.rank,
            world_size=_current.world_size,
            engine=host.engine or _NoEngine(),
            model=host.decoder.model if host.decoder else None,
        )
