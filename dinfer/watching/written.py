"""What `--json` of `dinfer watch` and `dinfer explain` writes."""

from collections.abc import Sequence
from typing import Any

from dinfer.verdict.verdict import Verdict
from dinfer.watching.evidence import Evidence
from dinfer.watching.figures import collectives_of, links_of


def as_dict(
    jobs: Sequence[Evidence],
    verdicts: Sequence[Verdict | None],
    verdict: Verdict | None,
    exit_status: int | None,
) -> dict[str, Any]:
    """Of all jobs together, plain values. `verdicts`: of each; `verdict`: the one that is told first. Where there are
    several jobs, `jobs` has the verdict of each, and what belongs to one says so by `job`."""
    found: dict[str, Any] = {
        "verdict": _verdict(verdict),
        "findings": [_of(job, one.as_dict()) for job in jobs for one in job.findings],
        "ranks": [_of(job, _rank(job, rank)) for job in jobs for rank in job.ranks],
        "links": [_of(job, link) for job in jobs for link in links_of(job.trace)],
        "collectives": [_of(job, one) for job in jobs for one in collectives_of(job.trace)],
        "notes": list(dict.fromkeys(note for job in jobs for note in job.notes)),
        "exit_status": exit_status,
    }
    if len(jobs) > 1:
        found["jobs"] = [
            {"job": job.job, "verdict": _verdict(its)} for job, its in zip(jobs, verdicts, strict=True)
        ]
    return found


def _of(job: Evidence, value: dict[str, Any]) -> dict[str, Any]:
    return {**value, "job": job.job} if job.job else value


def _verdict(verdict: Verdict | None) -> dict[str, Any] | None:
    if verdict is None:
        return None
    return {"kind": verdict.kind, "ranks": list(verdict.ranks), "text": verdict.sentence}


def _rank(job: Evidence, rank: int) -> dict[str, Any]:
    event, process = job.at(rank), job.processes.get(rank)
    return {
        "rank": rank,
        "host": process.host if process else None,
        "pid": process.pid if process else None,
        "where": job.where(rank),
        "line": (event and event.call and event.call.place) or None,
        "layer": event.layer if event else None,
        "chunk": event.chunk if event else None,
        "ops": process.dropped + len(process.ops)
        if process
        else sum(one.rank == rank for one in job.trace.events),
        "hook": process.hook if process else None,
        "problems": list(process.problems) if process else [],
    }
