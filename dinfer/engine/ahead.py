"""Ahead: new tokens made on the device, which goes on with the next one while the host looks at the last."""

import torch
from torch import Tensor

from dinfer.model.cache import KVCache
from dinfer.model.kernels.graphs import LayerGraphs
from dinfer.model.kernels.token_graph import TokenGraph


class Ahead:
    """Steps of one decode, one launch each. The cache may change between two calls of `take`."""

    def __init__(self, layers: LayerGraphs, token: TokenGraph) -> None:
        self._layers, self._token = layers, token
        pinned = token.tokens.is_cuda
        self._host = torch.zeros(2, dtype=torch.long, pin_memory=pinned)
        self._events = [torch.cuda.Event(blocking=True), torch.cuda.Event(blocking=True)] if pinned else []  # type: ignore[no-untyped-call]
        self._begun: object = None
        self._launched = 0
        """the number of steps that have been launched, with those before this decode; 0: the next must begin anew"""

    def restart(self) -> None:
        """The next step must not rest on what was launched ahead: something may have changed since."""
        self._launched = 0

    def take(self, cache: KVCache, last: int, position: int, step: int, *, more: bool) -> tuple[int, Tensor]:
        """New token number `step` (from 1), of which `last`, at `position`, is the input; and its logits [vocab_size].

        `more`: launch the next step too, which takes this one's token from the device.
        """
        if self._launched != step + 1 or self._begun is not self._token.begun:
            self._layers.bind(cache)
            self._begun = self._token.begin(last, position, step)
            self._launch(step)
        if more:
            self._launch(step + 1)
        if self._events:
            self._events[step % 2].synchronize()
        return int(self._host[step % 2]), self._token.logits[step % 2]

    def _launch(self, step: int) -> None:
        made = self._token.launch()
        self._host[step % 2 : step % 2 + 1].copy_(made, non_blocking=True)
        if self._events:
            self._events[step % 2].record(torch.cuda.current_stream(self._token.tokens.device))
        self._launched = step + 1
