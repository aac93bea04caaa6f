"""Why: the verdict of a run that cannot go on, as a picture, and a fold for each rank with its blocked lines of code.

The kernel makes HTML without scripts, on a thread of its own: a verdict may have to ask the ranks where they stand.
"""

import os
from collections.abc import Callable
from typing import NamedTuple

from dinfer.verdict.folds import folds_html
from dinfer.verdict.verdict import Verdict
from dinfer.views.panel.desk import Painter, Wants
from dinfer.views.protocol import InspectableRun, Json


class WhyQuestion(NamedTuple):
    """A browser wants the verdict; `have`: the standing verdict's text for which it has one."""

    view: str
    have: str


class Why:
    """The verdict of one panel. `send(content)` sends to all its browsers."""

    def __init__(self, run: InspectableRun, send: Callable[..., object]) -> None:
        self._run, self._send = run, send
        self._painter = Painter(self._serve, "why", longest=1.0)
        self._wants = Wants[WhyQuestion]()

    def ask(self, message: Json) -> None:
        """A browser asks. Returns at once."""
        question = WhyQuestion(str(message.get("view")), str(message.get("have", "")))
        self._wants[question.view] = question
        self._painter.touch()

    def close(self) -> None:
        """Answer no more."""
        self._painter.close(wait=False)  # it may be asking ranks that do not answer

    def _serve(self) -> None:
        for question in self._wants.taken(None):
            content: Json = {"view": question.view, "have": question.have, "home": os.path.expanduser("~")}
            try:
                content |= explained(self._run.verdict())
            except Exception as error:  # nothing else would report it
                content |= {"html": "", "said": str(error) or type(error).__name__}
            self._send({"why": content})


def explained(verdict: object) -> Json:
    """A verdict as HTML; "" where nothing hangs."""
    if not isinstance(verdict, Verdict) or not verdict.is_hung:
        return {"html": "", "said": str(verdict)}
    return {
        "html": f"{verdict.svg()}{folds_html(verdict.lines, verdict.stacks, verdict.ranks)}",
        "said": verdict.sentence,
    }
