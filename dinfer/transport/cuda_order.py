"""Ordering: which of a GPU's kernels a send or recv waits for. On a CPU it does nothing.

Lanes launch kernels on the device's default stream, where each waits for all before it. A send copies to the host on a
stream of its own, which waits only for the kernels that made its value: the hidden state that the next rank needs must
not wait for this rank's next chunk. A recv writes a block on such a stream too, so that its lane can check the block
without waiting for this rank's layers.
"""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from dinfer.plan.ops import Value


class Ordering:
    """The kernels launched for each value of one prompt on one device; shared by a rank's lanes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._of_thread = threading.local()
        self.forget()

    def forget(self) -> None:
        """Values may have been changed on the default stream by something other than an op."""
        self._made: dict[Value, torch.cuda.Event] = {}
        self._since = self._mark() if self._device else None
        """ops write after what was launched before this event"""

    def launched(self, values: Iterable[Value]) -> None:
        """The kernels that make these values have been launched on the current stream."""
        if self._device:
            self._made.update(dict.fromkeys(values, self._mark()))

    @contextmanager
    def reading(self, value: Value) -> Iterator[None]:
        """Inside, the current stream is this thread's own and waits for the kernels that make the value; if they are
        unknown, for all launched so far."""
        if not self._device:
            yield
            return
        stream = self._stream()
        stream.wait_event(self._made.get(value) or self._mark())
        with torch.cuda.stream(stream):
            yield

    @contextmanager
    def receiving(self, values: Iterable[Value]) -> Iterator[None]:
        """Inside, the current stream is this thread's own, on which to write these values to the cache; the default
        stream then waits for it."""
        if not self._device:
            yield
            return
        stream = self._stream()
        assert self._since
        stream.wait_event(self._since)
        with torch.cuda.stream(stream):
            yield
            self.launched(values)
        torch.cuda.default_stream(self._device).wait_stream(stream)

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _stream(self) -> torch.cuda.Stream:
        if not hasattr(self._of_thread, "stream"):
            self._of_thread.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream: torch.cuda.Stream = self._of_thread.stream
        return stream
