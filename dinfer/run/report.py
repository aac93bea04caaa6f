"""The facts for reports: what is known of a job, a machine, a result and the ranks' KV; and the commands that reproduce
a run. Views turn them into HTML."""

import os
import platform
import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from dinfer.config import Config
from dinfer.job import OF_LOAD, Job
from dinfer.kv.diff import diff_ranks
from dinfer.kv.difference import COLUMNS
from dinfer.kv.source import Selection, Source
from dinfer.plan.lower import lower
from dinfer.plan.ops import PlanError
from dinfer.plan.schedule import build
from dinfer.run.prediction import predicted
from dinfer.run.state import nonfinite_marks
from dinfer.saved.saved import WriteReport
from dinfer.trace.findings import BlockState, Findings, KvFinding, RankFinding

LISTED = 20
"""most differences that a report lists"""

NO_VIEWS = "this session was made without views: use dinfer.connect(…)."


@dataclass(frozen=True)
class Done:
    """What was done to a run besides giving it its parameters: `faults` and `breakpoints` as calls; `new_tokens`: their
    number; `own_plan`: the user has written the plan; `edited`: something was changed by hand, which no call
    repeats."""

    faults: Sequence[str] = ()
    breakpoints: Sequence[str] = ()
    new_tokens: int = 0
    own_plan: bool = False
    edited: bool = False


class Reporter(NamedTuple):
    """What a session gives its run for reports. `log`: the lines of the session's log about this run; `others()`: the
    figures of earlier runs of the same prompt."""

    write: WriteReport
    log: list[str]
    others: Callable[[], Sequence[dict[str, Any]]]


# -- the machine


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
    for name in ("dinfer", "torch", "transformers", "ipyparallel", "numpy", "plotly"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


# -- the run


def findings_of_job(job: Job, done: Done, *, prompt: bool = False) -> Findings:
    """A job's parameters, and what was done to its run; with the prompt only if `prompt`."""
    config, plan = job.config, job.plan
    try:
        made = build(plan.shape, config.schedule, config.sync_strategy)
        own = plan.id not in (made.id, lower(made).id)  # edited: shape, schedule and strategy do not give it
    except PlanError:
        own = True
    return Findings(
        parameters=parameters(config),
        versions=versions(),
        machine=machine(),
        proved=job.verdict.proved,
        proof=str(job.verdict),
        plan=plan.text() if own else "",
        predicted=predicted(job),
        commands=commands(config, replace(done, own_plan=own), prompt=prompt),
        prompt=config.prompt_text() or ", ".join(map(str, job.ids)) if prompt else None,
    )


def findings_of_result(job: Job, result: dict[str, Any]) -> Findings:
    """The facts about a finished `dinfer run`."""
    told = ("rank", "device", "host", "dtype", "threads", "kv_sha256")
    ranks = tuple(
        RankFinding(**{name: one[name] for name in told}, tokens=tuple(one["tokens"]))
        for one in result["ranks"]
    )
    known = replace(findings_of_job(job, Done(new_tokens=len(result["tokens"]))), state="done", ranks=ranks)
    if found := result["nonfinite"]:
        blocks = {(one["chunk"], one["layer"]): (one["rank"], one["what"]) for one in found["blocks"]}
        marks = tuple((*mark[:3], mark.kind, mark.text) for mark in nonfinite_marks(blocks))
        known = replace(known, nonfinite=found["text"], marks=marks)
    return known


def kv_finding(source: Source) -> KvFinding:
    """A comparison of all KV that the ranks hold. Raises PlanError if they have no block in common."""
    subject, ranks = source.subject, tuple(source.ranks)
    layers = tuple(range(subject.plan.shape.layers))
    diff = diff_ranks(source, Selection(ranks, layers, tuple(range(len(subject.spans)))), LISTED)
    wrong = {(one.rank, one.layer) for one in diff.differences}

    def state(rank: int, layer: int, spans: int) -> BlockState:
        if (rank, layer) in wrong:
            return "differs"
        return "same" if spans else "missing"

    grid = tuple(
        tuple(state(rank, layer, held.spans[layer]) for layer in layers)
        for rank, held in zip(ranks, source.held(ranks), strict=True)
    )
    listed = tuple(dict(zip(COLUMNS, one.cells(), strict=True)) for one in diff.differences[:LISTED])
    blocks = {(one.rank, one.chunk, one.layer) for one in diff.differences if one.chunk is not None}
    return KvFinding(diff.equal, diff.verdict, grid, listed, len(diff.differences), tuple(sorted(blocks)))


# -- the commands that reproduce it

PROMPTS = ("prompt", "prompt_ids", "prompt_file")

NOT_OF_THE_RUN = {
    *PROMPTS, "log_dir", "log_level", "master_addr", "master_port", "start_timeout", "device_mode",
}  # fmt: skip

ALWAYS = {"model_path", "world_size", "chunk_size", "sync_strategy", "schedule"}
"""parameters that a reader wants to see, also where they have their defaults"""


def parameters(config: Config) -> dict[str, Any]:
    """The parameters of a run, without its prompt and those that do not change the run."""
    return {
        item.name: getattr(config, item.name) for item in fields(config) if item.name not in NOT_OF_THE_RUN
    }


def commands(config: Config, done: Done, *, prompt: bool) -> dict[str, str]:
    """What to type, by where; with the prompt only if `prompt`."""
    default = {item.name: item.default for item in fields(config)}
    chosen = {
        name: value for name, value in parameters(config).items() if name in ALWAYS or value != default[name]
    }
    given = next((name for name in PROMPTS if getattr(config, name)), "prompt")
    asked = getattr(config, given) if prompt else "…"
    notebook = {"In a notebook": _notebook(chosen, asked, done)}
    if done.own_plan:  # only a session accepts it
        return notebook
    less = ", without what was broken or edited" * bool(done.faults or done.edited)
    return {f"In a terminal{less}": _shell({**chosen, given: asked}), **notebook}


def opening(job: Job, connect: str, plan: str, *, keep: bool) -> list[str]:
    """The calls that make a run, paused: import, connect, load, prefill. `plan`: the text of a plan of the user's own,
    "" for none."""
    config = job.config
    default = {item.name: item.default for item in fields(config)}
    chosen = {name: one for name, one in parameters(config).items() if name in ALWAYS or one != default[name]}
    given = next((name for name in PROMPTS if getattr(config, name)), "prompt")
    left_out = {"world_size", "model_path", *OF_LOAD} | ({"schedule", "sync_strategy"} if plan else set())
    if job.loaded and config.kernels != job.loaded.kernels:
        chosen["kernels"] = config.kernels
        left_out -= {"kernels"}
    run = [repr(getattr(config, given)), *(f"{n}={one!r}" for n, one in chosen.items() if n not in left_out)]
    run += ["plan=plan"] * bool(plan) + ["keep=True"] * keep + ["paused=True"]
    return [
        "import dinfer",
        f"session = {connect}",
        job.load_call,
        *[f"plan = {plan!r}"] * bool(plan),
        f"run = session.prefill({', '.join(run)})",
    ]


def _shell(chosen: dict[str, Any]) -> str:
    words = ["dinfer", "run"]
    for name, value in chosen.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return shlex.join(words)


def _notebook(chosen: dict[str, Any], prompt: object, done: Done) -> str:
    load = [repr(chosen["model_path"])]
    load += [f"{name}={chosen[name]!r}" for name in chosen if name in ("dtype", "gpu_ids", "threads")]
    left_out = {"world_size", "model_path", "dtype", "gpu_ids", "threads", "backend"}
    left_out |= {"schedule", "sync_strategy"} if done.own_plan else set()
    run = [f"{name}={value!r}" for name, value in chosen.items() if name not in left_out]
    calls = [*done.faults, *done.breakpoints]
    run += ["plan=Path('plan.txt').read_text()"] * done.own_plan + ["paused=True"] * bool(calls)
    moves = ["run.resume()"] * bool(calls) + ["run.wait()"]
    moves += [f"run.decode({done.new_tokens})"] * bool(done.new_tokens and not done.breakpoints)
    return "\n".join(
        [
            *["from pathlib import Path"] * done.own_plan,
            "import dinfer",
            f"session = dinfer.connect(n={chosen['world_size']})",
            f"session.load({', '.join(load)})",
            *["# plan.txt: the text of the plan, which is in this report"] * done.own_plan,
            f"run = session.prefill({', '.join([repr(prompt), *run])})",
            *calls,
            "; ".join(moves),
            *["# what was edited by hand is not repeated by this"] * done.edited,
        ]
    )
