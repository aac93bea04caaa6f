"""One `dinfer run` from start to end: starts ranks, shows progress and text, gathers figures, ends the ranks."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from dinfer.cluster.ranks import RankState
from dinfer.display import listed, takes_colour
from dinfer.files import make_folder
from dinfer.job import Job
from dinfer.launch.processes import Processes
from dinfer.model.checkpoint import ignored_generation
from dinfer.plan.plan import Plan
from dinfer.run.failure import RankFailed
from dinfer.run.nonfinite import nonfinite_of
from dinfer.run.report import findings_of_result
from dinfer.run.result import merge, result_of, table
from dinfer.severity import Severity
from dinfer.trace.clocks import moved
from dinfer.trace.findings import with_findings
from dinfer.verdict.verdict import Verdict


def progress_line(plan: Plan, rank: int, state: RankState) -> str:
    """For example `rank 1  prefill  chunk 3 of 8, layer 14  KV 120 of 288 blocks`."""
    if state.phase == "decode":
        return f"rank {rank}  decode"  # the tokens themselves are shown as they come
    if state.phase != "prefill" or state.stand is None:
        return f"rank {rank}  {state.phase}"
    stand, lanes = state.stand, plan.lanes[rank]
    if len(stand.positions) != len(lanes):
        return f"rank {rank}  {state.phase}"
    done = [op for lane, position in zip(lanes, stand.positions, strict=True) for op in lane.ops[:position]]
    layers = [op for op in done if op.kind == "layer"]
    blocks = len(layers) + sum(op.kind == "recv" and op.what == "kv" for op in done)
    at = (
        f"chunk {layers[-1].chunk + 1} of {len(plan.shape.chunks)}, layer {layers[-1].layer}"
        if layers
        else "waiting for hidden states"
    )
    return f"rank {rank}  prefill  {at}  KV {blocks} of {plan.shape.blocks} blocks"


PROGRESS_S = 0.5


class ProgressLines:
    """Progress in one line per rank, and the generated text, neither breaking into the other."""

    def __init__(self, job: Job, out: TextIO | None = None) -> None:
        self._job, self.out = job, out or sys.stdout
        self._shown: dict[int, str] = {}
        self._port_told = False
        self.text = ""

    def introduce(self, auto: Sequence[str] = ()) -> None:
        """Say what is about to run, and why it cannot hang, or what is to be chosen first."""
        config, shape = self._job.config, self._job.plan.shape
        self.say(
            f"{config.model_path}: {len(self._job.ids)} prompt tokens, "
            f"{shape.layers} layers on {shape.world_size} rank{'s' * (shape.world_size > 1)}, "
            f"threads each: {config.threads}, over {config.backend}"
        )
        if auto:
            self.say(f"to be chosen, once layers and links are measured: {', '.join(auto)}")
        else:
            self._introduce_plan()
        if ignored := ignored_generation(self._job.spec.path):
            self.say(ignored)

    def chosen(self, job: Job) -> None:
        """Say what the planner has chosen, and why."""
        self._job = job
        self.say("\n".join(job.because))
        self._introduce_plan()

    def _introduce_plan(self) -> None:
        plan = self._job.plan
        chunks = len(plan.shape.chunks)
        self.say(
            f"plan ({plan.schedule}, {plan.sync_strategy}, {chunks} chunk{'s' * (chunks > 1)}) {self._job.verdict}"
        )

    def on_text(self, piece: str) -> None:
        if not self.text and piece:
            self._write("\n")
        self.text += piece
        self._write(piece)

    def progress(self, ranks: Sequence[RankState]) -> None:
        """A line for each rank that has moved, unless text has begun to come."""
        self._name_port(ranks[0])
        for rank, state in enumerate(ranks):
            line = progress_line(self._job.plan, rank, state)
            if not self.text and self._shown.get(rank) != line:
                self._shown[rank] = line
                self.say(line)

    def _name_port(self, first: RankState) -> None:
        """Say so if the ranks meet at another port than the one asked for."""
        asked, opened = self._job.config.master_port, first.store
        if opened and not self._port_told:
            self._port_told = True
            if asked and opened.port != asked:
                self._interject(f"port {asked} is in use; the ranks meet at {opened.port} instead.")

    def say(self, line: str) -> None:
        self._write(f"{line}\n")

    def warn(self, verdict: Verdict) -> None:
        """Say why the run does not move: now, not when its timeout ends it."""
        text = f"no progress: {verdict.sentence}"
        self._interject(verdict.severity.marked(text, colour=takes_colour(self.out)))

    def nonfinite(self, ranks: Sequence[RankState]) -> None:
        """Say where the first NaN or Inf is, if any rank has found one."""
        events = (one for state in ranks for one in moved(state.events, state.clock))
        known = nonfinite_of([state.notes for state in ranks], events)
        if known.first:
            text = f"not finite: {known.text}"
            self._interject(Severity.WARNING.marked(text, colour=takes_colour(self.out)))

    def _interject(self, line: str) -> None:
        """A line of its own, also within the text."""
        self.say("\n" * bool(self.text) + line)

    def _write(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()


def run(
    job: Job,
    trace_path: str | Path | None = None,
    out: TextIO | None = None,
    *,
    auto: Sequence[str] = (),
) -> dict[str, Any]:
    """Run the job; what the ranks measured (see `result_of`). `trace_path`: see `conclude`; `auto`: the parameters that
    the planner is to choose. Raises RankFailed; a KeyboardInterrupt ends all ranks."""
    show = ProgressLines(job, out)
    show.introduce(auto)
    with Processes(job, on_text=show.on_text, on_hang=show.warn, auto=auto, on_chosen=show.chosen) as ranks:
        try:
            while not ranks.watch(PROGRESS_S):
                show.progress(ranks.link.ranks)
        except RankFailed:  # of which NaN may be the cause
            show.nonfinite(ranks.link.ranks)
            raise
        show.progress(ranks.link.ranks)  # also of a run that was over before it was looked at
        return conclude(ranks.job, ranks.link.ranks, show, trace_path)


def conclude(
    job: Job, ranks: Sequence[RankState], show: ProgressLines, trace_path: str | Path | None
) -> dict[str, Any]:
    """Show and save the ranks' results. `trace_path`: where to write the trace, by default beside the run's log files.
    Raises RuntimeError if the ranks hold different KV."""
    folder = Path(job.config.log_dir)
    trace_path = trace_path or folder / "trace.jsonl"
    trace = merge(job, [state.events for state in ranks], ranks)
    result = result_of(job, ranks, trace, show.text)
    trace = with_findings(trace, findings_of_result(job, result))
    show.say(f"\n\n{table(result)}")
    show.say(_keep(trace_path, lambda path: trace.export("jsonl", path), "trace"))
    show.say(f"logs: {folder}")
    for state in ranks:
        if state.result and state.result.log_trouble:
            trouble = f"the run went on, but {state.result.log_trouble}"
            show.say(Severity.WARNING.marked(trouble, colour=takes_colour(show.out)))
    result["trace"], result["log_dir"] = str(trace_path), str(folder)
    show.nonfinite(ranks)
    if found := result["corrupt"]:  # which the user chose to record, and go on
        show.say(Severity.ERROR.marked(listed([one["text"] for one in found]), colour=takes_colour(show.out)))
    else:
        _agree(result)
    return result


def _keep(path: str | Path, write: Callable[[Path], object], what: str) -> str:
    """Write a file, and say so. A full disk does not fail a run that went well."""
    try:
        write(make_folder(path))
    except OSError as error:
        return f"the {what} could not be written to {path}: {os.strerror(error.errno or 0)}"
    return f"{what}: {path}"


def _agree(result: dict[str, Any]) -> None:
    """Raises RuntimeError unless all ranks hold the same KV."""
    digests = {rank["kv_sha256"] for rank in result["ranks"]}
    if len(digests) > 1:
        listed = ", ".join(f"rank {rank['rank']} {rank['kv_sha256'][:12]}" for rank in result["ranks"])
        raise RuntimeError(f"the ranks hold different KV after prefill (SHA-256: {listed}).")
