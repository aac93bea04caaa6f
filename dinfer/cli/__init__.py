"""The command line. It parses, calls, and turns errors into one message and an exit status."""

import io
import sys

from dinfer.cli import bench, plans, run, tools
from dinfer.cli.root import app

__all__ = ["app", "bench", "main", "plans", "run", "tools"]


def main() -> None:
    """The `dinfer` script. A flag that does not exist is answered with the nearest one that does."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(
            stream, io.TextIOWrapper
        ):  # a character that a GBK or ASCII terminal lacks must not end a run
            stream.reconfigure(errors="backslashreplace")
    app()
