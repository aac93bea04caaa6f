"""Corruption: blocks whose bytes changed, and how they are reported.

A block's digests travel in its header, so `Prefill.check_digests` finds changes on the way. Changes in memory
afterwards are found by `decoding.recheck` alone.
"""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from dinfer.config import OnCorruption
from dinfer.errors import DinferError

log = logging.getLogger("dinfer")
# A session shows the note itself: without a log file, do not print the warning as well.
log.addHandler(logging.NullHandler())


@dataclass(frozen=True)
class Corruption:
    """Block (`chunk`, `layer`) of `bytes` bytes, found changed on `rank` in `tensors` ("K", "V" or "K and V").

    `peer` sent it, and its bytes changed on the way or in the memory of `peer`; None: they changed in this rank's
    memory after it was computed or received. `first`: an earlier rank that received it changed and passed it on. For a
    change in memory, `rows` rows changed, the first of them at `token` (its position in the prompt) and `head`.
    """

    rank: int
    chunk: int
    layer: int
    tensors: str
    bytes: int
    peer: int | None = None
    first: int | None = None
    rows: int = 0
    token: int | None = None
    head: int | None = None

    @property
    def what(self) -> str:
        """What happened to the block, without its name."""
        return self._text(self.tensors)

    def _text(self, subject: str) -> str:
        if self.peer is None:
            return f"{subject} changed in memory"
        changed = "changed" if " and " in self.tensors else "a changed"
        received = f"received {changed} {subject} from rank {self.peer}"
        if self.first is None:
            return f"{received}: the block changed on the way or before it was sent"
        return f"{received}: rank {self.first} was the first to receive it changed"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """The inverse of `as_dict`; ignores other keys."""
        return cls(**{item.name: values[item.name] for item in fields(cls)})

    def __str__(self) -> str:
        """For example `rank 2: K of block c1 l7 changed in memory (head 3, token 141)`, or `rank 2 received a changed K
        of block c1 l7 from rank 0: the block changed on the way or before it was sent`."""
        where = f"head {self.head}, token {self.token}"
        rows = f" ({self.rows} rows, the first: {where})" if self.rows > 1 else f" ({where})"
        found = self._text(f"{self.tensors} of block c{self.chunk} l{self.layer}")
        joined = " " if self.peer is not None else ": "
        return f"rank {self.rank}{joined}{found}{rows if self.rows else ''}"


class Corrupted(DinferError, RuntimeError):
    """A block's bytes changed, and `on_corruption` is fail or pause."""


class Alarm:
    """Reports corruption to the rank's log and to `callback`. `policy` decides whether the run goes on."""

    def __init__(self, policy: OnCorruption, callback: Callable[[Corruption], None] | None) -> None:
        self.policy = policy
        self._callback = callback

    def report(self, found: Corruption) -> None:
        log.warning("%s", found)
        if self._callback:
            self._callback(found)

    def __call__(self, found: Corruption) -> None:
        """Report; raises Corrupted if the policy is fail."""
        self.report(found)
        if self.policy == "fail":
            raise Corrupted(
                f"{found}. The run ends because on_corruption is fail. With record it would go on with these bytes. "
                "Bytes that change in memory or on the wire point to a fault of the machine, its drivers or other code "
                "in the process."
            )
