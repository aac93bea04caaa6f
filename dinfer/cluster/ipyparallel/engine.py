"""An engine of a cluster that dinfer starts: `python -m dinfer.cluster.ipyparallel.engine ARGUMENT…`, with ipengine's
arguments."""

import importlib
import sys
from typing import Any


def be_engine(arguments: list[str]) -> None:
    """This process becomes an engine, with ipengine's arguments."""
    from ipyparallel.engine.app import IPEngine

    class EarlyEngine(IPEngine):  # type: ignore[misc]  # it has no types
        """Imports what a rank needs, which takes most of the time of a start, while the hub waits for the first
        heartbeat, up to three seconds."""

        def start_heartbeat(self, *given: Any, **named: Any) -> None:
            super().start_heartbeat(*given, **named)
            self.loop.add_callback(importlib.import_module, "dinfer.rank.kernel")

    sys.argv = ["ipengine", *arguments]
    EarlyEngine.launch_instance()


if __name__ == "__main__":
    be_engine(sys.argv[1:])
