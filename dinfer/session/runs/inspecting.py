"""Inspecting: what a run's ranks hold and compute: KV, hidden states, attention. Nothing here moves or changes it."""

from collections.abc import Sequence
from functools import cached_property

import torch

from dinfer.model.fingerprint import fingerprint
from dinfer.model.text import texts_of
from dinfer.plan.partition import within
from dinfer.session.blame import silent_text
from dinfer.session.kv.difference import Diff
from dinfer.session.kv.line import Line
from dinfer.session.kv.live import Live
from dinfer.session.kv.sides import Selection
from dinfer.session.kv.source import Subject
from dinfer.session.kv.states import Attention, Hidden, attention_of, hidden_of
from dinfer.session.kv.view import KV, kv_of
from dinfer.session.runs.fleet import RankFailed
from dinfer.session.runs.holding import Holding
from dinfer.verdict.words import at_text


class Inspecting(Holding):
    """Of one run, also one that has failed, as far as its ranks live."""

    def kv(self, *, layer: int | None = None, chunk: int | None = None, rank: int | None = None) -> KV:
        """The KV that the ranks hold, of a layer, a chunk, a rank, each None for all; first waits until the run stands.

        Shown, it says who holds what, and of one layer each head in a few numbers. `.k[head, tokens]` and `.v[head,
        tokens]` fetch values, [heads, tokens, head_dim], indexed as a tensor is; `.diff()` finds where ranks differ.
        Raises PlanError for what there is not, or not yet.
        """
        with self.hold():
            return kv_of(
                self.source, layer=layer, chunk=chunk, rank=rank, note=self._compared, hold=self.hold
            )

    def hidden(self, *, chunk: int, layer: int) -> Hidden:
        """The hidden state of a chunk before a layer, or after the last (`layer` is then how many there are).

        It is that of the rank that owns the layer, which computes it anew where it is not at hand. `[tokens, dims]`
        fetches values. Raises PlanError for what there is not, or not yet.
        """
        with self.hold():
            return hidden_of(self.source, chunk, layer, self.hold)

    def attention(self, *, layer: int, chunk: int, head: int | None = None) -> Attention:
        """What a chunk's tokens attend to in a layer, over themselves and earlier ones: computed anew on the rank that
        owns the layer, from its hidden state and the KV that is there. Raises PlanError."""
        if head is not None:
            within("head", head, self.job.spec.heads)
        with self.hold():
            return attention_of(self.source, layer, chunk, head)

    def source(self) -> Live:
        """What the ranks hold just now, once the run stands. Raises RuntimeError for a run that is over."""
        self._settle()
        return self._live()

    def _live(self) -> Live:
        """The same, also of a run that moves or has failed: as far as its ranks answer."""
        return Live(self._subject(), Line(self._line, self._check_there))

    def _compared(self, found: Diff, chosen: Selection) -> None:
        self._marks.note_diff(found, chosen)
        self.tell()

    def _subject(self) -> Subject:
        spec, dtype = self.job.spec, self.config.dtype
        ids = (*self.job.ids, *self.tokens)
        return Subject(
            name="this run",
            standing=self._standing_texts(),
            plan=self.plan,
            ids=ids,
            texts=self._texts(ids),
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            dtype=getattr(torch, spec.dtype if dtype == "auto" else dtype),
            checkpoint=self._fingerprint,
        )

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.job.spec)

    @cached_property
    def _known_texts(self) -> dict[tuple[int, ...], tuple[str, ...]]:
        return {}

    def _texts(self, ids: tuple[int, ...]) -> tuple[str, ...]:
        """Of each token; what was made last is kept."""
        if ids not in self._known_texts:
            self._known_texts.clear()
            ranges = [range(n, n + 1) for n in range(len(ids))]
            self._known_texts[ids] = tuple(texts_of(self._tokenizer, ids, ranges))
        return self._known_texts[ids]

    def _standing_texts(self) -> tuple[str, ...]:
        stands, lanes = self.standing().stands, self.plan.lanes
        return tuple(
            at_text(lanes[rank], stand.positions)
            if any(at < len(lane.ops) for lane, at in zip(lanes[rank], stand.positions, strict=True))
            else ""
            for rank, stand in enumerate(stands)
        )

    def _check_there(self, ranks: Sequence[int]) -> None:
        """Raises RankFailed where one of these cannot answer, RunOver where the run is about to be over."""
        self.check_looking()
        exits = self._line.exits()
        gone = [rank for rank in ranks if exits[rank] is not None]
        silent = [silent_text(self.plan, r, self._line.ranks[r]) for r in self._line.silent() if r in ranks]
        if gone or silent:
            lost = [f"rank {rank} is gone: its KV is lost" for rank in gone]
            raise RankFailed("\n".join([*lost, *silent]))
