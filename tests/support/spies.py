"""A process that holds its interpreter, and whether py-spy may look at it here. Not a test."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from dinfer.rank.pyspy import program

ANYBODY = -1
LETS_ANYBODY_LOOK = f"from dinfer.rank.pyspy import let_look; let_look({ANYBODY})\n"
NO_SPY = "py-spy is not installed, or may not look at another process here"

HOLDS = """
import ctypes, sys
{setup}
def holds():
    ctypes.PyDLL(None).usleep(60_000_000)
print("begun", flush=True)
holds()
"""


@contextmanager
def holding(setup: str, *files: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is in C code and holds its interpreter, after this setup. It has the files, which its arguments
    name."""
    command = [sys.executable, "-c", HOLDS.format(setup=setup), *map(str, files)]
    with subprocess.Popen(command, pass_fds=files, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"begun\n"
        try:
            yield process
        finally:
            process.kill()


@cache
def may_spy() -> bool:
    """Found by trying, at a process that lets itself be looked at."""
    spy = program()
    if spy is None:
        return False
    with holding(LETS_ANYBODY_LOOK) as process:
        looked = subprocess.run([spy, "dump", "--pid", str(process.pid)], capture_output=True, check=False)
    return looked.returncode == 0
