"""A run's prefill as the planner predicts it beside what was measured: in all, by rank, and by link."""

from collections.abc import Mapping

from dinfer.display import Table
from dinfer.errors import NotPossible
from dinfer.job import Job
from dinfer.planner.machine import unmeasured
from dinfer.trace.intervals import seconds, union
from dinfer.trace.shares import shares
from dinfer.trace.simulated import paper_trace
from dinfer.trace.trace import Trace
from dinfer.trace.transfers import by_link, transfers


def prediction(job: Job, trace: Trace) -> Table:
    """Seconds predicted and measured, a row each for prefill, for what each rank computed, and for when data was on
    each link. Raises NotPossible where nothing that tells of the run was measured before it."""
    if job.machine is None:
        if found := unmeasured(job.config):
            why, remedy = f"it needs {found.name} {found.value}, since {found.why}", found.remedy
        else:
            why = "layers and links were not measured before it"
            remedy = f"session.measure({'' if job.config.digests else 'digests=False'})"
        raise NotPossible(
            f"nothing is predicted of this run: {why}. {remedy}, then session.prefill(…) again."
        )
    return Table(HEADS, beside(predicted(job), trace))


HEADS = ("seconds", "predicted", "measured", "off")


def predicted(job: Job) -> dict[str, float]:
    """Seconds that the planner predicts, by name; empty where nothing that tells of the run was measured before it."""
    return _figures(paper_trace(job.plan, job.machine)) if job.machine else {}


def beside(wanted: Mapping[str, float], trace: Trace) -> list[list[str]]:
    """A row for each predicted figure: its name, predicted and measured seconds, and how far the prediction is off."""
    measured = _figures(trace)
    return [
        [name, f"{value:.4f}", f"{found:.4f}", f"{value / found - 1:+.0%}" if found else ""]
        for name, value in wanted.items()
        for found in (measured.get(name, 0.0),)
    ]


def _figures(trace: Trace) -> dict[str, float]:
    """Seconds by name."""
    found = shares(trace).ranks
    figures = {"prefill": max((one.prefill_s for one in found), default=0.0)}
    figures |= {f"rank {one.rank} computes": seconds(one.compute) for one in found}
    for (source, target), moved in by_link(transfers(trace)).items():
        figures[f"link {source}→{target}"] = seconds(union((one.met, one.end) for one in moved))
    return figures
