"""Corruption: a block whose bytes are not those that were computed: how it is told, and what happens then.

Who finds it compares digests; here is what they say of it.
"""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from dinfer.config import OnCorruption
from dinfer.errors import DinferError

log = logging.getLogger("dinfer")

log.addHandler(
    logging.NullHandler()
)  # in a session the note says it: without a log it is not printed as well


@dataclass(frozen=True)
class Corruption:
    """Block `chunk`, `layer` of `bytes` bytes, found on `rank` to be changed in `tensors` ("K", "V" or "K and V").

    When it came from `peer` (its digests tell of the computed bytes, so that they may have changed in the memory of
    `peer` too), or, with None, in memory since it was computed or came. `first`: the rank that saw it
    changed before this one, which passed it on. In memory, `rows` rows have changed, the first of them that of `token`
    (of the prompt) and `head`.
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
        """What has happened to it, without its name."""
        if self.peer is None:
            return f"{self.tensors} changed in memory"
        if self.first is None:
            return f"{self.tensors} came changed from rank {self.peer}, on the way or before it was sent"
        return (
            f"{self.tensors} came changed from rank {self.peer}: rank {self.first} was the first to get it so"
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """From a message that may hold more."""
        return cls(**{item.name: values[item.name] for item in fields(cls)})

    def __str__(self) -> str:
        """For example `rank 2: K of block c1 l7 changed in memory (head 3, token 141)`."""
        rest = self.what.removeprefix(self.tensors)
        where = f"head {self.head}, token {self.token}"
        rows = f" ({self.rows} rows, the first: {where})" if self.rows > 1 else f" ({where})"
        named = f"rank {self.rank}: {self.tensors} of block c{self.chunk} l{self.layer}"
        return f"{named}{rest}{rows if self.rows else ''}"


class Corrupted(DinferError, RuntimeError):
    """A block's bytes have changed, and the run was to fail or to pause then."""


Tell = Callable[[Corruption], None]


class Alarm:
    """Says what was found in the rank's log, and to `tell`; what follows is as `policy` says."""

    def __init__(self, policy: OnCorruption = "record", tell: Tell | None = None) -> None:
        self.policy = policy
        self._tell = tell

    def tell(self, found: Corruption) -> None:
        log.warning("%s", found)
        if self._tell:
            self._tell(found)

    def __call__(self, found: Corruption) -> None:
        """Tell; raises Corrupted where the run is to fail."""
        self.tell(found)
        if self.policy == "fail":
            raise Corrupted(f"{found}.{ADVICE}")


ADVICE = (
    " The run ends since on_corruption is fail; with record it would go on with these bytes. Bytes that change in "
    "memory or on the wire are a fault of the machine, its drivers or of other code in the process."
)
