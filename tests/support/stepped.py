"""A run of real ranks under a stepper, in the test's own process. Not a test."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinfer.config import Config
from dinfer.engine.board import Stand
from dinfer.job import prepare
from dinfer.launch.processes import Processes
from dinfer.run.stepper import RemoteFleet, Stepper
from tests.support.runs import wait_for


@dataclass(frozen=True)
class Stepped:
    """Ranks that stand before their first op, and what moves them."""

    processes: Processes
    fleet: RemoteFleet
    stepper: Stepper

    @property
    def stands(self) -> Sequence[Stand]:
        return self.fleet.stands()

    def assert_stands(self) -> None:
        """No lane is in an op or may go on, and what has been done makes a consistent cut."""
        stands = self.stands
        assert all(stand.at_limits and not any(stand.started) for stand in stands)
        assert self.stepper.cuts.is_consistent(tuple(stand.positions for stand in stands))

    def decode(self) -> list[dict[str, Any]]:
        """Let the ranks, whose prefill must be done, go on to their end; what each reports."""
        link = self.processes.link
        for rank in range(len(link.ranks)):
            link.send(rank, "decode")
        wait_for(lambda: self.processes.watch(0.2), "all ranks have their result")
        return [state.reports["result"] for state in link.ranks]


@contextmanager
def stepped(model: Path, ids: Sequence[int], log_dir: Path, **config: object) -> Iterator[Stepped]:
    """Start the ranks of a run, paused."""
    values = {"model_path": model, "prompt_ids": ",".join(map(str, ids)), "log_dir": log_dir, "threads": 1}
    job = prepare(Config.of({**values, **config}))
    with Processes(job, paused=True) as processes:

        def ready() -> bool:
            processes.watch(0.2)
            return all("ready" in state.reports for state in processes.link.ranks)

        wait_for(ready, "all ranks are ready")
        fleet = RemoteFleet(job.plan, processes.link, processes.check)
        yield Stepped(processes, fleet, Stepper(fleet))
