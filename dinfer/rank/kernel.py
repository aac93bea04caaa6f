"""A rank inside an ipyparallel engine, where the user's `%%px` cells run too.

A session calls these functions in the engine. What they make stays there between runs, and when the session's own
kernel is restarted.
"""

from contextlib import suppress
from typing import Any

import msgspec

from dinfer.errors import ipython
from dinfer.messages import HandedOn, JoinGroup, OpenStore, RankLink, StoreAddress
from dinfer.rank.control import Control
from dinfer.rank.debugger import FIRST_PORT, listen
from dinfer.rank.service import RankService
from dinfer.transport.gloo import Comm, Store, join_store, open_store
from dinfer.transport.nccl import open_comm

_current: "Kernel | None" = None

_debug_port = 0
"""Where a debugger may attach; 0: nowhere yet."""


class Kernel:
    """One rank's service and its connection to the session. It meets the other ranks at a store that rank 0 opens."""

    def __init__(self, link: RankLink, world_size: int) -> None:
        self.rank, self.world_size = link.rank, world_size
        self.control = control = Control(link)
        self._store: Store | None = None
        self.host = RankService(
            self.rank, control, self,
            board=control.board, memory=control.recorder_memory, on_change=_bind,
        )  # fmt: skip
        control.table = self.host.table()

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


def start(given: dict[str, Any], world_size: int) -> None:
    """Make this process a rank of a session, or hand it to another one: weights that are loaded stay.

    `given` is a RankLink as builtins: what an engine is called with must survive JSON.
    """
    global _current
    link = msgspec.convert(given, RankLink)
    before, _current = _current, None
    kernel = Kernel(link, world_size)
    if before:
        kernel.host.inherit(before.host)
        with suppress(OSError):  # its watcher may have ended already
            before.control.report(HandedOn())
        before.control.close()
    _current = kernel
    _bind(kernel.host)


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
