"""Runner: one `dinfer run` from start to end: ranks up, progress shown, text streamed, figures gathered, ranks down."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from dinfer.session.job import Job
from dinfer.session.processes import Processes
from dinfer.session.progress import progress_line
from dinfer.session.result import merge, result_of, table
from dinfer.trace.export import write_jsonl

PROGRESS_S = 0.5


class _Show:
    """Progress on one line per rank, and the generated text, without one tearing the other apart."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._shown: dict[int, str] = {}
        self._last = 0.0
        self.text = ""

    def on_text(self, piece: str) -> None:
        if not self.text and piece:
            self._write("\n")
        self.text += piece
        self._write(piece)

    def progress(self, lines: list[str]) -> None:
        """A line for each rank of which there is news, unless text has begun to flow."""
        if self.text or time.monotonic() - self._last < PROGRESS_S:
            return
        self._last = time.monotonic()
        for rank, line in enumerate(lines):
            if self._shown.get(rank) != line:
                self._shown[rank] = line
                self._write(line + "\n")

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


def run(job: Job, trace_path: str | Path | None = None, out: TextIO | None = None) -> dict[str, Any]:
    """Generate; what the ranks measured (see `result_of`). Raises RankFailed; a KeyboardInterrupt ends all ranks."""
    out = out or sys.stdout
    show = _Show(out)
    shape = job.plan.shape
    print(
        f"{job.config.model_path}: {len(job.ids)} prompt tokens in {len(shape.chunks)} chunks, "
        f"{shape.layers} layers on {shape.world_size} ranks, threads each: {job.config.threads}\n"
        f"plan ({job.plan.schedule}, {job.plan.sync_strategy}) {job.verdict}",
        file=out,
    )
    with Processes(job, on_text=show.on_text) as ranks:
        while not ranks.watch(PROGRESS_S):
            show.progress(
                [progress_line(job.plan, rank, state) for rank, state in enumerate(ranks.link.ranks)]
            )
        trace = merge(job, ranks.link.ranks)
        result = result_of(job, ranks.link.ranks, trace, show.text)
    print(f"\n\n{table(result)}", file=out)
    if trace_path:
        _keep(trace_path, lambda path: write_jsonl(trace, path), "trace", out)
    result["trace"] = str(trace_path) if trace_path else None
    _agree(result)
    return result


def _keep(path: str | Path, write: Callable[[Path], None], what: str, out: TextIO) -> None:
    """Write a file; a run that went well is not lost because the disk is full."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write(Path(path))
        print(f"{what}: {path}", file=out)
    except OSError as error:
        print(f"the {what} could not be written to {path}: {os.strerror(error.errno or 0)}", file=out)


def _agree(result: dict[str, Any]) -> None:
    """All ranks must hold the same KV; sync that changed bytes is never passed over."""
    digests = {rank["kv_sha256"] for rank in result["ranks"]}
    if len(digests) > 1:
        listed = ", ".join(f"rank {rank['rank']} {rank['kv_sha256'][:12]}" for rank in result["ranks"])
        raise RuntimeError(f"the ranks hold different KV after prefill (SHA-256: {listed}).")
