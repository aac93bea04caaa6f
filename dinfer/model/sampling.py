"""Choosing the next token from logits: greedy, or sampled with transformers' own warpers.

A draw depends only on the logits, the sampling parameters and the step number, so all ranks draw the same token and
going back to a step repeats it. Importing this module does not import torch.
"""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dinfer.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. `temperature` 0 means greedy; `top_k` 0 and `top_p` 1 mean no such limit.

    Raises `ModelError` for a negative temperature or top_k, or a top_p outside (0, 1].
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ModelError(f"temperature={self.temperature}: give 0 for greedy, or a positive number")
        if self.top_k < 0:
            raise ModelError(f"top_k={self.top_k}: give 0 for no limit, or the number of tokens to draw from")
        if not 0.0 < self.top_p <= 1.0:
            raise ModelError(f"top_p={self.top_p}: give a probability above 0, at most 1 (1 means no limit)")


class Sampler:
    """Chooses tokens by `sampling`; keeps no state between calls."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._warpers: list[Any] = []
        if sampling.temperature == 0.0:
            return
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        # In the order in which transformers' `generate` applies them.
        self._warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k > 0:
            self._warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))

    def __call__(self, logits: "Tensor", step: int) -> int:
        """The id of new token `step` (from 0), chosen from `logits` [vocab_size]."""
        import torch

        if self.sampling.temperature == 0.0:
            return int(logits.argmax())
        number = torch.tensor([self.draw(step)], dtype=torch.float64)
        return int(self.choose(logits.detach().to("cpu", torch.float32), number))

    def draw(self, step: int) -> float:
        """The random number, 0 to 1, that decides new token `step`."""
        import torch

        # A hash of both, so that step 1 of seed 0 is not step 0 of seed 1.
        mixed = hashlib.sha256(f"{self.sampling.seed}:{step}".encode()).digest()[:8]
        generator = torch.Generator().manual_seed(int.from_bytes(mixed) >> 1)
        return float(torch.rand(1, dtype=torch.float64, generator=generator))

    def choose(self, logits: "Tensor", number: "Tensor") -> "Tensor":
        """The token, int64 [1], that `number`, float64 [1], picks from `logits` [vocab_size], float32, on their device.

        Does not wait for the device.
        """
        import torch

        greedy = logits.argmax().view(1)
        if self.sampling.temperature == 0.0:
            return greedy
        scores = logits.unsqueeze(0)
        for warper in self._warpers:
            scores = warper(None, scores)
        cumulative = scores[0].double().softmax(-1).cumsum(-1)
        # right=True: a token of probability 0 adds nothing to the sum, so it is never the first one above it.
        drawn = torch.searchsorted(cumulative, number * cumulative[-1], right=True).clamp(max=len(logits) - 1)
        # +inf, or NaN of two infinities: so low a temperature that float32 overflows. Its limit is greedy.
        return torch.where(scores.max().isfinite(), drawn, greedy)
