"""The KV that a run's ranks hold now, as a Source."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import safetensors.torch
from torch import Tensor

from dinfer.cluster.ranks import AskableRanks, RankRefused
from dinfer.kv.digests import as_numbers
from dinfer.kv.ledger import BlockKey
from dinfer.kv.source import HeldSpans, LiveSource, Noted, Subject
from dinfer.messages import (
    Answer,
    Command,
    DigestKv,
    DigestRows,
    Figures,
    ListHidden,
    ListKv,
    ReadAttention,
    ReadHidden,
    ReadKvPart,
    ReadMore,
    ReadNotedKv,
    ReadNotedRows,
    ReadRows,
    SummarizeHidden,
    SummarizeKv,
    TensorData,
    size_of,
)

ANSWER_S = 120.0

A = TypeVar("A", bound=Answer)


class Live(LiveSource):
    """The KV of ranks that stand. `check(ranks)` is called while waiting for them; it raises where none can answer."""

    def __init__(self, subject: Subject, asked: AskableRanks, check: Callable[[Sequence[int]], None]) -> None:
        self.subject, self._asked, self._check = subject, asked, check
        self.ranks = range(len(subject.plan.lanes))
        self.bytes_moved = 0

    def ask(self, ranks: Sequence[int], command: Command[A]) -> list[A]:
        """Each rank's answer, in their order. Raises as Ranks.ask does."""
        answers = self._asked.ask(dict.fromkeys(ranks, command), ANSWER_S, lambda: self._check(ranks))
        self.bytes_moved += len(ranks) * size_of(command) + sum(map(size_of, answers.values()))
        return [answers[rank] for rank in ranks]

    def tensors(self, ranks: Sequence[int], command: Command[TensorData]) -> list[Tensor]:
        """Each rank's tensor, on the CPU. Raises RankRefused where a rank has none."""
        answers = self.ask(ranks, command)
        return [self.tensor(rank, answer) for rank, answer in zip(ranks, answers, strict=True)]

    def tensor(self, rank: int, answer: TensorData) -> Tensor:
        """The tensor of an answer, on the CPU, once the rest of its bytes has been fetched. Raises RankRefused."""
        tensor = self.tensor_if_any(rank, answer)
        if tensor is None:
            raise RankRefused(f"rank {rank} has no such tensor.")
        return tensor

    def tensor_if_any(self, rank: int, answer: TensorData) -> Tensor | None:
        """The same; None where the rank has none."""
        data = bytearray(answer.data)
        while len(data) < answer.size:
            data += self.ask([rank], ReadMore(answer.number, len(data)))[0].data
        return safetensors.torch.load(bytes(data)).get("tensor")

    def held(self, ranks: Sequence[int]) -> list[HeldSpans]:
        """Without the rows of new tokens that the run does not count: a decode that has failed leaves them on its
        ranks."""
        spans, prompt = self.subject.spans, self.subject.plan.shape.tokens
        found = list[HeldSpans]()
        for answer in self.ask(ranks, ListKv()):
            uncounted = max(0, answer.new_rows - (spans[-1].stop - prompt))
            found.append(
                HeldSpans(
                    tuple(min(count, len(spans)) for count in answer.spans),
                    tuple(rows - uncounted for rows in answer.rows),
                )
            )
        return found

    def digests(self, ranks: Sequence[int], layers: Sequence[int], spans: Sequence[range]) -> list[Tensor]:
        places = tuple((span.start, span.stop) for span in spans)
        return self.tensors(ranks, DigestKv(tuple(layers), places))

    def noted(self, ranks: Sequence[int], layers: Sequence[int]) -> list[dict[BlockKey, Noted]]:
        answers = self.ask(ranks, ReadNotedKv(tuple(layers)))
        found = list[dict[BlockKey, Noted]]()
        for rank, answer in zip(ranks, answers, strict=True):
            digests = map(as_numbers, self.tensor(rank, answer))
            found.append(
                {
                    (one.chunk, one.layer): Noted(came, one.announced or came, edited=one.edited)
                    for one, came in zip(answer.blocks, digests, strict=True)
                }
            )
        return found

    def noted_rows(self, rank: int, chunk: int, layer: int) -> Tensor | None:
        return self.tensor_if_any(rank, self.ask([rank], ReadNotedRows(chunk, layer))[0])

    def rows(self, rank: int, layer: int, places: range) -> Tensor:
        return self.tensors([rank], DigestRows(layer, places.start, places.stop))[0]

    def values(self, rank: int, layer: int, places: Sequence[int]) -> Tensor:
        return self.tensors([rank], ReadRows(layer, tuple(places)))[0]

    def summary(self, rank: int, layer: int, places: range) -> Figures:
        return self.ask([rank], SummarizeKv(layer, places.start, places.stop))[0].figures

    def part(self, rank: int, layer: int, tensor: int, heads: Sequence[int], places: Sequence[int]) -> Tensor:
        return self.tensors([rank], ReadKvPart(layer, tensor, tuple(heads), tuple(places)))[0]

    # -- what only ranks know

    def hidden_first(self, rank: int) -> dict[int, int]:
        return self.ask([rank], ListHidden())[0].first

    def hidden_summary(self, rank: int, chunk: int, layer: int) -> Figures:
        return self.ask([rank], SummarizeHidden(chunk, layer))[0].figures

    def hidden(self, rank: int, chunk: int, layer: int) -> Tensor:
        return self.tensors([rank], ReadHidden(chunk, layer))[0]

    def attention(self, rank: int, chunk: int, layer: int, heads: Sequence[int]) -> tuple[Tensor, int]:
        answer = self.ask([rank], ReadAttention(chunk, layer, tuple(heads)))[0]
        return self.tensor(rank, answer), answer.first_key
