"""What a run's ranks hold and compute: KV, hidden states, attention; and their comparison with transformers.

Nothing here moves or changes a run.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import lru_cache
from typing import Any, TypeVar

import torch
from msgspec import convert

from dinfer.cluster.kv import Live
from dinfer.cluster.lease import RunOver
from dinfer.cluster.ranks import RankRefused, RankState
from dinfer.codec.choice import Codec
from dinfer.display import few
from dinfer.errors import excerpt
from dinfer.kv.difference import Diff, loss_text
from dinfer.kv.measure import CellDifference
from dinfer.kv.reference.comparison import Comparison
from dinfer.kv.reference.judge import ReferenceCase
from dinfer.kv.reference.reports import Examined, HeldDigests, ToleranceMeasure, helds_of, to_be_examined
from dinfer.kv.source import Selection, Subject, ViewableSource
from dinfer.kv.view import KV, AttentionWeights, Hidden, attention_of
from dinfer.messages import Answer, Command, DigestHidden, HashKv, MeasureLoss, RunReference, StopReference
from dinfer.model.checkpoint import check_unchanged
from dinfer.model.text import texts_of
from dinfer.plan.ops import NothingYet, PlanError
from dinfer.plan.partition import within
from dinfer.progress import rank_bars
from dinfer.run.action import Actions
from dinfer.run.failure import RankFailed, silent_text
from dinfer.run.kept import KeptKv
from dinfer.run.state import RunState
from dinfer.run.stepper import NoProgress
from dinfer.verdict.where import at_text

ANSWER_S = 30.0

BAR_S = 1.0

A = TypeVar("A", bound=Answer)

DTYPES = ("float32", "bfloat16", "float16")


class RunInspector:
    """Works also on a run that has failed, as far as its ranks answer. `check()` raises where the run cannot go on."""

    def __init__(
        self, state: RunState, actions: Actions, check: Callable[[], None], tokenizer: Any | None
    ) -> None:
        self._job, self._ranks, self._state, self._actions = state.job, state.ranks, state, actions
        self._check, self._tokenizer = check, tokenizer
        self._texts = lru_cache(maxsize=1)(self._token_texts)
        self.kept: KeptKv | None = None
        """of a run that is over: what was kept of its KV"""
        self.name = "this run"
        """what to call it once it is over"""

    def kv(self, *, layer: int | None, chunk: int | None, rank: int | None) -> KV:
        """See `Run.kv`."""
        hold = self.hold
        with hold():
            remark = self._remark
            note = self._compared
            return KV(self.now, layer=layer, chunk=chunk, rank=rank, note=note, remark=remark, hold=hold)

    def _remark(self, chosen: Selection) -> str:
        """What a comparison of ranks does not show: NaN and Inf, and what a lossy codec changes."""
        told = [self._state.nonfinite.in_selection(chosen)]
        codec = self._job.config.codec
        if Codec.of(codec).is_lossy:
            lost = dict[str, CellDifference]()
            with suppress(RankFailed, RankRefused, NoProgress, TimeoutError):
                requests = dict.fromkeys(chosen.ranks, MeasureLoss(chosen.layers, chosen.spans))
                for answer in self._ranks.ask(requests, ANSWER_S, self._check).values():
                    for name, one in convert(answer.loss, tuple[tuple[str, CellDifference], ...]):
                        lost[name] = lost[name].with_(one) if name in lost else one
            told.append(loss_text(codec, lost))
        return "; and ".join(filter(None, told))

    def hidden(self, chunk: int, layer: int) -> Hidden:
        """See `Run.hidden`."""
        with self._actions.hold():
            return Hidden(self.live, chunk, layer, self._actions.hold)

    def attention(self, layer: int, chunk: int, head: int | None) -> AttentionWeights:
        """See `Run.attention`."""
        if head is not None:
            within("head", head, self._job.spec.heads)
        with self._actions.hold():
            return attention_of(self.live, layer, chunk, head)

    def source(self) -> ViewableSource:
        """What the ranks hold, once the run stands still; of a run that is over, what was kept of it. Raises RunOver
        where nothing was."""
        try:
            self._actions.settle()
        except RunOver:
            if not self.kept:
                raise
        return self.now()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """As `Actions.hold`; what was kept of a run that is over holds still by itself."""
        with ExitStack() as held:
            try:
                held.enter_context(self._actions.hold())
            except RunOver:
                if not self.kept:
                    raise
            yield

    def now(self) -> ViewableSource:
        """What the ranks hold now or, of a run that is over, what was kept."""
        return self.kept.source if self.kept else self.live()

    def live(self) -> Live:
        """What the ranks hold now, also of a run that moves or has failed, as far as its ranks answer."""
        return self._live("this run", self._check_ranks)

    def ending(self) -> Live:
        """The same, for whoever ends the run."""
        return self._live(self.name, self._check_alive)

    def _live(self, name: str, check: Callable[[Sequence[int]], None]) -> Live:
        spec, dtype = self._job.spec, self._job.config.dtype
        ids = (*self._job.ids, *self._state.tokens)
        standing = [
            at_text(lanes, stand.positions)
            if any(at < len(lane.ops) for lane, at in zip(lanes, stand.positions, strict=True))
            else ""
            for lanes, stand in zip(self._job.plan.lanes, self._state.stands(), strict=False)
        ]
        subject = Subject(
            name=name,
            standing=tuple(standing),
            plan=self._job.plan,
            ids=ids,
            texts=self._texts(ids),
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            dtype=getattr(torch, spec.dtype if dtype == "auto" else dtype),
            checkpoint=spec.fingerprint,
            codec=self._job.config.codec,
        )
        return Live(subject, self._ranks, check)

    def sha256(self) -> list[str]:
        """See `Run.sha256`."""
        if self.kept and self.kept.sha256:
            return list(self.kept.sha256)
        ranks = range(self._job.plan.world_size)
        command = HashKv(len(self._job.ids))
        answers = self._ranks.ask(dict.fromkeys(ranks, command), ANSWER_S, self._check)
        return [answers[rank].sha256 for rank in ranks]

    def _token_texts(self, ids: tuple[int, ...]) -> tuple[str, ...]:
        return tuple(texts_of(self._tokenizer, ids, [range(n, n + 1) for n in range(len(ids))]))

    def chunk_labels(self) -> list[str]:
        """See `Run.chunk_labels`."""
        return texts_of(self._tokenizer, self._job.ids, self._job.plan.shape.chunks)

    def _compared(self, found: Diff, chosen: Selection) -> None:
        self._state.marks.note_diff(found, chosen)
        self._actions.tell()

    def _check_ranks(self, asked: Sequence[int]) -> None:
        """Raises RankFailed where one of these ranks cannot answer, RunOver while `close()` waits."""
        self._actions.check_looking()
        self._check_alive(asked)

    def _check_alive(self, asked: Sequence[int]) -> None:
        """Raises RankFailed where one of these ranks cannot answer."""
        exits, ranks = self._ranks.exits(), self._ranks.ranks
        lost = [f"rank {rank} is gone: its KV is lost" for rank in asked if exits[rank] is not None]
        silent = [silent_text(self._job.plan, r, ranks[r]) for r in self._ranks.silent() if r in asked]
        if lost or silent:
            raise RankFailed("\n".join(few([*lost, *silent])))

    # -- the reference

    def compare(self, *, chunked: bool | None, dtype: str | None) -> Comparison:
        """See `Run.compare`."""
        with self._actions.hold():
            found = self._compare(chunked=chunked is not False, dtype=dtype)
            if chunked is None and self._job.spec.length_dependent and len(self._job.plan.shape.chunks) > 1:
                found.at_once = self._compare(chunked=False, dtype=dtype)
            return found

    def _compare(self, *, chunked: bool, dtype: str | None) -> Comparison:
        check_unchanged(self._job.spec)  # on a CPU the weights are views of the files
        with self._actions.hold():
            self._check()
            source, ranks = self.live(), range(self._job.plan.world_size)
            hidden = self._reference(dict.fromkeys(ranks, DigestHidden()))
            ids = (*self._job.ids, *max((one.tokens for one in hidden.values()), key=len))
            source.subject = replace(source.subject, ids=ids, texts=self._texts(ids))
            helds = helds_of(source, [hidden[rank] for rank in ranks])
            if not any(one.now for one in helds):
                raise NothingYet(
                    "nothing to compare: prefill has not begun, no block is computed yet. run.step(), run.run_to(…) or "
                    "run.resume() first."
                )
            own = source.subject.dtype_name
            examined = self._examined(helds, chunked=chunked, dtype=dtype or own)
        spec, plan = self._job.spec, self._job.plan
        width = max(spec.hidden_size, spec.intermediate_size, plan.shape.tokens)
        codec = self._job.config.codec
        measure = ToleranceMeasure(examined[0].report.exact, own, dtype or own, width, Codec.of(codec).step)
        return Comparison(
            ReferenceCase(plan, ids[plan.shape.tokens :], measure, helds, examined),
            chunked=chunked,
            edited=self._state.edited,
            texts=source.subject.texts,
            codec=codec,
        )

    def _examined(self, helds: list[HeldDigests], *, chunked: bool, dtype: str) -> list[Examined]:
        """The rank that holds most blocks runs the reference, and so do those that hold other bytes than it."""
        prompt = len(self._job.plan.shape.chunks)
        chunks = 1 + max(chunk for one in helds for chunk, _ in one.now if chunk < prompt)
        command = RunReference(chunked, dtype, chunks)
        rank = max(helds, key=lambda one: (len(one.now), -one.rank)).rank
        first = Examined.of(rank, self._with_progress({rank: command})[rank])
        others = self._with_progress(dict.fromkeys(to_be_examined(helds, first), command))
        return [first, *(Examined.of(other, answer) for other, answer in others.items())]

    def _with_progress(self, requests: Mapping[int, Command[A]]) -> dict[int, A]:
        """As `_reference`, with a bar for each rank, once it takes longer than BAR_S, and a line in views."""
        states = self._ranks.ranks
        for rank in requests:
            states[rank].comparing = None
        options = {"unit": " tokens", "delay": BAR_S}
        before, shown = self._state.replace_message(), ""
        with rank_bars([*requests], lambda rank: states[rank].comparing, ": reference", **options) as show:

            def meanwhile() -> None:
                nonlocal shown
                show()
                if told := [f"rank {r}: {said}" for r in requests if (said := _said(states[r]))]:
                    shown = f"comparing with the reference: {', '.join(told)}"
                    self._state.replace_message(shown)

            try:
                return self._reference(requests, meanwhile)
            finally:
                if self._state.message == shown:  # nothing has been said since
                    self._state.replace_message(*before)

    def _reference(
        self, requests: Mapping[int, Command[A]], meanwhile: Callable[[], None] = lambda: None
    ) -> dict[int, A]:
        """The answers. No time limit: the reference may take long while its rank lives."""

        def check() -> None:
            self._check_reference()
            meanwhile()

        try:
            return self._ranks.ask(requests, float("inf"), check)
        except (KeyboardInterrupt, RunOver):
            self._stop_reference()
            raise

    def _stop_reference(self) -> None:
        """Have the ranks give up the comparison. A rank that cannot be told ends it by itself."""
        ranks = range(self._job.plan.world_size)
        with suppress(RankFailed, RankRefused, NoProgress, TimeoutError):
            self._ranks.ask(dict.fromkeys(ranks, StopReference()), ANSWER_S, self._check)

    def _check_reference(self) -> None:
        self._actions.check_looking()
        self._check()


def _said(state: RankState) -> str:
    """How far the reference on a rank is."""
    found = state.comparing
    return f"{found.done:,} of {found.total:,} tokens" if found else ""


def check_comparable(what: Any, dtype: Any) -> None:
    """Raises PlanError for arguments of `Run.compare` that are not known."""
    if what != "reference":
        raise PlanError(
            f'{excerpt(what)} cannot be compared with: run.compare("reference") compares with transformers, '
            "run.compare(other_run) with another run, such as session.runs[1] or dinfer.open(folder)."
        )
    if dtype is not None and dtype not in DTYPES:
        raise PlanError(
            f"dtype {dtype!r} is not known; give one of {', '.join(DTYPES)}, or none for the run's own."
        )
