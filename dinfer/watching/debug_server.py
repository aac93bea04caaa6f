"""`dinfer explain` as a page of torch's own debug server, where torch has one (2.10 and newer, experimental there):

    from torch.distributed.debug import start_debug_server
    from torch.distributed.debug._debug_handlers import default_handlers

    from dinfer.watching.debug_server import ExplainHandler

    start_debug_server(handlers=[*default_handlers(), ExplainHandler()])

The page `/dinfer` says why the ranks do not move, `/dinfer_json` the same as `--json` does. It looks at the records
where the job is under watch, else at the flight recorders of the ranks, which know of no messages on gloo.
"""

import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch.distributed.debug._frontend import DebugHandler, NavLink, Response, Route, fetch_all

from dinfer.errors import DinferError
from dinfer.watching.evidence import Evidence
from dinfer.watching.folders import Watched
from dinfer.watching.given import read
from dinfer.watching.written import as_dict

if TYPE_CHECKING:
    from torch.distributed.debug._frontend import HTTPRequestHandler

LOOKS, LOOK_S = 5, 0.3
"""How often a folder is looked at for one answer, and seconds between: whether a rank computes takes a while to see,
and where it stands has to be asked."""

_PAGE = """
{% extends "base.html" %}
{% block header %}<h1>{% block title %}dinfer explain{% endblock %}</h1>{% endblock %}
{% block content %}<pre>{{ text | e }}</pre>{% endblock %}
"""


class ExplainHandler(DebugHandler):
    """`folder`: where the processes of the job record; by default what DINFER_WATCH says, if anything."""

    def __init__(self, folder: str | Path | None = None) -> None:
        named = folder or os.environ.get("DINFER_WATCH")
        self._folder = Path(named) if named else None

    def routes(self) -> list[Route]:
        """Its pages."""
        return [Route("/dinfer", self._page), Route("/dinfer_json", self._json)]

    def nav_links(self) -> list[NavLink]:
        """Its links in the server's head."""
        return [NavLink("/dinfer", "dinfer explain"), NavLink("/dinfer_json", "(JSON)")]

    def templates(self) -> dict[str, str]:
        """Its template."""
        return {"dinfer.html": _PAGE}

    def dump(self) -> str:
        """What the server writes into its folder at intervals, where it is asked to."""
        return self._text()

    def dump_filename(self) -> str:
        """The beginning of that file's name."""
        return "dinfer"

    def _page(self, request: "HTTPRequestHandler") -> bytes:
        return request.frontend.render_template("dinfer.html", text=self._text())

    def _json(self, request: "HTTPRequestHandler") -> bytes:
        jobs = self.look()
        verdicts = [found.problem for found in jobs]
        worst = next((verdict for verdict in verdicts if verdict), None)
        text = json.dumps(as_dict(jobs, verdicts, worst, None), indent=1)
        return request.frontend.render_template("dinfer.html", text=text)

    def _text(self) -> str:
        try:
            jobs = self.look()
        except (DinferError, OSError) as error:
            return f"there is nothing to explain: {error}"
        lines = list(dict.fromkeys(note for found in jobs for note in found.notes))
        for found in jobs:
            lines += [str(found.problem or found.verdict), *(one.text for one in found.findings)]
        return "\n".join(lines)

    def look(self) -> list[Evidence]:
        """The evidence of now, of each job. Raises DinferError, OSError."""
        return _of_folder(self._folder) if self._folder else self._of_recorders()

    def _of_recorders(self) -> list[Evidence]:
        """From the flight recorders: of NCCL where that has ops, else of the CPU's backends."""
        for endpoint in ("dump_nccl_trace_json", "fr_trace_json"):
            _, answers = fetch_all(endpoint, timeout=self.fetch_timeout)
            with tempfile.TemporaryDirectory(prefix="dinfer-") as folder:
                if paths := _written(answers, Path(folder)):
                    return read(paths)
        raise DinferError("no rank's flight recorder holds any op: is TORCH_FR_BUFFER_SIZE set?")


def _written(answers: Sequence[Response], folder: Path) -> list[Path]:
    """The dumps of ranks that have recorded ops, as files whose names say the rank."""
    found = []
    for rank, answer in enumerate(answers):
        if answer.status_code != 200:
            continue
        try:
            dump = json.loads(answer.text)
        except ValueError:
            continue
        if isinstance(dump, dict) and dump.get("entries"):
            path = folder / f"trace_rank_{rank}"
            path.write_text(json.dumps({"entries": dump["entries"], **dump}), encoding="utf-8")
            found.append(path)
    return found


def _of_folder(folder: Path) -> list[Evidence]:
    watched = Watched([folder])
    jobs = watched.look()
    for _ in range(LOOKS - 1):
        watched.ask(process for found in jobs if found.problem for process in found.processes.values())
        time.sleep(LOOK_S)
        jobs = watched.look()
    return jobs
