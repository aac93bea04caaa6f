"""An engine that replaces one that has ended: `python -m dinfer.cluster.ipyparallel.engine LOG CONTROLLER ARGUMENT…`.

It belongs to its cluster and not to the process that starts it: it is nobody's child, and ends when the controller
ends.
"""

import importlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from dinfer.cluster.ipyparallel.identity import Identity

LOOK_S = 1.0

RANK = "dinfer.rank.kernel"
"""what an engine imports to become a rank, which takes most of the time of a restart"""


def main() -> None:
    """Fork, print the new process's id and return; that process becomes the engine."""
    log, controller, *arguments = sys.argv[1:]
    child = os.fork()
    if child:
        print(child)
        return
    os.setsid()
    _write_to(Path(log))
    watch = threading.Thread(target=_end_with, args=(Identity(**json.loads(controller)),), daemon=True)
    watch.start()
    _be_engine(arguments)


def _write_to(log: Path) -> None:
    """Redirect output to the log, so that the pipe to the starter ends."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _end_with(controller: Identity) -> None:
    while controller.state() == "alive":
        time.sleep(LOOK_S)
    os._exit(0)


def _be_engine(arguments: list[str]) -> None:
    from ipyparallel.engine.app import IPEngine

    class ReplacementEngine(IPEngine):  # type: ignore[misc]  # it has no types
        """Imports what a rank needs while the hub waits for the first heartbeat, up to three seconds."""

        def start_heartbeat(self, *given: Any, **named: Any) -> None:
            super().start_heartbeat(*given, **named)
            self.loop.add_callback(importlib.import_module, RANK)

    sys.argv = ["ipengine", *arguments]
    ReplacementEngine.launch_instance()


if __name__ == "__main__":
    main()
