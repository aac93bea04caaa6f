"""Recorded ops of other people's code, made by hand: each rank's ops in the order of issue, a second apart."""

from typing import Any

from dinfer.trace.events import CallRecord, Event, Group

WORLD = "default"


class MadeOps:
    """`ops.send(0, 1)` is a send of rank 0 to rank 1 that has ended; `open=True`: it has not. Other words are those of
    CallRecord and Event; `group` is by default the whole world."""

    def __init__(self, world_size: int, backend: str = "gloo") -> None:
        self.backend = backend
        self.groups = {WORLD: Group(tuple(range(world_size)), backend)}
        self.events: list[Event] = []
        self._counts = [0] * world_size

    def group(self, name: str, *ranks: int, backend: str = "") -> None:
        self.groups[name] = Group(ranks, backend or self.backend)

    def send(self, rank: int, peer: int, **given: Any) -> None:
        self.add(rank, "send", peer=peer, **given)

    def recv(self, rank: int, peer: int | None, **given: Any) -> None:
        self.add(rank, "recv", peer=peer, **given)

    def message(self, source: int, target: int, **given: Any) -> None:
        """A send and its recv, both ended."""
        self.send(source, target, **given)
        self.recv(target, source, **given)

    def all(self, kind: str, *ranks: int, **given: Any) -> None:
        """The same collective on these ranks."""
        for rank in ranks:
            self.add(rank, kind, **given)

    def add(self, rank: int, kind: str, *, open: bool = False, at: float | None = None, **given: Any) -> None:
        number = self._counts[rank]
        self._counts[rank] += 1
        began = int(1e9 * (1 + number if at is None else at))
        waited = int(1e9 * given.pop("waited_at", began / 1e9))
        ended = 0 if open else waited + 1_000_000
        group = given.pop("group", WORLD)
        shape = given.pop("shape", (4,))
        call = {
            name: given.pop(name)
            for name in ("tag", "dtype", "is_async", "is_waited", "function", "number")
            if name in given
        }
        size = 4
        for length in shape:
            size *= length
        made = CallRecord(
            group,
            self.groups[group].backend if group in self.groups else self.backend,
            shape=shape,
            file=f"/code/rank{rank}.py",
            line=number + 1,
            **{"dtype": "float32", **call},
        )
        fields = {"bytes": size, **given}
        self.events.append(
            Event(rank, "MainThread", kind, began, waited, ended, ended, index=number, call=made, **fields)
        )
