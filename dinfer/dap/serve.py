"""The two ways in: standard input and output, for an editor that starts `dinfer dap`; or a port of this machine."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType

from dinfer.config import ConfigError
from dinfer.dap.adapter import DebugAdapter
from dinfer.dap.wire import Wire
from dinfer.transport.interface import LOOPBACK


def serve_stdio() -> None:
    """Serve the client at standard input and output. Whatever else is written to standard output, by this process or
    one that it starts, goes to standard error: it would not be the protocol."""
    wire_out = os.dup(1)
    os.dup2(2, 1)
    with os.fdopen(wire_out, "wb") as writer, os.fdopen(os.dup(0), "rb") as reader:
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)  # ranks and their launchers must not read the client's messages
        os.close(null)
        end_on_sigterm()
        DebugAdapter(Wire(reader, writer), enters=True).serve()


def serve_port(port: int, say: Callable[[str], None]) -> None:
    """Serve clients at a port of the loopback interface, one after another, until the process is interrupted. `port` 0:
    any free one. Raises ConfigError where it is taken."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((LOOPBACK, port))
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"port {port} cannot be used: {why}. Give another, or 0 for any free one."
            ) from None
        listener.listen(1)
        found = listener.getsockname()[1]
        say(
            f'dinfer dap: listening at {LOOPBACK}:{found}; in a launch entry of type "dinfer": "debugServer": {found}'
        )
        while True:
            client, _ = listener.accept()
            with client, client.makefile("rb") as reader, client.makefile("wb") as writer:
                DebugAdapter(Wire(reader, writer)).serve()


def end_on_sigterm() -> None:
    """VS Code ends an adapter by SIGTERM, also one that is ending already: the session is closed in any case."""
    ending = threading.Event()

    def end(*_: int | FrameType | None) -> None:
        if not ending.is_set():
            ending.set()
            sys.exit(0)

    signal.signal(signal.SIGTERM, end)
