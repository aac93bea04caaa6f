"""Inspecting: what a run's ranks hold and compute: KV, hidden states, attention. Nothing here moves or changes it."""

import contextlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from dinfer.cluster.kv import Live, RankClient
from dinfer.cluster.lease import RunOver
from dinfer.kv.difference import Diff
from dinfer.kv.hidden import AttentionWeights, Hidden, attention_of, hidden_of
from dinfer.kv.reference.comparison import Comparison
from dinfer.kv.reference.judge import ReferenceCase
from dinfer.kv.reference.reports import Examined, HeldDigests, ToleranceMeasure, holds_most, to_be_examined
from dinfer.kv.source import Selection, Subject
from dinfer.kv.view import KV, kv_of
from dinfer.messages import Message
from dinfer.model.checkpoint import fingerprint
from dinfer.model.text import texts_of
from dinfer.plan.ops import PlanError
from dinfer.plan.partition import within
from dinfer.results import Where
from dinfer.run.action import action
from dinfer.run.failure import silent_text
from dinfer.run.fleet import RankFailed
from dinfer.run.state import HoldingRun
from dinfer.verdict.words import at_text


class Inspecting(HoldingRun):
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

    def attention(self, *, layer: int, chunk: int, head: int | None = None) -> AttentionWeights:
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
        return Live(self._subject(), RankClient(self._line, self._check_there))

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


DTYPES = ("float32", "bfloat16", "float16")


class Comparing(HoldingRun):
    """Part of a run."""

    def wait(self, timeout: float | None = None) -> Where:
        """Wait until the run stands."""
        raise NotImplementedError

    @action
    def compare(
        self, what: str = "reference", *, chunked: bool = True, dtype: str | None = None
    ) -> Comparison:
        """Compare what the ranks hold with transformers' own forward of the same checkpoint, at the ranks' thread
        count: K, V and hidden states of every layer and chunk, and every new token fed as the run fed it.

        As it is, in the run's chunks and dtype, every bit must be the same (on a CPU). `chunked=False` feeds the prompt
        at once, and `dtype` has the checkpoint loaded in another one; then differences up to a stated tolerance are
        rounding (`dinfer.model.tolerance`). One rank runs the reference; others only if they hold other bytes. Hidden
        states that no rank keeps are computed anew from the run's KV, in memory of their own. A run that stands
        half-way is compared as far as it has come. Raises PlanError where nothing is computed yet or a word is not
        known, and RankRefused where a second KV, or the weights in `dtype`, do not fit into memory.
        """
        _check(what, dtype)
        self.wait()
        with self.hold():  # it may have been sent on since
            self.check()
            helds = self._held()
            own = helds[0].dtype
            wanted = dtype or own
            examined = self._examined(helds, chunked=chunked, dtype=wanted)
        spec, shape = self.job.spec, self.plan.shape
        width = max(spec.hidden_size, spec.intermediate_size, shape.tokens)
        case = ReferenceCase(
            self.plan, ToleranceMeasure(examined[0].exact, own, wanted, width), helds, examined
        )
        return Comparison(case, chunked=chunked, edited=self.edited, texts=self._token_texts(helds))

    def _held(self) -> list[HeldDigests]:
        said = self._pages({rank: {"do": "reference_held"} for rank in range(self.world_size)})
        helds = [HeldDigests.of(rank, said[rank]) for rank in range(self.world_size)]
        if not any(one.now for one in helds):
            raise PlanError(
                "nothing to compare: prefill has not begun, no block is computed yet. run.step(), run.run_to(…) or "
                "run.resume() first."
            )
        return helds

    def _examined(self, helds: list[HeldDigests], *, chunked: bool, dtype: str) -> list[Examined]:
        """By one rank, and by those that hold other bytes than it."""
        chunks = 1 + max(
            chunk for one in helds for chunk, _ in one.now if chunk < len(self.plan.shape.chunks)
        )
        message = {"do": "reference", "chunked": chunked, "dtype": dtype, "chunks": chunks}
        rank = holds_most(helds)
        first = Examined.of(rank, self._pages({rank: message})[rank])
        others = self._pages(dict.fromkeys(to_be_examined(helds, first), message))
        return [first, *(Examined.of(other, said) for other, said in others.items())]

    def _pages(self, requests: dict[int, Message]) -> dict[int, Message]:
        """The answers, each with all its items; however long they take, as long as the ranks live."""
        try:
            answers = self._line.ask(requests, float("inf"), self._check_goes_on)
        except (KeyboardInterrupt, RunOver):
            with contextlib.suppress(Exception):
                self._ask_all("reference_stop")
            raise
        for rank, said in answers.items():
            while len(said["items"]) < said["count"]:
                page = {rank: {"do": "reference_page", "start": len(said["items"])}}
                said["items"] += self._line.ask(page, 30.0, self._check_goes_on)[rank]["items"]
        return answers

    def _check_goes_on(self) -> None:
        self.check_looking()
        self.check()

    def _token_texts(self, helds: list[HeldDigests]) -> list[str]:
        ids = [*self.job.ids, *max((one.tokens for one in helds), key=len)]
        return texts_of(self._tokenizer, ids, [range(at, at + 1) for at in range(len(ids))])


def _check(what: Any, dtype: Any) -> None:
    if what != "reference":
        raise PlanError(f'{what!r} cannot be compared with; run.compare("reference") is what there is.')
    if dtype is not None and dtype not in DTYPES:
        raise PlanError(
            f"dtype {dtype!r} is not known; give one of {', '.join(DTYPES)}, or none for the run's own."
        )
