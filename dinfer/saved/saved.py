"""Saved: what `dinfer.open` returns: a saved run, or the trace of a report, without a cluster or a checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from dinfer.display import Displayable
from dinfer.errors import NotPossible
from dinfer.kv.diff import VALUES
from dinfer.kv.difference import Diff
from dinfer.kv.rows import numbers_text
from dinfer.kv.source import Source
from dinfer.kv.view import KV, Other, kv_of
from dinfer.model.decoder import Decoder
from dinfer.monitor.signs import HangEvidence
from dinfer.plan.ops import PlanError
from dinfer.plan.plan import Plan
from dinfer.saved.format import HIDDEN, SavedError, hidden_name
from dinfer.saved.read import (
    SavedSource,
    Tensors,
    check_sum,
    read_about,
    read_record,
    read_source,
    read_trace,
    well_formed,
)
from dinfer.saved.replay.replay import Replay
from dinfer.trace.export import TraceError
from dinfer.trace.findings import Findings, findings_of
from dinfer.trace.read import read_traces
from dinfer.trace.trace import Trace
from dinfer.verdict.verdict import Verdict

WriteReport = Callable[[Trace, Path], Path]
"""Writes the report of a trace to a file, and returns its path. Views implement it; whoever opens a run hands it in."""

_OTHERS = ": a folder that run.save has written does"


class Saved(Displayable):
    """What a report holds of a run: `trace` and `findings`. A folder holds more: see `SavedFolder`. `path`: where it
    was read from; `write`: writes reports."""

    def __init__(self, path: Path, trace: Trace, write: WriteReport | None = None) -> None:
        self.path, self.trace, self._write = path, trace, write

    @property
    def findings(self) -> Findings:
        """What was known of the run besides its events."""
        return findings_of(self.trace)

    @property
    def plan(self) -> Plan:
        """The ops of every rank."""
        raise self._lacks(f"plan{_OTHERS}")

    def source(self) -> SavedSource:
        """Its KV, for comparisons."""
        raise self._lacks(f"KV{_OTHERS}")

    def kv(self, *, layer: int | None = None, chunk: int | None = None, rank: int | None = None) -> KV:
        """The KV that the ranks held: see `run.kv`. Raises PlanError for an unknown layer, chunk or rank, SavedError
        for values that were not saved."""
        return kv_of(self.source, layer=layer, chunk=chunk, rank=rank)

    def diff(self, other: "Other | Source | None" = None, values: int | None = VALUES) -> Diff:
        """Where the ranks differed from one another or, given another run, saved or live, from that: see `KV.diff`."""
        return self.kv().diff(other, values=values)

    def hidden(self, *, rank: int, chunk: int) -> Tensor:  # noqa: ARG002 - used by folders
        """The hidden state of a chunk that entered a rank, [tokens, hidden_size]. Raises SavedError."""
        raise self._lacks(f"hidden states{_OTHERS}")

    def verdict(self) -> Verdict:
        """Why the run did not move, or that it did; judged again from where it stood."""
        raise self._lacks(f"signs of life to work a verdict out from{_OTHERS}")

    def replay(
        self,
        rank: int,  # noqa: ARG002 - used by folders
        *,
        model_path: str = "",  # noqa: ARG002
        device: str = "",  # noqa: ARG002
        decoder: Decoder | None = None,  # noqa: ARG002
    ) -> Replay:
        """One rank of the run alone, without its peers, up to where it stood: see `run.replay`. It needs the run's
        checkpoint; `model_path`: where that is on this machine. Raises PlanError for an unknown rank, SavedError or
        RecordError for what was not saved, RecordError for another checkpoint."""
        raise self._lacks("hidden states to replay a rank from")

    def report(self, path: str | Path = "report.html") -> Path:
        """Write it as one HTML file, and return where that is."""
        if self._write is None:
            raise NotPossible("this was opened without views: use dinfer.open(…).")
        return self._write(self.trace, Path(path))

    def __str__(self) -> str:
        return f"{self.path.name}: a trace of {len(self.trace.events)} events, {self.findings.state or 'no state'}"

    def _lacks(self, what: str) -> SavedError:
        return SavedError(f"{str(self.path)!r} holds a trace and findings, but no {what}.")


class SavedFolder(Saved):
    """A folder that `run.save` has written. `about` is what its `run.json` says."""

    def __init__(self, folder: Path, write: WriteReport | None = None) -> None:
        self.about: dict[str, Any] = read_about(folder)
        super().__init__(folder, read_trace(folder, self.about), write)
        self._source = read_source(folder, self.about)

    @property
    def plan(self) -> Plan:
        return self._source.subject.plan

    def source(self) -> SavedSource:
        if not self._source.ranks:
            raise self._lacks("KV, since no rank answered when it was saved")
        return self._source

    def hidden(self, *, rank: int, chunk: int) -> Tensor:
        if not self.about.get("hidden"):
            raise SavedError(
                f"{self._source.subject.name} holds no hidden states: it was saved with hidden=False."
            )
        check_sum(self.path, HIDDEN, self.about)
        found, starts = Tensors(self.path / HIDDEN), self.plan.shape.starts
        if rank not in range(len(starts)):
            raise PlanError(f"there is no rank {rank}: the ranks are 0 to {len(starts) - 1}.")
        state = found.get(hidden_name(rank, chunk, starts[rank]))
        if state is None:
            chunks = range(len(self.plan.shape.chunks))
            there = [n for n in chunks if hidden_name(rank, n, starts[rank]) in found.names]
            which = f"chunk{'s' * (len(there) != 1)} {numbers_text(there)}" if there else "none"
            raise SavedError(f"no hidden state of chunk {chunk} had entered rank {rank}: {which} had.")
        return state

    def replay(
        self, rank: int, *, model_path: str = "", device: str = "", decoder: Decoder | None = None
    ) -> Replay:
        recorded = read_record(self.path, self.about, self._source, rank, self.findings.failure)
        return Replay(recorded, model_path=model_path, device=device, decoder=decoder)

    def verdict(self) -> Verdict:
        with well_formed(self.path):
            evidence = self.about.get("evidence")
            if evidence is None:
                raise self._lacks("signs of life to work a verdict out from")
            return HangEvidence.of(evidence).judge(self.plan)

    def __str__(self) -> str:
        plan, subject = self.plan, self._source.subject
        chunks, new = len(plan.shape.chunks), len(self.about["tokens"])
        ranks, state = numbers_text(self._source.ranks), self.about.get("state", "")
        if state in ("running", "decoding"):  # when it was saved it did not move
            state = "hung"
        lines = [
            f"{subject.name}: {plan.shape.tokens} tokens in {chunks} chunks, {plan.schedule}, {plan.sync_strategy}: "
            f"{state}{f', {new} new tokens' * bool(new)}",
            f"ranks {ranks}: {self._source.holds}{', hidden states' * bool(self.about.get('hidden'))}"
            if ranks
            else "no KV: no rank answered when it was saved",
            *[f"it stood {subject.stands}"] * any(subject.standing),
            *[self.findings.failure.partition("\n")[0]] * bool(self.findings.failure),
            *[f"edited by hand: {', '.join(self.about.get('edited', ()))}"] * bool(self.about.get("edited")),
            *self.about.get("faults", ()),
        ]
        return "\n".join(lines)


def open_saved(path: str | Path, write: WriteReport | None = None) -> Saved:
    """Open what `run.save` or `run.report` has written. Raises SavedError for anything else."""
    found = Path(path).expanduser()
    if found.is_dir():
        return SavedFolder(found.resolve(), write)
    if not found.exists():
        raise SavedError(
            f"there is no {str(path)!r}: give a folder that run.save(…) has written, or a report."
        )
    try:
        return Saved(found, read_traces(found)[0], write)
    except TraceError as error:
        raise SavedError(
            f"{error} dinfer.open takes a folder that run.save(…) has written, or a report."
        ) from None
