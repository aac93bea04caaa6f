"""The facts for reports: what is known of a job, a machine, a result and the ranks' KV. Views turn them into HTML."""

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from dinfer.config import Config
from dinfer.errors import NotPossible
from dinfer.job import Job
from dinfer.kv.diff import diff_ranks
from dinfer.kv.difference import COLUMNS
from dinfer.kv.source import Selection, Source
from dinfer.plan.lower import lower
from dinfer.plan.ops import PlanError
from dinfer.plan.plan import Plan
from dinfer.plan.schedule import build
from dinfer.run.reproduce import Done, commands, parameters
from dinfer.saved.saved import WriteReport
from dinfer.trace.findings import BlockState, Findings, KvFinding, RankFinding

PACKAGES = ("dinfer", "torch", "transformers", "ipyparallel", "numpy", "plotly")


def machine() -> dict[str, str]:
    """Processor, cores and system."""
    return {
        "processor": processor(),
        "cores": str(os.cpu_count() or "unknown"),
        "system": f"{platform.system()} {platform.release()}",
    }


def processor() -> str:
    """The processor's name, where the system provides it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """The versions of Python and of the installed packages that matter here."""
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def findings_of_job(job: Job, done: Done, *, prompt: bool = False) -> Findings:
    """A job's parameters, and what was done to its run; with the prompt only if `prompt`."""
    own = not _can_be_built(job.plan, job.config)
    return Findings(
        parameters=parameters(job.config),
        versions=versions(),
        machine=machine(),
        proved=job.verdict.proved,
        proof=str(job.verdict),
        plan=job.plan.text() if own else "",
        commands=commands(job.config, replace(done, own_plan=own), prompt=prompt),
        prompt=job.config.prompt_text() or _numbers(job.ids) if prompt else None,
    )


def findings_of_result(job: Job, result: dict[str, Any]) -> Findings:
    """The facts about a finished `dinfer run`."""
    ranks = tuple(
        RankFinding(
            rank=one["rank"],
            device=one["device"],
            host=one["host"],
            dtype=one["dtype"],
            threads=one["threads"],
            kv_sha256=one["kv_sha256"],
            tokens=tuple(one["tokens"]),
        )
        for one in result["ranks"]
    )
    return replace(findings_of_job(job, Done(new_tokens=len(result["tokens"]))), state="done", ranks=ranks)


def _can_be_built(plan: Plan, config: Config) -> bool:
    """Whether shape, schedule and strategy give this plan: it was not edited."""
    try:
        made = build(plan.shape, config.schedule, config.sync_strategy)
        return plan.id in (made.id, lower(made).id)
    except PlanError:
        return False


def _numbers(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids))


LISTED = 20
"""most differences that a report lists"""


def kv_finding(source: Source) -> KvFinding:
    """A comparison of all KV that the ranks hold. Raises PlanError if they have no block in common."""
    subject, ranks = source.subject, tuple(source.ranks)
    layers = tuple(range(subject.plan.shape.layers))
    diff = diff_ranks(source, Selection(ranks, layers, tuple(range(len(subject.spans)))), LISTED)
    wrong = {(one.rank, one.layer) for one in diff.differences}
    grid = tuple(
        tuple(_block((rank, layer) in wrong, held.spans[layer]) for layer in layers)
        for rank, held in zip(ranks, source.held(ranks), strict=True)
    )
    listed = diff.differences[:LISTED]
    return KvFinding(
        diff.equal, diff.verdict, grid, tuple(dict(zip(COLUMNS, one.cells(), strict=True)) for one in listed)
    )


def _block(is_wrong: bool, spans: int) -> BlockState:
    if is_wrong:
        return "differs"
    return "same" if spans else "missing"


class Reporter(NamedTuple):
    """What a session gives its run for reports. `log`: the lines of the session's log about this run; `others()`: the
    figures of earlier runs of the same prompt."""

    write: WriteReport
    log: list[str]
    others: Callable[[], Sequence[dict[str, Any]]]


def no_views() -> NotPossible:
    """The error of a session that `dinfer.connect` has not made."""
    return NotPossible("this session was made without views: use dinfer.connect(…).")
