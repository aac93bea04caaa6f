"""Runs: the list of a session's runs, and two of them side by side, as a panel shows them. The browser's side is
runs.js."""

from collections.abc import Callable
from typing import Any

from dinfer.display import Table
from dinfer.run.comparison import RunComparison
from dinfer.severity import Severity
from dinfer.views.panel.desk import Action, Worker
from dinfer.views.protocol import Json

Send = Callable[[Json], object]


class RunsPage:
    """Answers what browsers ask of a session's runs, and for the cell of this run's calls, on threads of its own: the
    list, which is asked for whenever the run changes, displaces no click."""

    def __init__(self, run: object, send: Send) -> None:
        self._run: Any = run
        self._runs: Any = getattr(run, "runs", None)
        self._name = str(getattr(run, "name", ""))
        self._send = send
        self._workers = {
            do: Worker(f"dinfer panel {do}", lambda: None) for do in ("runs", "compare_runs", "cell")
        }

    def ask(self, message: Json) -> None:
        """Answer a message; returns at once."""
        do = str(message.get("do"))
        self._workers[do].ask(Action(do, lambda: self._answer(do, message)))

    def close(self) -> None:
        """Answer nothing more."""
        for worker in self._workers.values():
            worker.close()

    def _answer(self, do: str, message: Json) -> None:
        """Under the key of what was asked, also that it could not be done."""
        key = {"compare_runs": "compared"}.get(do, do)
        try:
            found = self._found(do, message)
        except Exception as error:  # nothing else would report it
            found = {"error": str(error)}
        self._send({key: {"view": message.get("view"), **found}})

    def _found(self, do: str, message: Json) -> Json:
        if do == "compare_runs":
            one, other = message["names"]
            return compared(self._runs, one, other)
        if do == "cell":
            return {"text": self._run.calls.cell()}
        table: Table = self._runs.table()
        listed = {"columns": table.columns, "rows": table.rows, "about": dict(table.about)}
        return {"mine": self._name, **listed}


def compared(runs: Any, one: str, other: str) -> Json:
    """Two runs side by side: sentences with their severity, the table, and the call."""
    found: RunComparison = runs.compare(one, other)
    said = [*found.said(), (Severity.NOTE, found.time)]
    table = found.table()
    return {
        "call": f'session.runs.compare("{one}", "{other}")',
        "said": [[severity.word, text] for severity, text in said if text],
        "columns": table.columns,
        "rows": table.rows,
        "block": found.first_block,
    }
