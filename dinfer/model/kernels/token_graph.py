"""TokenGraph: a whole step of decode, from the last token to the next one, as one CUDA graph."""

from dataclasses import replace

import torch
from torch import Tensor

from dinfer.model.kernels.graphs import LayerGraphs, NoGraph
from dinfer.model.sampling import Sampler, Sampling

STEPS = 4096
"""steps whose tokens and random numbers are kept on the device, in a ring"""

DRAWN = 256
"""steps whose random numbers are drawn at a time"""

NO_TOKEN = -1
"""in place of a token whose logits are NaN or Inf"""


class TokenGraph:
    """Makes token after token on the device; the host launches, and reads the tokens later.

    The cache must be bound to the graphs (`LayerGraphs.bind`). Capturing takes seconds. Raises NoGraph.
    """

    def __init__(self, graphs: LayerGraphs, sampling: Sampling) -> None:
        decoder = graphs.decoder
        self.sampling, self._graphs, self._decoder = sampling, graphs, decoder
        self._sampler = Sampler(sampling)
        device = decoder.device
        self.logits = torch.zeros((2, decoder.vocab_size), dtype=torch.float32, device=device)
        """those of the last two steps, by the step's number modulo 2"""
        self.tokens = torch.zeros(STEPS, dtype=torch.long, device=device)
        self._token = torch.zeros(1, dtype=torch.long, device=device)
        self._step = torch.zeros(1, dtype=torch.long, device=device)
        self._draws = torch.zeros(STEPS, dtype=torch.float64, device=device)
        self._drawn, self._next = range(0), 0
        self.begun: object = None
        """changes with each decode that begins or goes on, since all share what lies on the device"""
        scratch = decoder.new_cache(2)
        graphs.bind(scratch)
        graphs.table.go_to(0, 0, 1)
        try:
            with torch.no_grad():
                self._launch = graphs.capture(self._work)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model does that cannot be captured
            raise NoGraph.because(error) from error

    def seed(self, seed: int) -> None:
        """Draw by this seed from now on, whatever that of `sampling` is: it is not part of what was captured."""
        self._sampler, self._drawn = Sampler(replace(self.sampling, seed=seed)), range(0)

    def begin(self, token: int, position: int, step: int) -> object:
        """The next launch takes `token` as input at this position, and makes new token number `step` (from 0). Returns
        what `begun` is until the next call."""
        self._graphs.forget()
        self._graphs.table.go_to(position, 0, 1)
        self.begun = object()
        self._token.fill_(token)
        self._step.fill_(step)
        self._next = step
        return self.begun

    def launch(self) -> Tensor:
        """Make one more token; returns where it will be on the device, int64 [1], until STEPS others follow."""
        step, self._next = self._next, self._next + 1
        if self.sampling.temperature > 0 and step not in self._drawn:
            self._draw(range(step, step + DRAWN))
        self._launch()
        at = step % STEPS
        return self.tokens[at : at + 1]

    def _draw(self, steps: range) -> None:
        """Put the random numbers of these steps on the device."""
        self._drawn = steps
        places = torch.tensor([step % STEPS for step in steps])
        numbers = torch.tensor([self._sampler.draw(step) for step in steps], dtype=torch.float64)
        self._draws[places.to(self._draws.device)] = numbers.to(self._draws.device)

    def _work(self) -> None:
        graphs, decoder = self._graphs, self._decoder
        position = graphs.table.position
        hidden = decoder.embed_known(self._token.clamp(min=0))
        angles = {kind: graphs.angles_at(kind, position) for kind in set(decoder.kinds)}
        ids = position.unsqueeze(0)
        for layer, kind in enumerate(decoder.kinds):
            hidden = graphs.run_one(layer, hidden, ids, angles[kind])
        logits = decoder.logits(decoder.norm(hidden))
        self.logits.index_copy_(0, self._step.remainder(2), logits.unsqueeze(0))
        at = self._step.remainder(STEPS)
        chosen = self._sampler.choose(logits, self._draws.index_select(0, at))
        self._token.copy_(torch.where(logits.max().isfinite(), chosen, NO_TOKEN))
        self.tokens.index_copy_(0, at, self._token)
        self._step += 1
        graphs.table.advance()
