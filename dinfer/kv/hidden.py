"""What `run.hidden()` and `run.attention()` return: hidden states before a layer, and attention weights."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dinfer.display import Displayable
from dinfer.kv.measure import FIELDS
from dinfer.kv.source import LiveSource, Subject
from dinfer.kv.view import Hold, check_computed, say_size
from dinfer.plan.ops import PlanError
from dinfer.plan.partition import within

TOP = 5
"""how many keys are shown of a query"""


class Hidden(Displayable):
    """What `run.hidden` returns: the hidden state of a chunk before a layer, [tokens, hidden_size]; indexing fetches it
    to the CPU. `hold` keeps the run from moving while ranks are asked. Raises PlanError if the run has not come to it,
    or has gone back to before it meanwhile."""

    def __init__(self, source: Callable[[], LiveSource], chunk: int, layer: int, hold: Hold) -> None:
        self._source, self.chunk, self.layer, self._hold = source, chunk, layer, hold
        shape = source().subject.plan.shape
        within("chunk", chunk, len(shape.chunks))
        within("layer", layer, shape.layers + 1)
        self.rank = shape.owners[min(layer, shape.layers - 1)]
        self._checked_source()

    @cached_property
    def values(self) -> Tensor:
        """[tokens, hidden_size], on the CPU; fetched once."""
        with self._hold():
            return self._checked_source().hidden(self.rank, self.chunk, self.layer)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def __getitem__(self, index: Any) -> Tensor:
        found: Tensor = self.values[index]
        return found

    def __str__(self) -> str:
        with self._hold():
            source = self._checked_source()
            found = source.hidden_summary(self.rank, self.chunk, self.layer)
        figures = ", ".join(f"{name} {found[name][0][0]:.4g}".replace("-", "−") for name in FIELDS)
        tokens = source.subject.spans[self.chunk]
        return (
            f"hidden c{self.chunk} l{self.layer} on rank {self.rank}: {source.subject.dtype_name}, "
            f"tokens {tokens.start}–{tokens.stop - 1}; {figures}"
        )

    def _checked_source(self) -> LiveSource:
        now = self._source()
        _check_hidden(now, self.rank, self.chunk, self.layer)
        return now


class AttentionWeights(Displayable):
    """The attention weights of a chunk's tokens: `weights`, [heads, queries, keys], on the CPU. The first key is the
    token `first_key`. `heads` are attention heads; several may share one KV head."""

    def __init__(
        self, subject: Subject, layer: int, chunk: int, heads: Sequence[int], weights: Tensor, first_key: int
    ) -> None:
        self._subject, self.layer, self.chunk = subject, layer, chunk
        self.heads, self.weights, self.first_key = tuple(heads), weights, first_key

    def __getitem__(self, index: Any) -> Tensor:
        found: Tensor = self.weights[index]
        return found

    def top(self, token: int, head: int | None = None, n: int = TOP) -> list[tuple[int, str, float]]:
        """The `n` tokens to which a token attends most, as (number, text, weight); of one head, or on average over all
        that were fetched. Raises PlanError for a token of another chunk."""
        rows = self._subject.spans[self.chunk]
        if token not in rows:
            raise PlanError(
                f"token {token} is not in chunk {self.chunk}, which has tokens {rows.start} to {rows.stop - 1}."
            )
        of_query = self.weights[:, token - rows.start].float()
        weights = of_query.mean(0) if head is None else of_query[self.heads.index(head)]
        found = torch.topk(weights, min(n, len(weights)))
        tokens = (self.first_key + found.indices).tolist()
        texts = [self._subject.texts[n] if n < len(self._subject.texts) else "" for n in tokens]
        return list(zip(tokens, texts, found.values.tolist(), strict=True))

    def __str__(self) -> str:
        rows = self._subject.spans[self.chunk]
        which = f"head {self.heads[0]}" if len(self.heads) == 1 else f"{len(self.heads)} heads, on average"
        lines = [
            f"attention of layer {self.layer}, chunk {self.chunk}, {which}; the last tokens attend most to"
        ]
        for token in rows[-TOP:]:
            most = ", ".join(f"{self._name(key)} {weight:.3f}" for key, _, weight in self.top(token))
            lines.append(f"  {self._name(token)}: {most}")
        return "\n".join(lines)

    def _name(self, token: int) -> str:
        text = self._subject.label(token)
        return f"{token} {text!r}" if text else str(token)


def attention_of(
    source: Callable[[], LiveSource], layer: int, chunk: int, head: int | None
) -> AttentionWeights:
    """What `run.attention` returns. Raises PlanError."""
    now = source()
    shape = now.subject.plan.shape
    within("layer", layer, shape.layers)
    within("chunk", chunk, len(shape.chunks))
    rank = shape.owners[layer]
    check_computed(now, chunk, layer, [rank])
    _check_hidden(now, rank, chunk, layer)
    size = len(shape.chunks[chunk]) * shape.chunks[chunk].stop * now.subject.dtype.itemsize
    heads = [] if head is None else [head]
    say_size(size * now.subject.kv_heads * (not heads), "head=0 takes less")
    weights, first_key = now.attention(rank, chunk, layer, heads)
    return AttentionWeights(now.subject, layer, chunk, heads or range(len(weights)), weights, first_key)


def _check_hidden(source: LiveSource, rank: int, chunk: int, layer: int) -> None:
    """Raises PlanError if the rank does not have that hidden state yet."""
    first = source.hidden_first(rank).get(chunk)
    computed = layer == 0 or source.held([rank])[0].spans[layer - 1] > chunk
    if first is None or first > layer or not (first == layer or computed):
        raise PlanError(
            f"the hidden state of chunk {chunk} before layer {layer} is not computed yet; the run stands "
            f"{source.subject.stands}."
        )
