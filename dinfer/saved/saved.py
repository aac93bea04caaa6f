"""Saved: what `dinfer.open` returns: a saved run, or the trace of a report, without a cluster or a checkpoint."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from dinfer.codec.choice import Codec
from dinfer.display import Displayable, Tidy
from dinfer.errors import NotPossible, excerpt
from dinfer.files import WrittenFiles, check_report
from dinfer.kv.diff import VALUES
from dinfer.kv.difference import Diff, loss_text, nonfinite_remark
from dinfer.kv.rows import numbers_text
from dinfer.kv.source import Selection, Source
from dinfer.kv.view import KV, Other
from dinfer.model.decoder import Decoder
from dinfer.plan.partition import within
from dinfer.plan.plan import Plan
from dinfer.saved.about import About, read_about
from dinfer.saved.bisect.collect import Collected, collect
from dinfer.saved.bisect.result import Bisection
from dinfer.saved.bisect.search import Bisectable, bisect_run
from dinfer.saved.format import HIDDEN, RUN, TRACE, SavedError, hidden_name
from dinfer.saved.read import (
    SavedSource,
    Tensors,
    check_sum,
    read_record,
    read_source,
    read_trace,
    well_formed,
)
from dinfer.saved.replay.record import RankRecord
from dinfer.saved.replay.replay import Replay
from dinfer.severity import Severity
from dinfer.trace.export import TraceError
from dinfer.trace.findings import Findings, findings_of
from dinfer.trace.moment import Moment, moment_after
from dinfer.trace.read import read_traces
from dinfer.trace.stretch import Stretch, stretch_between
from dinfer.trace.trace import Trace
from dinfer.verdict.verdict import Verdict

WriteReport = Callable[[Trace, Path], Path]
"""Writes the report of a trace to a file, and returns its path. Views implement it; whoever opens a run hands it in."""

_OTHERS = ": a folder that run.save has written does"


class Saved(Tidy, Displayable):
    """A run that `run.save` has written or, of a report, its `trace` and `findings` alone. `path`: where it was read
    from; `write`: writes reports; `show`: makes panels; `about`: what a folder's `run.json` says; `source`: its KV. A
    folder has both of these, a report neither."""

    INTERNAL = frozenset({"about", "collected", "noted_kv", "source"})

    def __init__(
        self,
        path: Path,
        trace: Trace,
        write: WriteReport | None = None,
        about: About | None = None,
        source: SavedSource | None = None,
        show: "Callable[[Saved], Any] | None" = None,
    ) -> None:
        self.path, self.trace, self._write, self._show = path, trace, write, show
        self._about, self._source = about, source
        self._written = WrittenFiles()

    @property
    def call_name(self) -> str:
        """For logs of calls."""
        return f"dinfer.open({json.dumps(str(self.path), ensure_ascii=False)})"

    @property
    def findings(self) -> Findings:
        """What was known of the run besides its events."""
        return findings_of(self.trace)

    @property
    def about(self) -> About | None:
        """What a folder's `run.json` says; None of a report or a trace."""
        return self._about

    @property
    def plan(self) -> Plan:
        """The ops of every rank."""
        return self._of_folder(f"plan{_OTHERS}")[1].subject.plan

    def source(self) -> SavedSource:
        """Its KV, for comparisons."""
        _, found = self._of_folder(f"KV{_OTHERS}")
        if not found.ranks:
            raise self._lacks("KV, since no rank answered when it was saved")
        return found

    def kv(self, layer: int | None = None, *, chunk: int | None = None, rank: int | None = None) -> KV:
        """The KV that the ranks held: see `run.kv`. Raises PlanError for an unknown layer, chunk or rank, SavedError
        for values that were not saved."""
        return KV(self.source, layer=layer, chunk=chunk, rank=rank, remark=self._remark)

    def noted_kv(self, layer: int | None, note: Callable[[Diff, Selection], None]) -> KV:
        """The same; `note(diff, selection)` is called after ranks were compared."""
        return KV(self.source, layer=layer, chunk=None, rank=None, remark=self._remark, note=note)

    def diff(self, other: "Other | Source | None" = None, values: int | None = VALUES) -> Diff:
        """Where the ranks differed from one another or, given another run, saved or live, from that: see `KV.diff`."""
        return self.kv().diff(other, values=values)

    def hidden(self, *, rank: int, chunk: int) -> Tensor:
        """The hidden state of a chunk that entered a rank, [tokens, hidden_size]. Raises SavedError."""
        about, source = self._of_folder(f"hidden states{_OTHERS}")
        starts, chunks = source.subject.plan.shape.starts, source.subject.plan.shape.chunks
        if not about.hidden:
            raise SavedError(f"{source.subject.name} holds no hidden states: it was saved with hidden=False.")
        check_sum(self.path, HIDDEN, about)
        found = Tensors(self.path / HIDDEN)
        within("rank", rank, len(starts))
        tokens = len(chunks[chunk]) if 0 <= chunk < len(chunks) else None
        state = found.get(hidden_name(rank, chunk, starts[rank]), (tokens, None), source.subject.dtype)
        if state is None:
            there = [n for n in range(len(chunks)) if hidden_name(rank, n, starts[rank]) in found.names]
            which = f"chunk{'s' * (len(there) != 1)} {numbers_text(there)}" if there else "none"
            raise SavedError(f"no hidden state of chunk {chunk} had entered rank {rank}: {which} had.")
        return state

    def verdict(self) -> Verdict:
        """Why the run did not move, or that it did; judged again from where it stood."""
        what = "signs of life to work a verdict out from"
        about, source = self._of_folder(what + _OTHERS)
        with well_formed(self.path):
            evidence = about.judged()
            if evidence is None:
                raise self._lacks(what)
            return evidence.judge(source.subject.plan)

    def replay(
        self, rank: int, *, model_path: str | Path = "", device: str = "", decoder: Decoder | None = None
    ) -> Replay:
        """One rank of the run alone, without its peers, up to where it stood: see `run.replay`. It needs the run's
        checkpoint; `model_path`: where that is on this machine. Raises PlanError for an unknown rank, SavedError or
        RecordError for what was not saved, RecordError for another checkpoint."""
        about, source = self._of_folder("hidden states to replay a rank from")
        recorded = read_record(self.path, about, source, rank, self.findings.failure)
        return Replay(recorded, model_path=str(model_path), device=device, decoder=decoder)

    def debugger(self) -> Any:
        """The panel of `session.debugger()`, read-only: map, KV and communication as the run stood. `dinfer desk PATH`
        shows the same in a browser. Raises NotPossible for a trace that is of no plan of dinfer."""
        if self._show is None:
            raise NotPossible("this was opened without views: use dinfer.open(…).")
        return self._show(self)

    def bisect(
        self,
        against: "str | Bisectable" = "reference",
        *,
        rank: int | None = None,
        what: str | None = None,
        model_path: str | Path = "",
        device: str = "",
        decoder: Decoder | None = None,
    ) -> Bisection:
        """The block with which the run's answer turns wrong: see `run.bisect`. It needs the run's checkpoint, and a
        folder with KV and hidden states. Raises as `replay` does."""
        return bisect_run(
            self, against, rank=rank, what=what, model_path=str(model_path), device=device, decoder=decoder
        )

    def collected(self, rank: int | None = None) -> Collected:
        """What a bisect compares: see `saved.bisect.collect`."""
        about, source = self._of_folder("KV and hidden states to bisect")

        def record_of(one: int) -> RankRecord:
            return read_record(self.path, about, source, one, self.findings.failure)

        return collect(source, record_of if about.hidden else None, rank)

    def at(self, seconds: float) -> Moment:
        """What every lane and link did that many seconds after the first op began. Pauses between steps do not count,
        as on the panel's time strip, which shows this call."""
        return moment_after(self.trace, seconds)

    def stretch(self, begin: float, end: float) -> Stretch:
        """What each rank's time between two moments, counted as in `at()`, went into, and what each link carried.
        Raises TraceError where `end` is before `begin`."""
        return stretch_between(self.trace, begin, end)

    def report(self, path: str | Path = "report.html") -> Path:
        """Write it as one HTML file, and return where that is. A file that is there is kept, unless this object wrote
        it: the new one gets a number. Raises NotPossible for a name that ends otherwise than .html, OSError."""
        if self._write is None:
            raise NotPossible("this was opened without views: use dinfer.open(…).")
        check_report(Path(path).expanduser())
        made = self._write(self.trace, self._written.place_for(path))
        self._written.add(path, made)
        return made

    @property
    def severity(self) -> Severity:
        return Severity.ERROR if self.findings.failure else Severity.NOTE

    def __str__(self) -> str:
        findings, about, source = self.findings, self._about, self._source
        if source is None or about is None:
            events = f"a trace of {len(self.trace.events)} events"
            return f"{self.path.name}: {events}, {findings.state or 'no state'}"
        subject, plan, new, state = source.subject, self.plan, len(about.tokens), about.state
        if state in ("running", "decoding"):  # so earlier versions saved a run that hung
            state = "hung"
        held = "no KV: no rank answered when it was saved"
        if source.ranks:
            held = f"ranks {numbers_text(source.ranks)}: {source.holds}"
            held += ", hidden states" * about.hidden
        codec = f", codec {about.codec}" * (about.codec != "none")
        decoded = f", {new} new token{'s' * (new != 1)}" * bool(new)
        lines = [
            f"{subject.name}: {plan.shape.tokens_text}, {plan.schedule}, "
            f"{plan.sync_strategy}{codec}: {state}{decoded}",
            held,
            *[f"it stood {subject.stands}"] * any(subject.standing),
            *[findings.failure.partition("\n")[0]] * bool(findings.failure),
            *[f"not finite: {findings.nonfinite}"] * bool(findings.nonfinite),
            *[f"edited by hand: {', '.join(about.edited)}"] * bool(about.edited),
            *about.faults,
        ]
        return "\n".join(lines)

    def _of_folder(self, what: str) -> tuple[About, SavedSource]:
        """What was read of a folder; of a report, which lacks `what`, raises SavedError."""
        if self._source is None or self._about is None:
            raise self._lacks(what)
        return self._about, self._source

    def _remark(self, chosen: Selection) -> str:
        """See `kv.difference.nonfinite_remark`; and that a lossy codec has changed the blocks."""
        blocks = ((chunk, layer) for _, chunk, layer, kind, _ in self.findings.marks if kind == "nonfinite")
        told = [nonfinite_remark(blocks, chosen, self.findings.nonfinite)]
        if self._about is not None and Codec.of(self._about.codec).is_lossy:
            told.append(loss_text(self._about.codec, {}))
        return "; and ".join(filter(None, told))

    def _lacks(self, what: str) -> SavedError:
        return SavedError(f"{str(self.path)!r} holds a trace and findings, but no {what}.")


def open_saved(
    path: str | Path, write: WriteReport | None = None, show: Callable[[Saved], Any] | None = None
) -> Saved:
    """Open what `run.save` or `run.report` has written. Raises SavedError for anything else."""
    try:
        found = Path(path).expanduser()
        is_folder, is_there = found.is_dir(), found.exists()
    # A name too long, with NUL, of an unknown user, not allowed.
    except (OSError, ValueError, RuntimeError) as error:
        raise SavedError(
            f"{excerpt(str(path))} cannot be opened ({error}): give a folder that run.save(…) has written, or a report."
        ) from None
    if is_folder and not (found / RUN).exists() and (found / TRACE).is_file():
        found, is_folder = found / TRACE, False  # a folder of `dinfer run` or `dinfer watch`
    if is_folder:
        folder = found.resolve()
        about = read_about(folder)
        return Saved(folder, read_trace(folder, about), write, about, read_source(folder, about), show)
    if not is_there:
        raise SavedError(
            f"there is no {str(path)!r}: give a folder that run.save(…) has written, or a report."
        )
    try:
        return Saved(found, read_traces(found)[0], write, show=show)
    except OSError as error:
        raise SavedError(f"{str(path)!r} cannot be read: {error.strerror}.") from None
    except TraceError as error:
        raise SavedError(
            f"{error} dinfer.open takes a folder that run.save(…) has written, or a report."
        ) from None
