"""Spied: py-spy's looks at ranks, begun and collected without waiting: what it sees is added to what is known."""

from collections.abc import Iterable, Mapping

from dinfer.engine.hosting.commands import Message
from dinfer.session.hangs.stacks import Stacks, as_spied
from dinfer.session.states import States


class Spied:
    """Of the ranks of one session that are processes: each is looked at once, and again when it has moved since."""

    def __init__(self, ranks: States) -> None:
        self._ranks = ranks
        self._begun: dict[int, int] = {}
        self._seen: dict[int, list[Message]] = {}

    @property
    def ranks(self) -> frozenset[int]:
        """Of which something has been seen."""
        return frozenset(rank for rank, threads in self._seen.items() if threads)

    def begin(self, which: Iterable[int]) -> None:
        """Have these looked at that are not yet."""
        states = self._ranks.ranks
        new = [rank for rank in which if rank not in {*self._begun, *self._seen} and states[rank].process]
        if new:  # a run that is over may ask nothing
            self._begun |= self._ranks.begin({rank: {"do": "spy"} for rank in new})

    def looks_at(self, which: Iterable[int]) -> set[int]:
        """Those of these that are being looked at, and so may have been stopped for it."""
        return {rank for rank in which if rank in self._begun}

    def collect(self) -> bool:
        """Whether something new has been seen."""
        come = self._ranks.collect(self._begun)
        new = {rank: message.get("threads", []) for rank, message in come.items()}
        self._seen |= new
        return any(new.values())

    def added_to(self, stacks: Mapping[int, Stacks]) -> dict[int, Stacks]:
        """What is known by rank, and what was seen; what is not so any more is forgotten."""
        found = dict(stacks)
        for rank, threads in list(self._seen.items()):
            if not threads:  # there is no py-spy, or it may not look
                continue
            if (more := as_spied(rank, threads, stacks.get(rank, Stacks()))) is not None:
                found[rank] = more
            else:
                del self._seen[rank]
        return found

    def forget(self) -> None:
        self._ranks.forget(self._begun)
        self._begun, self._seen = {}, {}
