"""Whether a CUDA graph is being captured. Meanwhile no thread may ask a device anything: that would spoil the graph."""

import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

from .imports import ImportWatch


class Captures:
    """The captures of graphs in this process."""

    def __init__(self) -> None:
        self.is_capturing = False
        self._asking = threading.Lock()
        self._restore: list[Callable[[], None]] = []

    def watch(self, imports: ImportWatch) -> None:
        """See when a graph is captured from now on; until `unwatch`."""
        imports.add("torch.cuda.graphs", self._found)

    def unwatch(self) -> None:
        """As it was before."""
        for restore in self._restore:
            restore()
        self._restore.clear()
        self.is_capturing = False

    def clear(self) -> None:
        """In a forked child: nobody captures, or asks."""
        self.is_capturing, self._asking = False, threading.Lock()

    def unless_capturing(self, ask: Callable[[], object], wait_s: float = 0.0) -> bool:
        """Ask a device something, without waiting for it, unless a graph is captured, which then begins after that.
        Returns whether it was asked: not where other threads have asked for longer than `wait_s`, either."""
        if not self._asking.acquire(timeout=wait_s):
            return False
        try:
            if not self.is_capturing:
                ask()
            return not self.is_capturing
        finally:
            self._asking.release()

    def _found(self, module: ModuleType) -> None:
        graph = getattr(module, "CUDAGraph", None)
        if graph is not None and "capture_begin" in vars(graph):
            for name, make in (("capture_begin", self.beginning), ("capture_end", self.ending)):
                self._replace(graph, name, make(getattr(graph, name)))

    def _replace(self, kind: Any, name: str, by: Any) -> None:
        before = vars(kind)[name]
        setattr(kind, name, by)
        self._restore.append(lambda: setattr(kind, name, before))

    def beginning(self, original: Any) -> Any:
        """What begins to capture a graph: until it has ended, nothing is asked."""

        def capture_begin(*args: Any, **options: Any) -> Any:
            self.is_capturing = True
            if self._asking.acquire(timeout=1):  # no question is under way any more
                self._asking.release()
            try:
                return original(*args, **options)
            except BaseException:
                self.is_capturing = False
                raise

        return capture_begin

    def ending(self, original: Any) -> Any:
        """What ends the capture of a graph."""

        def capture_end(*args: Any, **options: Any) -> Any:
            try:
                return original(*args, **options)
            finally:
                self.is_capturing = False

        return capture_end


captures = Captures()
"""of this process"""
