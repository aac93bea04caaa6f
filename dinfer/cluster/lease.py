"""Lent: a session's ranks as one run has them. Once that run is over it asks them nothing more, since they hold another
run's prompt by then, and it keeps what it saw of them last."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from dinfer.cluster.ranks import Pending, RankRefused, Ranks
from dinfer.messages import Answer, Command, Note

A = TypeVar("A", bound=Answer)


class RunOver(RankRefused):
    """A run that is over wants something of ranks that are another's now."""


class RankLease(Ranks):
    """`lender`: the session's. What they say is taken in there."""

    def __init__(self, lender: Ranks) -> None:
        self._lender = lender
        self.ranks, self.changed = lender.ranks, lender.changed
        self._why = ""
        self._exits: list[int | None] = []

    def give_back(self, why: str) -> None:
        """The run is over: `why` is what it is told from now on."""
        if self._why:
            return
        exits = self._lender.exits()
        with self.changed:
            self._exits = exits
            self.ranks = [replace(state) for state in self.ranks]
            self._why = why

    def send(self, rank: int, command: Command[Any]) -> None:
        self._check_lent()
        self._lender.send(rank, command)

    def begin(self, requests: Mapping[int, Command[A]]) -> Pending[A]:
        self._check_lent()
        return self._lender.begin(requests)

    def finish(
        self, pending: Pending[A], timeout: float, check: Callable[[], None] = lambda: None
    ) -> dict[int, A]:
        """As of any ranks. Raises RunOver, too, where the run has come to its end meanwhile: whose answer it then is
        cannot be told."""

        def meanwhile() -> None:
            self._check_lent()
            check()

        try:
            answers = self._lender.finish(pending, timeout, meanwhile)
        except RankRefused:
            self._check_lent()
            raise
        self._check_lent()
        return answers

    def collect(self, pending: Pending[A]) -> dict[int, A]:
        return self._lender.collect(pending)

    def forget(self, pending: Pending[Any]) -> None:
        self._lender.forget(pending)

    def new_texts(self) -> list[str]:
        return [] if self._why else self._lender.new_texts()

    def new_notes(self) -> list[tuple[int, Note]]:
        return [] if self._why else self._lender.new_notes()

    def exits(self) -> list[int | None]:
        return self._exits if self._why else self._lender.exits()

    def silent(self) -> list[int]:
        return [] if self._why else self._lender.silent()

    def _check_lent(self) -> None:
        if self._why:
            raise RunOver(over_text(self._why))


def over_text(why: str) -> str:
    """What is said of a run that is over to who wants to know what its ranks hold."""
    return f"this run is over, and its ranks hold its KV no more: {why}"
