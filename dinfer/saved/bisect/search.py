"""Search: the first part with which a run's answer turns from another's into its own, by halving.

A probe keeps the run as it was up to some part and computes all that follows again. Before the part that is at fault
this gives the other's answer, and from it on the run's own: so the fault is found in as many probes as the number of
parts that differ has binary digits. That holds for one cause; what was found is then replaced by the other's, alone,
and the result says whether that is enough.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from time import perf_counter
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from dinfer.codec.choice import Codec
from dinfer.display import listed
from dinfer.errors import excerpt
from dinfer.kv.diff import check_alike
from dinfer.kv.source import Source
from dinfer.model.decoder import Decoder
from dinfer.model.kernels.token_graph import NO_TOKEN
from dinfer.model.sampling import Sampler, Sampling
from dinfer.model.text import load_tokenizer
from dinfer.model.tolerance import tolerance
from dinfer.plan.ops import PlanError
from dinfer.progress import progress_bar
from dinfer.saved.bisect.collect import Collected, reference_parts
from dinfer.saved.bisect.parts import RunPart, RunParts, same
from dinfer.saved.bisect.rerun import RerunAnswer, Reruns, RerunState
from dinfer.saved.bisect.result import REFERENCE, AnswerFigures, Bisection, BisectStep, place_text
from dinfer.saved.replay.record import RankRecord, RecordError
from dinfer.saved.replay.weights import decoder_of

NEW_TOKENS = 8
"""how many new tokens are compared, unless the runs have made more"""

MOST_TOKENS = 64

MEASURES = ("tokens", "logits", "hidden")

BAR_S = 1.0


@runtime_checkable
class Bisectable(Protocol):
    """A run, live or saved, whose parts can be had."""

    def source(self) -> Source: ...

    def collected(self, rank: int | None = None) -> Collected:
        """Its parts, as one rank holds them or as all do: see `collect`."""


def bisect_run(
    run: Bisectable,
    against: "str | Bisectable",
    *,
    rank: int | None,
    what: str | None,
    model_path: str,
    device: str,
    decoder: Decoder | None,
) -> Bisection:
    """See `Run.bisect`."""
    if against != REFERENCE and not isinstance(against, Bisectable):
        raise PlanError(
            f'against is {excerpt(against)}; it must be "reference", or another run, live or saved.'
        )
    if what not in (None, *MEASURES):
        raise PlanError(
            f"what is {what!r}; it must be one of {', '.join(MEASURES)}, or None for the first that differs."
        )
    if not isinstance(against, str):
        check_alike(run.source().subject, against.source().subject)
    ranks = [(parts, record) for parts, record in run.collected(rank).ranks if record is not None]
    if not ranks:
        raise RecordError(
            f"what had entered the ranks of {run.source().subject.name} was not kept, so it can be compared with, but "
            "not bisected: bisect a run before the next prefill, or save it with hidden=True."
        )
    theirs, other = (None, None) if isinstance(against, str) else against.collected().ranks[0]
    mine, record = ranks[0]
    codecs = (record.config.codec, "none" if isinstance(against, str) else against.source().subject.codec)
    if lossy := [codec for codec in codecs if Codec.of(codec).is_lossy]:
        raise PlanError(
            f"codec {lossy[0]} changes the KV between prefill and decode, so blocks do not follow from one another: "
            'bisect runs with codec="none". run.compare("reference") says what a codec has changed.'
        )
    model = decoder_of(record, model_path, device, decoder)
    with _threads(record.config.threads):
        if theirs is None:
            chunks = len(mine.plan.shape.chunks)
            with progress_bar(total=chunks, desc="bisect: reference", unit=" chunks", delay=BAR_S) as bar:
                theirs = reference_parts(model, record.ids, mine, lambda _: bar.update())
        is_like = theirs.plan.shape.chunks == mine.plan.shape.chunks
        theirs = replace(theirs, copies={}, hidden=theirs.hidden if is_like else {})
        exact = is_like and _repeats(record, model) and (other is None or _repeats(other, model))
        exact = exact and (other is None or other.config.threads == record.config.threads)
        found = [Search(parts, theirs, one, model, exact=exact).run(what) for parts, one in ranks]
    wrong = [one for one in found if one.parts]
    first = min(wrong, key=lambda one: one.parts[0][:2], default=found[0])
    others = [
        f"run.bisect(rank={parts.rank})" for (parts, _), one in zip(ranks, found, strict=True) if one in wrong
    ]
    if len(wrong) < 2:
        return first
    return replace(
        first, remarks=(*first.remarks, f"Ranks do not give one wrong answer: see {listed(others)}.")
    )


def _repeats(record: RankRecord, decoder: Decoder) -> bool:
    """Whether what this decoder computes here equals bit for bit what that rank computed."""
    return record.device.partition(":")[0] == decoder.device.type and not record.config.wants_graphs


def reference_block(record: RankRecord, source: str, layer: int, rows: range) -> Tensor:
    """A block as transformers' own forward makes it, [tokens, 2, kv_heads, head_dim]. `record`: of a rank of the run,
    in whose chunks it is fed; `source`: what the user asked for. Raises PlanError for anything but the reference."""
    if source != REFERENCE:
        raise PlanError(f'source is {source!r}; it must be "reference", or another run, live or saved.')
    with _threads(record.config.threads):
        run = RunParts(name="", plan=record.plan, tokens=(), rank=record.rank, owned=())
        made = reference_parts(decoder_of(record), record.ids, run, lambda _: None)
    return made.owned[layer][rows.start : rows.stop]


class Search:
    """One bisect. `exact`: what is computed again here equals bit for bit what ranks compute."""

    def __init__(
        self, mine: RunParts, theirs: RunParts, record: RankRecord, decoder: Decoder, *, exact: bool
    ) -> None:
        config, room = record.config, max(NEW_TOKENS, len(mine.tokens), len(theirs.tokens))
        sampler = Sampler(Sampling(config.temperature, config.top_k, config.top_p, config.seed))
        self._mine, self._theirs, self._record, self._exact = mine, theirs, record, exact
        self._decoder, self._tokenizer = decoder, load_tokenizer(decoder.spec.path)
        self._reruns = Reruns(decoder, record.ids, mine, theirs, sampler, min(room, MOST_TOKENS))
        self._parts = self._reruns.parts
        self._differing = [n for n, part in enumerate(self._parts) if not self._is_same(part)]
        self._steps: list[BisectStep] = []
        self._what, self._count, self._bound = "tokens", 1, 0.0

    def run(self, what: str | None) -> Bisection:
        """Find the part. `what`: in what to compare the answers; None: tokens if they differ, else logits."""
        reruns, target = self._reruns, self._reruns.target
        whole = len(self._parts)
        free = reruns.answer(reruns.state(whole))
        forced = reruns.answer(reruns.state(whole), target.tokens)
        self._choose(forced, target, what)
        before, wanted = self._figures(free, forced), self._figures(target, target)
        nothing = Bisection(
            against=self._theirs.name,
            what=self._what,
            before=before,
            after=before,
            wanted=wanted,
            first=self._parts[self._differing[0]] if self._differing else None,
            differing=len(self._differing),
            compared=whole,
            remarks=self._remarks(free),
        )
        if self._agrees(forced) or not self._differing:
            return nothing
        number, state = self._first_wrong()
        found, alone, mended, after = self._repaired(number)
        also, steps = self._next_cause(found, state), tuple(self._steps)
        return replace(nothing, after=after, parts=found, alone=alone, mended=mended, also=also, steps=steps)

    # -- what counts as the same answer

    def _choose(self, mine: RerunAnswer, target: RerunAnswer, what: str | None) -> None:
        """In what the answers are compared, of how many new tokens, and how far they may differ."""
        pairs = enumerate(zip(mine.tokens, target.tokens, strict=True), 1)
        parted = next((n for n, (a, b) in pairs if a != b), None)
        self._what = what or ("tokens" if parted else "logits")
        self._count = len(target.tokens)
        if self._what == "tokens":
            self._count = parted or self._count
            return
        if not self._exact:
            shape, dtype = self._mine.plan.shape, self._record.dtype
            width = max(self._decoder.spec.hidden_size, self._decoder.spec.intermediate_size, shape.tokens)
            largest = max(float(one.abs().max()) for one in getattr(target, self._what))
            self._bound = largest * tolerance(dtype, dtype, shape.layers, width)
        steps = range(1, self._count + 1)
        self._count = next(
            (n for n in steps if not mine.error(target, self._what, n) <= self._bound), self._count
        )

    def _agrees(self, answer: RerunAnswer) -> bool:
        target = self._reruns.target
        if self._what == "tokens":
            return answer.tokens[: self._count] == target.tokens[: self._count]
        return answer.error(target, self._what, self._count) <= self._bound

    def _figures(self, free: RerunAnswer, forced: RerunAnswer) -> AnswerFigures:
        chosen = [token for token in free.tokens if token != NO_TOKEN]
        text = self._tokenizer.decode(chosen, skip_special_tokens=True) if self._tokenizer else ""
        error = forced.error(self._reruns.target, "logits", self._count)
        return AnswerFigures(free.tokens, text, forced.tokens[self._count - 1], error)

    def _remarks(self, answer: RerunAnswer) -> tuple[str, ...]:
        """Where the run's own new tokens are not what comes of its KV."""
        made = self._record.tokens
        pairs = enumerate(zip(made, answer.tokens, strict=False))
        at = next((n for n, (a, b) in pairs if a != b), None)
        if at is None:
            return ()
        return (
            f"rank {self._mine.rank} itself made {made[at]} as new token {at}, and its KV gives {answer.tokens[at]}: "
            "something is wrong in its decode, or the KV has changed since.",
        )

    # -- probes

    def _first_wrong(self) -> tuple[int, RerunState | None]:
        """The number of the first part with which the answer turns wrong, and what follows from it, if that was
        computed. The first that differs is tried first: mostly it is the one."""
        right, wrong, middle = -1, len(self._differing) - 1, 0
        found: RerunState | None = None
        most = 1 + math.ceil(math.log2(len(self._differing)))
        with progress_bar(total=most, desc="bisect", unit=" re-runs", delay=BAR_S) as bar:
            while wrong - right > 1:
                number = self._differing[middle]
                agrees, state = self._probe(f"up to {self._parts[number]}", number + 1)
                if agrees:
                    right = middle
                else:
                    wrong, found = middle, state
                middle = (right + wrong) // 2
                bar.update()
            bar.total = bar.n  # the first that differs was the one
        return self._differing[wrong], found

    def _probe(self, kept: str, count: int, replaced: Sequence[RunPart] = ()) -> tuple[bool, RerunState]:
        """Whether the answer agrees with the run's first `count` parts as they were, and those `replaced`."""
        began, target = perf_counter(), self._reruns.target
        state = self._reruns.state(count, set(replaced))
        answer = self._reruns.answer(state, target.tokens[: self._count])
        agrees, error = self._agrees(answer), answer.error(target, "logits", self._count)
        pairs = zip(answer.tokens, target.tokens, strict=False)
        token = next((mine for mine, theirs in pairs if mine != theirs), answer.tokens[-1])
        self._steps.append(BisectStep(kept, agrees, token, error, perf_counter() - began))
        return agrees, state

    def _repaired(self, number: int) -> tuple[tuple[RunPart, ...], bool, bool, AnswerFigures]:
        """What has to be replaced by the other's so that the answer agrees; whether that is enough alone, or with what
        follows computed again; and the answer then. K and V of one block come from the same place: if K alone is not
        enough, both are tried."""
        part = self._parts[number]
        sibling = self._numbers.get(part._replace(name="V"), -1) if part.name == "K" else -1
        last = sibling if sibling in self._differing else number
        choices = [(part,), (part, self._parts[sibling])][: 1 + (last != number)]
        for chosen in choices:
            agrees, state = self._probe(f"all but {place_text(chosen)}", len(self._parts), chosen)
            if agrees:
                return chosen, True, True, self._after(state)
        for chosen in choices:
            agrees, state = self._probe(
                f"up to {self._parts[last]}, but {place_text(chosen)}", last + 1, chosen
            )
            if agrees:
                return chosen, False, True, self._after(state)
        return (part,), False, False, self._after(state)

    def _after(self, state: RerunState) -> AnswerFigures:
        answer = self._reruns.answer
        return self._figures(answer(state), answer(state, self._reruns.target.tokens))

    def _next_cause(self, found: Sequence[RunPart], state: RerunState | None) -> RunPart | None:
        """The first part behind those found that neither follows from what is before it nor is the other's. Where
        rounding differs anyway, nothing can be said of that. `state`: what follows from the first of them."""
        if not self._exact:
            return None
        last = self._numbers[found[-1]]
        if len(found) > 1 or state is None:
            state = self._reruns.state(last + 1)
        for n in self._differing:
            part, rows = self._parts[n], self._reruns.rows(self._parts[n])
            if n > last and not same(self._mine.get(part, rows), state.get(part, rows)):
                return part
        return None

    @cached_property
    def _numbers(self) -> dict[RunPart, int]:
        return {part: n for n, part in enumerate(self._parts)}

    def _is_same(self, part: RunPart) -> bool:
        rows = self._reruns.rows(part)
        return same(self._mine.get(part, rows), self._theirs.get(part, rows))


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Compute on as many CPU threads as the rank did."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
