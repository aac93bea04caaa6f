"""Kernels: what runs one rank's layers, transformers' own kernels or graphs, chosen by config and model."""

import logging
import threading
from collections.abc import Callable
from time import perf_counter
from typing import NamedTuple

from dinfer.config import Config
from dinfer.model.decoder import Decoder
from dinfer.model.kernels.graphs import LayerGraphs, Mode, NoGraph
from dinfer.model.kernels.token_graph import TokenGraph
from dinfer.model.sampling import Sampling

log = logging.getLogger("dinfer")

_CAPTURING = threading.Lock()
"""ranks of one process share its device, on which nothing else may be captured at the same time"""

OnProgress = Callable[[int, int], None]


class Graphs(NamedTuple):
    """The graphs of one rank: of layers, and of a whole step of decode."""

    layers: LayerGraphs
    token: TokenGraph


def kernels_of(graphs: Graphs | None) -> str:
    """What runs layers with these graphs, or without any: "exact", "graph" or "compiled"."""
    return graphs.layers.mode if graphs else "exact"


class Kernels:
    """The kernels of one rank, kept from prompt to prompt while its model stays."""

    def __init__(self) -> None:
        self._decoder: Decoder | None = None
        self._layers: dict[Mode, LayerGraphs] = {}
        self._token: dict[tuple[Mode, Sampling], TokenGraph] = {}
        self._refused: set[tuple[Mode, int]] = set()

    def prepare(
        self, decoder: Decoder, config: Config, on_progress: OnProgress | None = None
    ) -> Graphs | None:
        """Graphs for chunks as in the config and for its sampling, captured if there are none yet (seconds); None where
        transformers' own kernels are to run. The previous prompt must be released.

        `on_progress(done, total)` is called for each layer. What a model does not allow is logged once, by name.
        """
        if decoder is not self._decoder:
            self.drop()
            self._decoder = decoder
        for mode in _modes(config, decoder):
            if (mode, config.chunk_size) in self._refused:
                continue
            try:
                with _CAPTURING:
                    return self.capture(mode, decoder, config, on_progress)
            except NoGraph as why:
                self._refused.add((mode, config.chunk_size))
                log.warning("kernels=%s cannot run %s: %s", mode, decoder.spec.model_type, why)
        return None

    @property
    def nbytes(self) -> int:
        """GPU memory that all graphs hold beside weights and KV."""
        return sum(layers.nbytes for layers in self._layers.values())

    def drop(self) -> None:
        """Give up all graphs, with their memory."""
        self._decoder = None
        self._layers.clear()
        self._token.clear()
        self._refused.clear()

    def capture(
        self, mode: Mode, decoder: Decoder, config: Config, on_progress: OnProgress | None = None
    ) -> Graphs:
        """Graphs of one kind. Raises NoGraph."""
        layers = self._layers.get(mode)
        if layers is None:
            layers = LayerGraphs(decoder, mode)
        sampling = Sampling(config.temperature, config.top_k, config.top_p)
        began, length = perf_counter(), min(config.chunk_size, decoder.max_positions)
        is_new = length not in layers.lengths or (mode, sampling) not in self._token
        if is_new:
            with layers.capture.counted():
                layers.prepare(length, on_progress)
                if (mode, sampling) not in self._token:
                    self._token = {(mode, sampling): TokenGraph(layers, sampling)}
        layers.use(length)
        self._layers[mode] = layers
        if is_new:
            log.info(
                "kernels=%s: graphs of %d layers for %s tokens and of one new token, captured in %.1f s, %.2f GiB",
                mode, decoder.num_layers, " and ".join(map(str, layers.lengths)), perf_counter() - began,
                layers.nbytes / 2**30,
            )  # fmt: skip
        token = self._token[mode, sampling]
        token.seed(config.seed)
        return Graphs(layers, token)


def _modes(config: Config, decoder: Decoder) -> tuple[Mode, ...]:
    """The kinds of graphs to try, the best first."""
    if config.kernels == "exact" or decoder.device.type != "cuda":
        return ()
    return ("compiled", "graph") if config.kernels == "auto" else (config.kernels,)
