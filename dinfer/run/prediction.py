"""A run's prefill as the planner predicts it beside what was measured: in all, by rank, and by link."""

from collections.abc import Callable, Iterable, Mapping
from functools import cache

from dinfer.display import Table
from dinfer.errors import NotPossible
from dinfer.job import Job
from dinfer.plan.plan import Plan
from dinfer.planner.machine import MeasuredMachine
from dinfer.trace.intervals import seconds, union
from dinfer.trace.shares import shares
from dinfer.trace.simulated import paper_trace
from dinfer.trace.trace import Trace
from dinfer.trace.transfers import by_link, transfers


def prediction(job: Job, trace: Trace) -> Table:
    """Seconds predicted and measured, a row each for prefill, for what each rank computed, and for when data was on
    each link. Raises NotPossible where nothing that tells of the run was measured before it."""
    if job.machine is None:
        remedy = f"session.measure({'' if job.config.digests else 'digests=False'})"
        raise NotPossible(
            "nothing is predicted of this run: layers and links, as it has them, were not measured before it. "
            f"{remedy}, then session.prefill(…) again."
        )
    return Table(HEADS, beside(predicted(job), trace))


HEADS = ("seconds", "predicted", "measured", "off")


def predicted(job: Job) -> dict[str, float]:
    """Seconds that the planner predicts, by name; empty where nothing that tells of the run was measured before it."""
    return predicted_figures(job.plan, job.machine) if job.machine else {}


def prediction_of(run: object) -> Callable[[], Mapping[str, float]] | None:
    """What gives the seconds that are predicted of a run that is shown, live or saved, by name; None where nothing is.
    Of a live run they are simulated at the first call."""
    job = getattr(run, "job", None)
    if isinstance(job, Job) and job.machine:
        return cache(lambda: predicted(job))
    known: Mapping[str, float] = getattr(run, "predicted", {})
    return (lambda: known) if known else None


def predicted_figures(plan: Plan, machine: MeasuredMachine) -> dict[str, float]:
    """Seconds by name, as `beside` has them, of a plan on a machine."""
    return _figures(paper_trace(machine.as_run(plan), machine))


def beside(wanted: Mapping[str, float], trace: Trace) -> list[list[str]]:
    """A row for each predicted figure: its name, predicted and measured seconds, and how far the prediction is off."""
    return rows_beside(figures_beside(wanted, trace))


def rows_beside(figures: Iterable[tuple[str, float, float]]) -> list[list[str]]:
    """A row for each figure: its name, predicted and measured seconds, and how far the prediction is off."""
    return [
        [name, f"{value:.4f}", f"{found:.4f}", f"{value / found - 1:+.0%}" if found else ""]
        for name, value, found in figures
    ]


def figures_beside(wanted: Mapping[str, float], trace: Trace) -> list[tuple[str, float, float]]:
    """Each predicted figure: its name, predicted and measured seconds."""
    measured = _figures(trace)
    return [(name, value, measured.get(name, 0.0)) for name, value in wanted.items()]


def _figures(trace: Trace) -> dict[str, float]:
    """Seconds by name."""
    found = shares(trace).ranks
    figures = {"prefill": max((one.prefill_s for one in found), default=0.0)}
    figures |= {f"rank {one.rank} computes": seconds(one.compute) for one in found}
    for (source, target), moved in by_link(transfers(trace)).items():
        figures[f"link {source}→{target}"] = seconds(union((one.met, one.end) for one in moved))
    return figures
