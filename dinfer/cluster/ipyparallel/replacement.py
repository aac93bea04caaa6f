"""Replaces an engine that has ended: `python -m dinfer.cluster.ipyparallel.replacement LOG CONTROLLER ARGUMENT…`.

It belongs to its cluster and not to the process that starts it: it is nobody's child, and ends when the controller
ends.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

from dinfer.cluster.ipyparallel.engine import be_engine
from dinfer.cluster.ipyparallel.identity import Identity

LOOK_S = 1.0


def main() -> None:
    """Fork, print the new process's id and return; that process becomes the engine."""
    log, controller, *arguments = sys.argv[1:]
    child = os.fork()
    if child:
        print(child)
        return
    os.setsid()
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:  # so that the pipe to the starter ends
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    watched = Identity(**json.loads(controller))
    threading.Thread(target=_end_with, args=(watched,), daemon=True).start()
    be_engine(arguments)


def _end_with(controller: Identity) -> None:
    while controller.state() == "alive":
        time.sleep(LOOK_S)
    os._exit(0)


if __name__ == "__main__":
    main()
