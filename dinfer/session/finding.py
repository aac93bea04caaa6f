"""Finding: what a session knows of a run, as the plain data that its report needs. No ranks are asked here."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dinfer.config import Config
from dinfer.plan.lower import lower
from dinfer.plan.ops import PlanError
from dinfer.plan.plan import Plan
from dinfer.plan.schedule import build
from dinfer.session.job import Job
from dinfer.session.machine import machine, versions
from dinfer.session.reproduce import Done, commands, parameters
from dinfer.trace.findings import Findings, RankFinding


def findings_of_job(job: Job, done: Done, *, prompt: bool = False) -> Findings:
    """What is known of its parameters, and of what was done to it; the prompt only where asked for."""
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
    """What `dinfer run` knows in the end."""
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
    """Whether shape, schedule and strategy say all of it: it was not edited."""
    try:
        made = build(plan.shape, config.schedule, config.sync_strategy)
        return plan.id in (made.id, lower(made).id)
    except PlanError:
        return False


def _numbers(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids))
