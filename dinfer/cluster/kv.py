"""Live: the KV that a run's ranks hold just now, as a Source."""

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dinfer.cluster.ranks import Ranks
from dinfer.kv.digests import as_numbers
from dinfer.kv.ledger import BlockKey, Digests
from dinfer.kv.source import HeldSpans, LiveSource, Noted, Subject
from dinfer.messages import Message

ANSWER_S = 120.0


class RankClient:
    """`check(ranks)` is called while these are waited for; it raises where no answer can come."""

    def __init__(self, ranks: Ranks, check: Callable[[Sequence[int]], None]) -> None:
        self._ranks, self._check = ranks, check
        self.bytes_moved = 0

    def ask(self, ranks: Sequence[int], do: str, **fields: Any) -> list[Message]:
        """Each rank's answer, in their order. Raises as Ranks.ask does."""
        request = {"do": do, **fields}
        answers = self._ranks.ask(dict.fromkeys(ranks, request), ANSWER_S, lambda: self._check(ranks))
        self.bytes_moved += len(ranks) * _size(request) + sum(map(_size, answers.values()))
        return [answers[rank] for rank in ranks]

    def tensors(self, ranks: Sequence[int], do: str, **fields: Any) -> list[Tensor]:
        """Each rank's answer where that is one tensor."""
        answers = self.ask(ranks, do, **fields)
        return [self.tensor(rank, answer) for rank, answer in zip(ranks, answers, strict=True)]

    def tensor(self, rank: int, answer: Message) -> Tensor:
        """The tensor that an answer begins, on the CPU, once its other pieces have been fetched."""
        data = bytearray(base64.b64decode(answer["data"]))
        dtype: torch.dtype = getattr(torch, answer["dtype"])
        whole = dtype.itemsize * _product(answer["shape"])
        while len(data) < whole:
            piece = self.ask([rank], "piece", number=answer["number"], start=len(data))[0]
            data += base64.b64decode(piece["data"])
        if not whole:
            return torch.zeros(answer["shape"], dtype=dtype)
        return torch.frombuffer(data, dtype=dtype).reshape(answer["shape"])


def _size(message: Message) -> int:
    return len(json.dumps(message))


def _product(shape: Sequence[int]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size


class Live(LiveSource):
    """Of ranks that stand."""

    def __init__(self, subject: Subject, line: RankClient) -> None:
        self.subject, self.line = subject, line
        self.ranks = range(len(subject.plan.lanes))

    def called(self, name: str) -> "Live":
        return Live(replace(self.subject, name=name), self.line)

    @property
    def bytes_moved(self) -> int:
        return self.line.bytes_moved

    def held(self, ranks: Sequence[int]) -> list[HeldSpans]:
        answers = self.line.ask(ranks, "kv_held")
        return [HeldSpans(tuple(answer["spans"]), tuple(answer["rows"])) for answer in answers]

    def digests(self, ranks: Sequence[int], layers: Sequence[int], spans: Sequence[range]) -> list[Tensor]:
        places = [[span.start, span.stop] for span in spans]
        return self.line.tensors(ranks, "kv_digests", layers=list(layers), spans=places)

    def noted(self, ranks: Sequence[int], layers: Sequence[int]) -> list[dict[BlockKey, Noted]]:
        found = list[dict[BlockKey, Noted]]()
        for rank, answer in zip(ranks, self.line.ask(ranks, "kv_noted", layers=list(layers)), strict=True):
            digests = self.line.tensor(rank, answer)
            blocks = zip(answer["blocks"], digests, strict=True)
            noted = {(one[0], one[1]): _noted(as_numbers(came), one[2:]) for one, came in blocks}
            for chunk, of_layer in answer["edited"]:
                noted[chunk, of_layer] = noted[chunk, of_layer]._replace(edited=True)
            found.append(noted)
        return found

    def noted_rows(self, rank: int, chunk: int, layer: int) -> Tensor | None:
        answer = self.line.ask([rank], "kv_noted_rows", chunk=chunk, layer=layer)[0]
        return None if "none" in answer else self.line.tensor(rank, answer)

    def rows(self, rank: int, layer: int, places: range) -> Tensor:
        return self.line.tensors([rank], "kv_rows", layer=layer, start=places.start, stop=places.stop)[0]

    def values(self, rank: int, layer: int, places: Sequence[int]) -> Tensor:
        return self.line.tensors([rank], "kv_values", layer=layer, places=list(places))[0]

    def summary(self, rank: int, layer: int, places: range) -> Message:
        return self.line.ask([rank], "kv_summary", layer=layer, start=places.start, stop=places.stop)[0]

    def part(self, rank: int, layer: int, tensor: int, heads: Sequence[int], places: Sequence[int]) -> Tensor:
        some = {"tensor": tensor, "heads": list(heads), "places": list(places)}
        return self.line.tensors([rank], "kv_part", layer=layer, **some)[0]

    # -- what only ranks can tell

    def hidden_first(self, rank: int) -> dict[int, int]:
        return dict(self.line.ask([rank], "hidden_held")[0]["first"])

    def hidden_summary(self, rank: int, chunk: int, layer: int) -> Message:
        return self.line.ask([rank], "hidden_summary", chunk=chunk, layer=layer)[0]

    def hidden(self, rank: int, chunk: int, layer: int) -> Tensor:
        return self.line.tensors([rank], "hidden", chunk=chunk, layer=layer)[0]

    def attention(self, rank: int, chunk: int, layer: int, heads: Sequence[int]) -> tuple[Tensor, int]:
        answer = self.line.ask([rank], "attention", chunk=chunk, layer=layer, heads=list(heads))[0]
        return self.line.tensor(rank, answer), answer["first_key"]


def _noted(came: Digests, announced: Sequence[int]) -> Noted:
    return Noted(came, (announced[0], announced[1]) if announced else came)
