"""Runs: the list of a session's runs, and two of them side by side, as a panel shows them. The browser's side is
runs.js."""

from collections.abc import Callable, Sequence
from typing import Any

from dinfer.display import Table
from dinfer.severity import Severity
from dinfer.views.desk import Action, Worker
from dinfer.views.protocol import Json

Send = Callable[[Json], object]


class RunsPage:
    """Answers what browsers ask of a session's runs, and for the cell of this run's calls, on a thread of its own."""

    def __init__(self, run: object, send: Send) -> None:
        self._run: Any = run
        self._runs: Any = getattr(run, "runs", None)
        self._name = str(getattr(run, "name", ""))
        self._send = send
        self._worker = Worker("dinfer panel runs", lambda: None)

    def ask(self, message: Json) -> None:
        """Answer a message; returns at once."""
        self._worker.ask(Action("runs", lambda: self._answer(message)))

    def close(self) -> None:
        """Answer nothing more."""
        self._worker.close()

    def _answer(self, message: Json) -> None:
        view = message.get("view")
        try:
            match message:
                case {"do": "compare_runs", "names": [str(one), str(other)]}:
                    self._send({"compared": {"view": view, **compared(self._runs, one, other)}})
                case {"do": "cell"}:
                    self._send({"cell": {"view": view, "text": self._run.calls.cell()}})
                case _:
                    table: Table = self._runs.table()
                    found = {"columns": table.columns, "rows": table.rows, "about": dict(table.about)}
                    self._send({"runs": {"view": view, "mine": self._name, **found}})
        except Exception as error:  # nothing else would report it
            self._send(
                {"compared": {"view": view, "said": [["error", str(error)]], "columns": [], "rows": []}}
            )


def compared(runs: Any, one: str, other: str) -> Json:
    """Two runs side by side: sentences with their severity, the table, and the call."""
    found = runs.compare(one, other)
    kv = Severity.NOTE if found.kv is None else found.kv.severity
    tokens = Severity.OK if found.first_token is None else Severity.ERROR
    said: Sequence[tuple[Severity, str]] = [
        (kv, found.kv_text()), (tokens, found.token_text()), (Severity.NOTE, found.time),
    ]  # fmt: skip
    table = found.table()
    return {
        "call": f'session.runs.compare("{one}", "{other}")',
        "said": [[severity.word, text] for severity, text in said if text],
        "columns": table.columns,
        "rows": table.rows,
        "block": found.first_block,
    }
