"""The command line: it parses arguments, calls the rest of dinfer, and turns errors into a message and an exit status.

May import everything else. Start at `root`, the app; each other module defines commands.
"""

import io
import sys

from dinfer.cli import bench, plans, run, tools
from dinfer.cli.root import app

__all__ = ["app", "bench", "main", "plans", "run", "tools"]


def main() -> None:
    """The `dinfer` script. For an unknown flag or command, the message suggests the nearest known one."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A character that the terminal's encoding lacks (GBK, ASCII) must not end a run.
            stream.reconfigure(errors="backslashreplace")
    app()
