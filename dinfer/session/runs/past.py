"""Past: the figures of a session's earlier runs, for those who set one beside another; not their events."""

from typing import Any

from dinfer.session.job import Job
from dinfer.session.runs.reporting import Reporting
from dinfer.trace.summary import summary


class Past:
    """Of one session."""

    def __init__(self) -> None:
        self._found: list[tuple[Job, dict[str, Any]]] = []

    def note(self, run: Reporting) -> None:
        """Keep the figures of a run that has ended its prefill with nothing wrong."""
        if run.standing().state == "done" and not run.edited:
            name = f"run {len(self._found) + 1} of this session"
            self._found.append((run.job, {"name": name, **summary(run.trace)}))

    def of(self, job: Job) -> list[dict[str, Any]]:
        """Those of the same prompt and checkpoint, in the order in which they ran."""
        wanted = job.ids, job.config.model_path
        return [figures for past, figures in self._found if (past.ids, past.config.model_path) == wanted]
