"""Ordering: which of a GPU's kernels a send waits for. On a CPU an op that has returned is done, and none of this is.

Lanes launch everything on the device's default stream, so whoever reads there comes after all that was launched before.
A send copies to the host on a stream of its own, behind the kernels that made its value and nothing launched since:
the hidden state that the next rank waits for must not wait for this rank's next chunk. A block is received on such a
stream too: so its lane can look at what has come without waiting for this rank's layers.
"""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from dinfer.plan.ops import Value


class Ordering:
    """What has been launched for each value of one prompt, on one device; used by all of a rank's lanes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._made: dict[Value, torch.cuda.Event] = {}
        self._of_thread = threading.local()
        self._since = self._mark() if self._device else None
        """what was launched before it by others than ops comes before whatever ops write"""

    def launched(self, values: Iterable[Value]) -> None:
        """All kernels that make these values are on the current stream."""
        if self._device is not None:
            self._made.update(dict.fromkeys(values, self._mark()))

    @contextmanager
    def reading(self, value: Value) -> Iterator[None]:
        """Inside, the current stream is one of this thread's own, behind what makes the value; where that is not
        known, behind all that has been launched."""
        if self._device is None:
            yield
            return
        stream = self._stream()
        stream.wait_event(self._made.get(value) or self._mark())
        with torch.cuda.stream(stream):
            yield

    @contextmanager
    def receiving(self, values: Iterable[Value]) -> Iterator[None]:
        """Inside, the current stream is one of this thread's own, which writes these values, parts of the cache; all
        that is launched on the default stream afterwards comes behind it."""
        if self._device is None:
            yield
            return
        stream = self._stream()
        if self._since:
            stream.wait_event(self._since)
        with torch.cuda.stream(stream):
            yield
            self.launched(values)
        torch.cuda.default_stream(self._device).wait_stream(stream)

    def forget(self) -> None:
        """Values may have been made anew, on the default stream, by others than ops."""
        self._made.clear()
        self._since = self._mark() if self._device else None

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _stream(self) -> torch.cuda.Stream:
        if not hasattr(self._of_thread, "stream"):
            self._of_thread.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream: torch.cuda.Stream = self._of_thread.stream
        return stream
