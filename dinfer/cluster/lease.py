"""A session's ranks on loan to one run. When the run is over the ranks hold another run's prompt, so it must not ask
them anything more; the lease then keeps what was last seen of them."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from dinfer.cluster.ranks import Pending, RankRefused, Ranks
from dinfer.messages import Answer, Command, Note, TextPiece

A = TypeVar("A", bound=Answer)


class RunOver(RankRefused):
    """A run that is over cannot ask the ranks, which another run uses now."""


class RankLease:
    """The `AskableRanks` of a run: its calls go to the `lender`, the session's ranks, until it is given back. After
    that, asking raises RunOver, nothing new is heard, and `ranks` and `exits` stay as they were."""

    def __init__(self, lender: Ranks) -> None:
        self._lender = lender
        self.ranks, self.changed = lender.ranks, lender.changed
        self._why = ""
        self._exits: list[int | None] = []

    def give_back(self, why: str) -> None:
        """The run is over; `why` is the reason that later calls raise."""
        if self._why:
            return
        exits = self._lender.exits()
        with self.changed:
            self._exits = exits
            self.ranks = [replace(state) for state in self.ranks]
            self._why = why

    def ask(
        self, requests: Mapping[int, Command[A]], timeout: float, check: Callable[[], None] = lambda: None
    ) -> dict[int, A]:
        """As `Ranks.ask`. Raises RunOver, too."""
        self._check_lent()
        begun = self._lender.begin(requests)
        try:
            return self.finish(begun, timeout, check)
        finally:
            self.forget(begun)

    def begin(self, requests: Mapping[int, Command[A]]) -> Pending[A]:
        self._check_lent()
        return self._lender.begin(requests)

    def finish(
        self, pending: Pending[A], timeout: float, check: Callable[[], None] = lambda: None
    ) -> dict[int, A]:
        """As `Ranks.finish`. Raises RunOver, too, if the run has ended meanwhile: the answers may then be about the
        next run."""

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

    def new_texts(self) -> list[TextPiece]:
        return [] if self._why else self._lender.new_texts()

    def new_notes(self) -> list[tuple[int, Note]]:
        return [] if self._why else self._lender.new_notes()

    def exits(self) -> list[int | None]:
        """As `Ranks.exits`; those at the end of the run once it is over."""
        return self._exits if self._why else self._lender.exits()

    def silent(self) -> list[int]:
        return [] if self._why else self._lender.silent()

    def _check_lent(self) -> None:
        if self._why:
            raise RunOver(over_text(self._why))


def over_text(why: str) -> str:
    """The message of RunOver."""
    return f"this run is over, and its ranks hold its KV no more: {why}"
