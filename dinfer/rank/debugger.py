"""Lets VS Code, or another client of debugpy, attach to a rank, if the environment or the session asks for it.

DINFER_DEBUGPY=1: rank n listens on 127.0.0.1 at port 5678 + n (another number: at that port + n).
DINFER_DEBUGPY_WAIT=1: it begins its work only once a client has attached.
"""

import os
import sys
from contextlib import AbstractContextManager, nullcontext

from dinfer.errors import DinferError

FIRST_PORT = 5678


def undebugged() -> AbstractContextManager[object]:
    """A context in which children are not debugged with their parent: a watcher must run while its rank is stopped.

    debugpy rewrites the command of every Python that a debugged process starts; this is its own exception from that.
    """
    patch = sys.modules.get("_pydev_bundle.pydev_monkey")
    context: AbstractContextManager[object] = getattr(patch, "skip_subprocess_arg_patch", nullcontext)()
    return context


class DebuggerError(DinferError, RuntimeError):
    """The debugger cannot listen; the message says where."""


def listen_for_debugger(rank: int) -> None:
    """Listen, and wait, as the environment says. Raises DebuggerError."""
    asked = os.environ.get("DINFER_DEBUGPY", "")
    if asked in ("", "0"):
        return
    if not asked.isdigit():
        raise DebuggerError(
            f"DINFER_DEBUGPY is {asked!r}; it must be 1, or the port at which rank 0 listens."
        )
    port = (FIRST_PORT if asked == "1" else int(asked)) + rank
    try:
        listen(port)
    except DebuggerError as error:
        raise DebuggerError(
            f"{error} Set DINFER_DEBUGPY to the first of as many free ports as there are ranks."
        ) from None
    if os.environ.get("DINFER_DEBUGPY_WAIT") == "1":
        import debugpy

        debugpy.wait_for_client()


def listen(port: int) -> None:
    """Let a client attach at 127.0.0.1 and this port. Raises DebuggerError."""
    try:
        import debugpy
    except ImportError:
        raise DebuggerError("debugpy is not installed: pip install debugpy.") from None
    debugpy.configure(subProcess=False)  # the watcher must run while its rank is at a breakpoint
    try:
        debugpy.listen(("127.0.0.1", port))
    except (RuntimeError, OSError) as error:
        raise DebuggerError(f"the debugger cannot listen at port {port}: {error}.") from None
