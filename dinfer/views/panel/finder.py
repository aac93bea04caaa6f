"""Finder: answers a panel's search box, on a thread of its own."""

from collections.abc import Callable
from typing import NamedTuple

from dinfer.views.find import COUNTED, FindError, Searched, find
from dinfer.views.panel.desk import Painter, Wants
from dinfer.views.protocol import InspectableRun, Json
from dinfer.views.recorded import RecordedRun


class FindQuestion(NamedTuple):
    """A query of a browser; `number`: of the question."""

    view: str
    number: int
    query: str
    have: None = None


class Finder:
    """The search box of one panel. `send(content)` sends to all its browsers."""

    def __init__(self, run: InspectableRun, recorded: RecordedRun, send: Callable[..., object]) -> None:
        self._run, self._recorded, self._send = run, recorded, send
        self._painter = Painter(self._serve, "finder", longest=0.2)
        self._wants = Wants[FindQuestion]()

    def ask(self, message: Json) -> None:
        """A browser searches. Returns at once."""
        view, number = str(message.get("view")), message.get("number")
        question = FindQuestion(view, number if isinstance(number, int) else 0, str(message.get("query", "")))
        self._wants[view] = question
        self._painter.touch()

    def close(self) -> None:
        """Answer no more."""
        self._painter.close()

    def _serve(self) -> None:
        for question in self._wants.taken(""):
            found: Json = {"view": question.view, "number": question.number, "hits": [], "count": 0}
            try:
                hits, count = find(question.query, self._searched())
                found |= {"hits": [hit.as_dict() for hit in hits], "count": min(count, COUNTED)}
                found["more"] = count > COUNTED
            except FindError as error:
                found["said"] = str(error)
            except Exception as error:  # nothing else would report it
                found["said"] = f"{type(error).__name__}: {error}"
            self._send({"found": found})

    def _searched(self) -> Searched:
        recorded, run = self._recorded.now(), self._run
        standing = recorded.standing if recorded else run.standing()
        return Searched(run.plan, run.chunk_labels(), standing, recorded.timeline if recorded else None)
