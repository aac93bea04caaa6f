"""What leaves a run: a snapshot of it, a report, a folder, a record of one rank for replay."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dinfer.cluster.kv import Live
from dinfer.cluster.lease import RunOver, over_text
from dinfer.cluster.ranks import RankRefused, answers
from dinfer.engine.prompt import Edit
from dinfer.files import WrittenFiles, check_report
from dinfer.kv.ledger import BlockKey
from dinfer.kv.source import Source
from dinfer.messages import EditedBlocks, ListKv, ReadBlocks, ReadEdit, ReadFinalHidden, ReadNotes
from dinfer.plan.faults import SLOW
from dinfer.plan.ops import PlanError
from dinfer.run.breakpoints import BreakpointTable
from dinfer.run.events import RunEvents
from dinfer.run.failure import RankFailed
from dinfer.run.faults import Armed
from dinfer.run.hang import Health
from dinfer.run.inspect import RunInspector
from dinfer.run.kept import KeptKv, kept_digests, kept_values
from dinfer.run.report import Done, Reporter, findings_of_job, kv_finding, parameters
from dinfer.run.state import (
    CANNOT_GO_ON,
    IN_OPS,
    STANDING,
    RunState,
    Standing,
    State,
    last_op_text,
    nonfinite_marks,
)
from dinfer.run.stepper import NoProgress
from dinfer.saved.bisect.collect import Collected, collect
from dinfer.saved.format import SavedError
from dinfer.saved.replay.record import Own, RankRecord, check_rank, received_by, record_of
from dinfer.saved.write import Content, check_free, chosen_layers, write
from dinfer.severity import Severity
from dinfer.trace.findings import Findings, KvFinding, RankFinding, with_findings
from dinfer.verdict.kept import kept_waits

WAIT_S = 0.2

ANSWER_S = 5.0
"""for a rank of a run that has failed or hangs to show that it can be asked"""


@dataclass
class RunRecorder:
    """Reads the other parts of a run. `look()` takes in news of the ranks."""

    state: RunState
    health: Health
    breakpoints: BreakpointTable
    faults: Armed
    events: RunEvents
    inspector: RunInspector
    look: Callable[[], None]
    written: WrittenFiles = field(default_factory=WrittenFiles)
    last: Standing | None = None
    """of a run that is over: where it stood before"""

    def standing(self) -> Standing:
        """The run at this moment; returns at once."""
        state = self.state
        with state.ranks.changed:
            known = state.ranks.ranks
            silent = state.ranks.silent() if state.silence else []
            now, reason = state.decide()
            return Standing(
                state.stands(),
                now,
                reason,
                decoded=len(state.tokens),
                text=state.text,
                devices=tuple(state.devices),
                alive=tuple(not one.gone and rank not in silent for rank, one in enumerate(known)),
                last_call=state.last_call,
                faults=tuple(map(str, self.faults)),
                marks=(*self.faults.marks(), *state.marks, *nonfinite_marks(state.nonfinite.blocks)),
                memory=tuple(one.memory for one in known),
                tokens=tuple(one.decoded for one in known),
                verdict=str(state.hang_now or ""),
                device_memory=tuple(one.device_memory for one in known),
                took=self._took(),
                nonfinite=state.nonfinite.text,
                over=state.closed,
                playing=state.playing,
                remedy=state.remedy,
                severity=state.gravity(),
                begun=state.begun,
            )

    def _took(self) -> tuple[str, ...]:
        """See `Standing.took`. Lanes of threads know of a GPU's op only when it was launched."""
        state = self.state
        if state.devices[0] != "cpu" and not state.job.config.uses_streams:
            return ()
        stands = zip(state.plan.lanes, state.stands(), state.ranks.ranks, strict=False)
        return tuple(last_op_text(lanes, stand, known.events) for lanes, stand, known in stands)

    # -- a report

    def report(self, path: str | Path, reporter: Reporter, *, prompt: bool, environment: bool) -> Path:
        """See `Run.report`."""
        target = Path(path).expanduser()
        check_report(target)  # before the run is waited for
        self._until_it_stands()
        found = self.findings(reporter, prompt=prompt, environment=environment)
        made = reporter.write(with_findings(self.events.trace(), found), self.written.place_for(target))
        self.written.add(target, made)
        return made

    def findings(
        self, reporter: Reporter | None, *, prompt: bool = False, environment: bool = False
    ) -> Findings:
        """What is known of the run now, besides its events."""
        standing, state, breakpoints = self.last_standing(), self.state, self.breakpoints.view
        faults, stops = [one.fault.call for one in self.faults], [one.call for one in breakpoints]
        done = Done(faults, stops, len(state.tokens), edited=bool(state.edited))
        digests = self._digests()
        ranks = tuple(
            RankFinding(
                rank=rank,
                device=state.devices[rank],
                threads=state.job.config.threads,
                kv_sha256=digests[rank],
                tokens=tuple(state.by_rank[rank]) if rank in state.by_rank else None,
                error=known.error.traceback if known.error else "",
            )
            for rank, known in enumerate(state.ranks.ranks)
        )
        return replace(
            findings_of_job(state.job, done, prompt=prompt),
            made=time.strftime("%Y-%m-%d %H:%M"),
            state=str(standing.state),
            failure=standing.message if standing.state.severity > Severity.NOTE else "",
            remedy=standing.remedy,
            positions=tuple(stand.positions for stand in standing.stands),
            ranks=ranks,
            message=standing.message,
            breakpoints=tuple(map(str, breakpoints)),
            hits=tuple(state.story),
            kv=self._kv_finding(labels=prompt),
            faults=standing.faults,
            edited=tuple(state.edited),
            corrupt=tuple(map(str, state.corrupt)),
            nonfinite=state.nonfinite.text,
            marks=tuple((*mark[:3], mark.kind, mark.text) for mark in standing.marks),
            log=tuple(reporter.log) if reporter else (),
            others=tuple(reporter.others()) if reporter else (),
            text=state.text if prompt else None,
            chunk_texts=tuple(self.inspector.chunk_labels()) if prompt else (),
            environment=dict(sorted(os.environ.items())) if environment else None,
            waits=kept_waits(self.health.verdict()) if standing.state in CANNOT_GO_ON else None,
        )

    def _kv_finding(self, *, labels: bool) -> KvFinding | None:
        """None where nothing can be compared or ranks do not answer: the report says so. `labels`: with the text of
        tokens."""
        with suppress(RankFailed, RankRefused, TimeoutError, PlanError):
            if self.state.now in STANDING or self.inspector.kept:
                now = self.inspector.source()
                return kv_finding(now if labels else without_texts(now))
        return None

    def _digests(self) -> list[str]:
        """The SHA-256 of each rank's KV; empty where prefill is not done or ranks do not answer: the report says so."""
        with suppress(RankFailed, RankRefused, TimeoutError):
            if self.last_standing().state == State.DONE:
                return self.inspector.sha256()
        return [""] * self.state.plan.world_size

    def _until_it_stands(self) -> None:
        """Wait until the run stands still and is not played, has failed or hangs."""
        while (self.state.playing or self.state.now in IN_OPS) and not self.state.silence:
            try:
                self.health.check()
            except (RankFailed, NoProgress):
                return
            with self.state.ranks.changed:
                self.state.ranks.changed.wait(WAIT_S)
            self.look()  # without the lock: it may wait for a thread that moves the run, and that for news of ranks

    # -- a folder

    def save(
        self,
        folder: str | Path,
        reporter: Reporter | None,
        *,
        kv: bool | Sequence[int],
        hidden: bool,
        prompt: bool,
    ) -> Path:
        """See `Run.save`."""
        layers = chosen_layers(kv, self.state.plan.shape.layers)
        check_free(Path(folder).expanduser().resolve())
        if self.inspector.kept:
            content = self._kept_content(self.inspector.kept.source, reporter, kv, layers, prompt=prompt)
        else:
            source, ranks = self._last_source(), self.reachable()
            if not ranks:  # in decode, a rank that waits for another does not answer
                layers, hidden = (), False
            has_own = hidden and bool(self.state.stands())
            own = {rank: self._own(source, rank) for rank in ranks} if has_own else {}
            content = self._content(source, ranks, reporter, layers, prompt=prompt, hidden=hidden, own=own)
        made = write(content, self.written.place_for(folder))
        self.written.add(folder, made)
        return made

    def _kept_content(
        self,
        source: Source,
        reporter: Reporter | None,
        kv: bool | Sequence[int],
        layers: tuple[int, ...],
        *,
        prompt: bool,
    ) -> Content:
        """What to save of a run that is over. Raises RunOver for layers in a list whose values were not kept."""
        kept = tuple(layer for layer in layers if source.has_values(layer))
        if kept != layers and not isinstance(kv, bool):
            raise RunOver(
                "this run is over, and of its KV only digests were kept: save it with kv=False, or keep values by "
                "session.prefill(…, keep=True)."
            )
        lacks = ["hidden states"] + ["values of KV"] * (kept != layers)
        print(f"dinfer: this run is over: it is saved without {' and '.join(lacks)}, which were not kept")
        return self._content(source, tuple(source.ranks), reporter, kept, prompt=prompt)

    def _content(
        self,
        source: Source,
        ranks: tuple[int, ...],
        reporter: Reporter | None,
        layers: tuple[int, ...],
        *,
        prompt: bool = False,
        hidden: bool = False,
        own: Mapping[int, Own] | None = None,
    ) -> Content:
        """What to save: see `Content`."""
        job, state, standing = self.state.job, self.state, self.last_standing()
        evidence = self.health.evidence()
        trace = with_findings(self.events.trace(), self.findings(reporter, prompt=prompt))
        description = {
            "made": time.strftime("%Y-%m-%d %H:%M"),
            "state": str(standing.state),
            "positions": [list(stand.positions) for stand in standing.stands],
            "edited": list(state.edited),
            "faults": list(standing.faults),
            "parameters": parameters(job.config),
            "checkpoint": {"path": str(job.spec.path), "fingerprint": job.spec.fingerprint},
        }
        return Content(source, ranks, trace, evidence, description, layers, hidden, prompt, own or {})

    # -- what is left of a run that is over

    def last_standing(self) -> Standing:
        """The run at this moment or, once it is over, before it was."""
        return self.last or self.standing()

    def keep(self, reporter: Reporter | None, *, values: bool, patient: bool) -> None:
        """The run is about to be over: gather what it answers from afterwards, as far as its ranks answer. `patient`:
        also of a run that hangs or has failed, whose ranks may take seconds to show that they do not."""
        last = self.standing()
        self.events.wait()
        has_begun = bool(last.stands) and last.state not in (State.TAKEN_OVER, State.CLOSED)
        if has_begun and (patient or last.state in STANDING):
            with suppress(RankFailed, RankRefused, NoProgress, TimeoutError):
                if ranks := self.reachable():
                    source = self.inspector.ending()
                    self.inspector.kept = kept_digests(source, ranks)
                    if values and (kept := self._kept_values(source, ranks, reporter)):
                        self.inspector.kept = kept
        self.last = last

    def _kept_values(self, source: Live, ranks: tuple[int, ...], reporter: Reporter | None) -> KeptKv | None:
        """None where the disk is full or a rank does not answer; a line says so."""
        layers = tuple(range(self.state.plan.shape.layers))
        try:
            sha256 = self.inspector.sha256() if self.state.now == State.DONE else []
            kept = kept_values(self._content(source, ranks, reporter, layers), self.inspector.name)
        except (
            OSError,
            SavedError,
            RankFailed,
            RankRefused,
            NoProgress,
        ) as error:  # TimeoutError is an OSError
            print(f"dinfer: the values of {self.inspector.name} could not be kept: {error}")
            return None
        return kept._replace(sha256=tuple(sha256))

    def reachable(self) -> tuple[int, ...]:
        """The ranks that can be asked what they hold."""
        asked = self.state.ranks
        silent, exits = asked.silent(), asked.exits()
        there = [rank for rank, code in enumerate(exits) if code is None and rank not in silent]
        if self.state.now in STANDING and len(there) == len(exits):
            return tuple(there)
        return tuple(sorted(answers(asked, dict.fromkeys(there, ListKv()), ANSWER_S)))

    def _last_source(self) -> Live:
        """What the ranks hold once the run stands still, has failed or hangs. Raises RunOver for a run that is over."""
        if self.state.closed:
            raise RunOver(over_text(self.state.closed))
        self._until_it_stands()
        return self.inspector.live()

    # -- a record of one rank

    def record_of(self, rank: int) -> RankRecord:
        """A rank of a run that stands still, has failed or hangs; first waits until it does. Raises PlanError for an
        unknown rank, and RankFailed where it is gone."""
        plan = self.state.plan
        check_rank(rank, plan)
        source = self._last_source()
        stand = self.state.stands()[rank]
        received = received_by(plan, rank, stand.positions)
        blocks = _blocks(source, rank, [(op.chunk, op.layer) for op in received if op.what == "kv"])
        return record_of(
            source,
            rank,
            self._own(source, rank),
            config=self.state.job.config,
            positions=stand.positions,
            hidden=lambda chunk, layer: source.hidden(rank, chunk, layer),
            block=lambda chunk, layer: blocks.get((chunk, layer)),
            failure=self.state.failure,
        )

    def collected(self, rank: int | None) -> Collected:
        """What a bisect compares, of a run that stands still or has failed: see `saved.bisect.collect`."""
        source, last = self._last_source(), self.state.plan.shape.owners[-1]
        final = source.tensor_if_any(last, source.ask([last], ReadFinalHidden())[0])
        return collect(source, partial(self.light_record_of, source), rank, final)

    def light_record_of(self, source: Live, rank: int) -> RankRecord:
        """The record of a rank without the blocks that it received."""
        return record_of(
            source,
            rank,
            self._own(source, rank),
            config=self.state.job.config,
            positions=self.state.stands()[rank].positions,
            hidden=lambda chunk, layer: source.hidden(rank, chunk, layer),
            block=lambda *_: None,
            failure=self.state.failure,
        )

    def _own(self, source: Live, rank: int) -> Own:
        """What only the rank itself knows of its part of the run."""
        stand = self.state.stands()[rank]
        has_final = any(op.what == "final" for op in received_by(self.state.plan, rank, stand.positions))
        notes = source.ask([rank], ReadNotes())[0]
        return Own(
            device=self.state.devices[rank],
            tokens=notes.tokens,
            begun=tuple(stand.started),
            final=source.tensors([rank], ReadFinalHidden())[0] if has_final else None,
            edits=_edits(source, rank, notes.edits),
            faults=tuple(
                one.fault
                for one in self.faults
                if rank in [by for by, _, _ in one.strikes] and one.fault.kind not in SLOW
            ),
        )


def _blocks(source: Live, rank: int, keys: list[BlockKey]) -> dict[BlockKey, Tensor]:
    """The KV of these blocks, by one request for each layer."""
    chunks, found = source.subject.plan.shape.chunks, dict[BlockKey, Tensor]()
    for layer in sorted({layer for _, layer in keys}):
        here = tuple(chunk for chunk, of in sorted(keys) if of == layer)
        rows = source.tensors([rank], ReadBlocks(layer, here))[0]
        pieces = torch.split(rows, [len(chunks[chunk]) for chunk in here])
        found |= {(chunk, layer): piece for chunk, piece in zip(here, pieces, strict=True)}
    return found


def _edits(source: Live, rank: int, edits: Sequence[EditedBlocks]) -> tuple[Edit, ...]:
    def tensors(
        number: int, what: Literal["kv", "hidden"], keys: Sequence[BlockKey]
    ) -> dict[BlockKey, Tensor]:
        return {key: source.tensors([rank], ReadEdit(number, what, *key))[0] for key in keys}

    return tuple(
        Edit(one.positions, tensors(n, "kv", one.kv), tensors(n, "hidden", one.hidden))
        for n, one in enumerate(edits)
    )


def without_texts(source: Source) -> Source:
    """The same KV, without the text of its tokens."""
    found = copy(source)
    found.subject = replace(source.subject, texts=())
    return found
