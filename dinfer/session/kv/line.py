"""Line: commands that only look, asked of a run's ranks; tensors come in pieces, and every byte is counted."""

import base64
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dinfer.engine.hosting.commands import Message
from dinfer.session.ranks import Ranks

ANSWER_S = 120.0


class Line:
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
