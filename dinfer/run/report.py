"""Reporting: a run as one HTML file. What it looks like is for views, which a session is given; here, what is known."""

import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from dinfer.cluster.kv import Live
from dinfer.cluster.ranks import RankRefused
from dinfer.config import Config
from dinfer.errors import NotPossible
from dinfer.job import Job
from dinfer.kv.diff import diff_ranks
from dinfer.kv.difference import COLUMNS
from dinfer.kv.source import Selection, Source
from dinfer.plan.breakpoints import Breakpoint
from dinfer.plan.lower import lower
from dinfer.plan.ops import PlanError
from dinfer.plan.plan import Plan
from dinfer.plan.schedule import build
from dinfer.run.faults import Injected
from dinfer.run.fleet import RankFailed
from dinfer.run.inspect import Inspecting
from dinfer.run.reproduce import Done, commands, parameters
from dinfer.run.state import WAIT_S
from dinfer.run.stepper import NoProgress
from dinfer.trace.export import check_folder
from dinfer.trace.findings import BlockState, Findings, KvFinding, RankFinding, with_findings
from dinfer.trace.trace import Trace

PACKAGES = ("dinfer", "torch", "transformers", "ipyparallel", "numpy", "plotly")


def machine() -> dict[str, str]:
    """Processor, cores and system."""
    return {
        "processor": processor(),
        "cores": str(os.cpu_count() or "unknown"),
        "system": f"{platform.system()} {platform.release()}",
    }


def processor() -> str:
    """The processor's name as its maker writes it, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Python's and those of the packages that are installed."""
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


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


LISTED = 20
"""differences that a report lists"""


def kv_finding(source: Source) -> KvFinding:
    """Of all that the ranks hold. Raises PlanError where they have no block in common."""
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


Write = Callable[[Trace, Path], Path]
"""of views: write a report of that run to that file; where it went"""


class Reporter(NamedTuple):
    """What a session lends its run for reports: `log` holds the lines of the session's log that are about this run,
    `others` gives the figures of earlier runs of the same prompt."""

    write: Write
    log: list[str]
    others: Callable[[], Sequence[dict[str, Any]]]


class Reporting(Inspecting):
    """Of one run."""

    reporter: Reporter | None = None

    def report(
        self, path: str | Path = "report.html", *, prompt: bool = False, environment: bool = False
    ) -> Path:
        """Write what is known of the run to one HTML file that needs neither network nor kernel; where it is.

        It first waits until the run stands. With `prompt` it holds the prompt and the text that came of it, with
        `environment` this process's environment variables: look for secrets in them before you pass it on. Raises
        OSError, at once where the file's folder does not exist.
        """
        if self.reporter is None:
            raise NotPossible("this session was made without views: use dinfer.connect(…).")
        target = Path(path).expanduser()
        check_folder(target)
        self._until_it_stands()
        found = self.findings(prompt=prompt, environment=environment)
        return self.reporter.write(with_findings(self.trace, found), target)

    def findings(self, *, prompt: bool = False, environment: bool = False) -> Findings:
        """What is known of it now, beside its events."""
        standing = self.standing()
        done = Done(
            [one.fault.call for one in self._armed],
            [one.call for one in self.breakpoints_set()],
            len(self.tokens),
            edited=bool(self.edited),
        )
        return replace(
            findings_of_job(self.job, done, prompt=prompt),
            made=time.strftime("%Y-%m-%d %H:%M"),
            state=standing.state,
            failure=self.failure or self.silence or self.hang,
            positions=tuple(stand.positions for stand in standing.stands),
            ranks=self._rank_findings(),
            message=standing.message,
            breakpoints=tuple(map(str, self.breakpoints_set())),
            hits=tuple(self.story),
            kv=self._kv_finding(labels=prompt),
            faults=standing.faults,
            edited=tuple(self.edited),
            corrupt=tuple(map(str, self.corrupt)),
            marks=tuple(tuple(mark) for mark in standing.marks),
            log=tuple(self.reporter.log) if self.reporter else (),
            others=tuple(self.reporter.others()) if self.reporter else (),
            text=self.text if prompt else None,
            chunk_texts=tuple(self.chunk_labels()) if prompt else (),
            environment=dict(sorted(os.environ.items())) if environment else None,
        )

    def breakpoints_set(self) -> Iterable[Breakpoint]:
        """Those that are set now."""
        raise NotImplementedError

    def last_source(self) -> Live:
        """What the ranks hold once the run stands, or where it has failed or hangs. Raises RuntimeError for a run that
        is over."""
        if self.closed:
            return self.source()
        self._until_it_stands()
        return self._live()

    def struck(self) -> list[Injected]:
        """The faults that are armed and have struck."""
        return [one for one in self._armed if one.has_struck]

    def _rank_findings(self) -> tuple[RankFinding, ...]:
        digests, tokens = self._digests(), self._generation.by_rank
        return tuple(
            RankFinding(
                rank=rank,
                device=self._devices[rank],
                threads=self.config.threads,
                kv_sha256=digests[rank],
                tokens=tuple(tokens[rank]) if rank in tokens else None,
                error=state.error.traceback if state.error else "",
            )
            for rank, state in enumerate(self._line.ranks)
        )

    def _kv_finding(self, *, labels: bool) -> KvFinding | None:
        """None where nothing can be compared, or the ranks do not answer. `labels`: with the text of tokens."""
        with suppress(
            RankFailed, RankRefused, TimeoutError, PlanError
        ):  # the report says that it was not compared
            if self._state() in ("paused", "done"):
                now = self.source()
                return kv_finding(now if labels else Live(replace(now.subject, texts=()), now.line))
        return None

    def _digests(self) -> list[str]:
        """Of each rank's KV; empty where prefill is not done or a rank does not answer."""
        with suppress(RankFailed, RankRefused, TimeoutError):  # the report says that it was not checked
            if self._state() == "done":
                return self.sha256()
        return [""] * self.world_size

    def _until_it_stands(self) -> None:
        """Also when it has failed or hangs: that above all is to be reported."""
        while self._state() in ("running", "decoding") and not self.silence and self._goes_on():
            with self._line.changed:
                self._line.changed.wait(WAIT_S)
            self.look()  # which may wait for another thread that moves the run, and that one for news of ranks

    def _goes_on(self) -> bool:
        try:
            self.check()
        except (RankFailed, NoProgress):
            return False
        return True
