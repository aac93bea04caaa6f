"""The command line: it parses arguments, calls the rest of dinfer, and turns errors into a message and an exit status.

May import everything else. Start at `root`, the app; each other module defines commands.
"""

import errno
import io
import os
import sys
from typing import NoReturn, TextIO

from dinfer.cli import bench, dap, desk, plans, profile, run, tools, watch
from dinfer.cli.root import BAD_INPUT, FAILED, OUTPUT_CLOSED, app
from dinfer.errors import NotPossible
from dinfer.files import check_working_folder

__all__ = ["app", "bench", "dap", "desk", "main", "plans", "profile", "run", "tools", "watch"]

_FIRST_TO_LAST = (
    "run",
    "watch",
    "explain",
    "desk",
    "report",
    "plan",
    "verify",
    "doctor",
    "bench",
    "lab",
    "clean",
    "vscode",
    "dap",
)
"""as `dinfer --help` lists the commands; groups of commands follow"""

app.registered_commands.sort(
    key=lambda one: _FIRST_TO_LAST.index(one.name or getattr(one.callback, "__name__", ""))
)


def main() -> None:
    """The `dinfer` script. For an unknown flag or command, the message suggests the nearest known one."""
    _open_closed()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A character that the terminal's encoding lacks (GBK, ASCII) must not end a run.
            stream.reconfigure(errors="backslashreplace")
    try:
        check_working_folder()
    except NotPossible as error:
        print(f"dinfer: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    output = sys.stdout
    try:
        app()
    except SystemExit:
        if sys.stdout is sys.stderr:
            raise  # `dinfer run` has said that its output was closed
        if sys.stdout is not output:  # typer has met a closed pipe, and put a silent stream there
            _end_quietly(output)
        _flush(output)
        raise
    except OSError as error:
        if error.filename is not None or error.errno not in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EIO,
            errno.EFBIG,
        ):
            raise
        _give_up(output, error)


def _open_closed() -> None:
    """Standard streams that were closed (`>&-`) become the null device: the next file that is opened would otherwise be
    what others take for standard output."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def _flush(output: TextIO) -> None:
    """Write what is left. Ends the process where it cannot be written, which Python would tell by a traceback."""
    try:
        output.flush()
    except BrokenPipeError:
        _end_quietly(output)
    except OSError as error:
        _give_up(output, error)


def _end_quietly(output: TextIO) -> NoReturn:
    """As `dinfer plan … | head` should: whoever closed the pipe has read enough."""
    _discard(output)
    sys.exit(OUTPUT_CLOSED)


def _give_up(output: TextIO, error: OSError) -> NoReturn:
    print(f"dinfer: standard output cannot be written: {error.strerror}.", file=sys.stderr)
    _discard(output)
    sys.exit(FAILED)


def _discard(output: TextIO) -> None:
    """What is left in the stream's buffer goes nowhere when Python ends."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, output.fileno())
    os.close(null)
