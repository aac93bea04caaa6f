"""Files of which weights are views: whether they still hold what was loaded.

The system shows a process whatever is written into a file that it has mapped: new weights copied over old ones would be
computed with in the middle of a run, and a file that has become shorter ends the process (SIGBUS). A file that is
replaced, as by a rename, stays as it is for who has mapped it.
"""

import hashlib
import os
import weakref
from collections.abc import Iterable
from pathlib import Path
from time import monotonic

from dinfer.errors import ModelError
from dinfer.model.checkpoint import sampled_spans

RECENT_S = 0.01
"""how long a look at the files counts for layers: a look gives up the GIL, for which each layer would wait anew"""


class WeightsChanged(ModelError):
    """Weights that are in use were overwritten: the checkpoint must be loaded again."""


class MappedFiles:
    """The weight files in a checkpoint's `folder`, as they are now. Descriptors stay open for as long as this lives.
    Raises ModelError for a file that cannot be opened."""

    def __init__(self, folder: Path, files: Iterable[Path]) -> None:
        self._folder = folder
        self._opened = list[int]()
        weakref.finalize(self, _close_all, self._opened)
        try:
            for file in files:
                self._opened.append(os.open(file, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            raise ModelError(f"{folder} cannot be loaded: {error}") from error
        self._known = [_written(descriptor) for descriptor in self._opened]
        self._samples = [_samples(descriptor) for descriptor in self._opened]
        self._changed = False
        self._looked = monotonic()

    def check_recent(self) -> None:
        """As `check`, unless that has looked at the files within the last RECENT_S seconds: for each layer."""
        if self._changed or monotonic() - self._looked > RECENT_S:
            self.check()

    def check(self) -> None:
        """Raises WeightsChanged once a file has been written to."""
        began = monotonic()
        if self._changed or any(
            self._known[n] != _written(descriptor) and not self._was_only_touched(n)
            for n, descriptor in enumerate(self._opened)
        ):
            self._changed = True
            raise WeightsChanged(
                f"the weight files in {self._folder} were overwritten after they were loaded, and a rank on a CPU "
                f"computes with the files themselves: session.load({str(self._folder)!r}) loads what they hold now on "
                "all ranks. (A file that is moved to the place of another leaves a loaded model as it is.)"
            )
        self._looked = began  # after the look: another thread must not rely on one that is under way

    def is_intact(self) -> bool:
        """Whether `check` raises nothing."""
        try:
            self.check()
        except WeightsChanged:
            return False
        return True

    def _was_only_touched(self, number: int) -> bool:
        """A new time of change over the same bytes, as far as samples tell."""
        descriptor = self._opened[number]
        now = _written(descriptor)
        if now[0] != self._known[number][0] or _samples(descriptor) != self._samples[number]:
            return False
        self._known[number] = now
        return True


def _written(descriptor: int) -> tuple[int, int]:
    """Size, and when it was last written to."""
    stat = os.fstat(descriptor)
    return stat.st_size, stat.st_mtime_ns


def _samples(descriptor: int) -> bytes:
    digest = hashlib.sha256()
    for begin, end in sampled_spans(0, os.fstat(descriptor).st_size):
        digest.update(os.pread(descriptor, end - begin, begin))
    return digest.digest()


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
