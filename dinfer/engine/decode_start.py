"""The start of decode: what it waits for where it begins before prefill has ended.

The first new token needs the final hidden state alone; the second needs, layer by layer, that layer's blocks of all
chunks. So while the blocks of later layers are still on their way, earlier layers compute.
"""

from collections.abc import Callable

from dinfer.engine.lanes import LaneExecutor
from dinfer.plan.ops import FINAL, Value
from dinfer.transport.deadline import StillWaiting


class DecodeStart:
    """The values of one prompt as they come to this rank. `at_end` is called once all have come, by `end`. Each method
    waits, and raises OpFailed if an op fails, and StillWaiting if no op ends for `patience` seconds."""

    def __init__(self, executor: LaneExecutor, patience: float | None, at_end: Callable[[], None]) -> None:
        self._executor, self._patience, self._at_end = executor, patience, at_end
        self._has_ended = False

    def final(self) -> bool:
        """Wait for the final hidden state; False if the plan ends without it on this rank."""
        self._wait(lambda: self._executor.holds(FINAL) or self._executor.is_done())
        return self._executor.holds(FINAL)

    def layer(self, layer: int) -> None:
        """Wait for a layer's blocks of all chunks."""
        chunks, chunk = len(self._executor.plan.shape.chunks), 0

        def have_come() -> bool:
            nonlocal chunk
            while chunk < chunks and self._executor.holds(Value("kv", chunk, layer)):
                chunk += 1
            return chunk == chunks

        self._wait(have_come)

    def end(self) -> None:
        """Wait until every op of this rank has ended, also those that send its blocks to others."""
        if not self._has_ended:
            self._wait(self._executor.is_done)
            self._has_ended = True
            self._at_end()

    def _wait(self, until: Callable[[], bool]) -> None:
        before = None
        while not self._executor.wait(until, self._patience):
            if before == (before := self._executor.stand()):
                raise StillWaiting(
                    f"rank {self._executor.rank} stands at {before}; there was no progress for {self._patience:g} s. "
                    "All ranks must make this call."
                )
