"""Whether py-spy is installed and may look at a process here. Not a test."""

from __future__ import annotations

import subprocess
import sys
from functools import cache

from dinfer.rank.pyspy import program

ANYBODY = -1
LETS_ANYBODY_LOOK = f"from dinfer.rank.pyspy import let_look; let_look({ANYBODY})\n"
NO_SPY = "py-spy is not installed, or may not look at another process here"


@cache
def may_spy() -> bool:
    """Found by trying, at a process that lets itself be looked at."""
    spy = program()
    if spy is None:
        return False
    script = f"{LETS_ANYBODY_LOOK}import time\nprint('up', flush=True)\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        looked = subprocess.run([spy, "dump", "--pid", str(process.pid)], capture_output=True, check=False)
        process.kill()
    return looked.returncode == 0
