"""LayerGraphs: a model's layers as CUDA graphs, one for each layer and length, the most tokens that it can run.

A graph reads its input from a buffer and writes its output there, so that the next layer's graph goes on from it. Where
the tokens lie it reads from a table on the device. The same graphs serve stepping and free runs: between any two
launches a run can stop.

On a CPU a "graph" is the function that would be captured, for tests of everything above it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dinfer.errors import ModelError
from dinfer.model.cache import KVCache
from dinfer.model.decoder import Decoder
from dinfer.model.kernels.attend import NewRows, fits, keep, register
from dinfer.model.kernels.capture import Capture
from dinfer.model.kernels.compiled import compiled
from dinfer.model.kernels.shared import copied_layers
from dinfer.model.kernels.table import Kept, LayerTable
from dinfer.model.positions import LayerKind

Mode = Literal["graph", "compiled"]

MOST_POSITIONS = 1 << 17
"""whose rotary angles are kept: 64 MiB for heads of 128 numbers in 16 bits"""

Angles = tuple[Tensor, Tensor]
"""cosine and sine of the rotary angles, each [1, tokens, head_dim]"""


class NoGraph(ModelError):
    """A model that graphs cannot hold, and why."""

    @classmethod
    def because(cls, error: Exception) -> "NoGraph":
        """Of what has been raised while a model was compiled or captured."""
        root: BaseException = error
        # A compiler's error says no more than that there was one.
        while (inner := getattr(root, "inner_exception", None) or root.__cause__) is not None:
            root = inner
        lines = str(root).strip().splitlines()
        return cls(f"{type(root).__name__}: {lines[0]}" if lines else type(root).__name__)


class _Length(NamedTuple):
    """What the graphs of one length share: input and output [1, length, hidden_size], position ids [1, length], and
    the rotary angles of each kind of layer."""

    hidden: Tensor
    ids: Tensor
    angles: dict[LayerKind, Angles]
    launches: list[Callable[[], object]]


class LayerGraphs:
    """Graphs of one decoder's layers; one prompt at a time may use them.

    `mode`: "compiled" lets torch.compile join what lies between products. Raises NoGraph for a model that they cannot
    hold.
    """

    def __init__(self, decoder: Decoder, mode: Mode) -> None:
        self.decoder, self.mode, self.device = decoder, mode, decoder.device
        if why := _why_not(decoder):
            raise NoGraph(why)
        register()
        self.table = LayerTable(decoder.num_layers, self.device)
        self._layers = copied_layers(decoder.base, decoder.model.config)
        self._run = compiled(_run_layer) if mode == "compiled" else _run_layer
        self.capture = Capture(self.device)
        self._lengths: dict[int, _Length] = {}
        self._current = 0
        self._angles: dict[LayerKind, Angles] = {}
        self._begun: tuple[int, int, int] | None = None
        self._length: _Length | None = None
        self._buffer: Tensor | None = None
        """its first tokens, which run now"""

    @property
    def nbytes(self) -> int:
        """GPU memory that the graphs hold beside weights and KV."""
        return self.capture.nbytes

    @property
    def lengths(self) -> list[int]:
        """The lengths for which there are graphs."""
        return sorted(self._lengths)

    @torch.no_grad()
    def prepare(self, tokens: int, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Capture graphs of this length, where there are none yet; calls `on_progress(done, total)` for each layer.

        Nothing may run on the device. Raises NoGraph.
        """
        if tokens in self._lengths:
            return
        scratch = self.decoder.new_cache(tokens)
        largest = torch.zeros((scratch.layers, tokens, 3), device=self.device)
        self.bind(scratch, Kept.of(scratch, 1, digests=True, largest=largest))
        self.table.go_to(0, 0, tokens)
        length, count = self._new_length(tokens), len(self._layers)
        try:
            for number in range(count):
                if on_progress:
                    on_progress(number, count)
                length.launches.append(self.capture(partial(self._layer, number, length)))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model does that cannot be captured
            raise NoGraph.because(error) from error
        self._lengths[tokens] = length
        if on_progress:
            on_progress(count, count)

    def bind(self, cache: KVCache, kept: Kept | None = None) -> None:
        """The next runs write to this cache, and keep what `kept` is for; both must outlive them."""
        if self.table.bind(cache, kept):
            self._begun = None

    def unbind(self) -> None:
        """Keep no cache alive."""
        self.table.unbind()
        self.forget()

    def use(self, length: int) -> None:
        """Run by the graphs of this length from now on. Which others there are must not decide: other lengths round
        otherwise, and another process has other ones."""
        self._current = length
        self.forget()

    def forget(self) -> None:
        """What `begin` has said no longer holds."""
        self._begun = None

    def holds(self, tokens: int, stop: int) -> bool:
        """Whether the graphs run so many tokens that end before position `stop`."""
        return tokens <= self._current and stop <= MOST_POSITIONS

    def begin(self, tokens: int, position: int, slot: int = 0) -> None:
        """The next runs are of `tokens` tokens from this position on; digests of their blocks go to `slot`."""
        if self._begun == (tokens, position, slot):
            return
        self._begun = tokens, position, slot
        number = self._current
        length = self._length = self._lengths[number]
        self._buffer = length.hidden[:, :tokens]
        self.table.go_to(position, slot, tokens)
        torch.arange(position, position + number, out=length.ids[0], device=self.device)
        for kind, into in length.angles.items():
            for target, source in zip(into, self._angles_of(kind), strict=True):
                stop = min(position + number, source.shape[1])
                target[:, : stop - position].copy_(source[:, position:stop])

    def run(self, layer: int, hidden: Tensor) -> Tensor:
        """Run a layer on `hidden` [1, tokens, hidden_size], as `begin` has said; returns its output, same shape.

        The output lies in a buffer that the next run of this length overwrites. If `hidden` lies there, nothing is
        copied. Raises ModelError for a hidden state of another shape or dtype.
        """
        length, buffer = self._length, self._buffer
        assert length is not None
        assert buffer is not None
        assert self._begun is not None
        if hidden is not buffer:
            tokens = self._begun[0]
            wanted = (1, tokens, self.decoder.hidden_size), self.decoder.dtype
            if (hidden.shape, hidden.dtype) != wanted:
                given = f"{list(hidden.shape)} in {hidden.dtype}"
                raise ModelError(
                    f"layer {layer} takes a hidden state {list(wanted[0])} in {wanted[1]}; got {given}"
                )
            # By `data`, so that torch does not count it as a change that the user has made.
            with torch.no_grad():
                buffer.data.copy_(hidden)
        length.launches[layer]()
        return buffer

    def run_one(self, layer: int, hidden: Tensor, ids: Tensor, angles: Angles) -> Tensor:
        """What the graph of length 1 captures of a layer, for a graph of a whole step."""
        return self._run(self._layers[layer], hidden, self.table.rows[layer], ids, angles)

    def angles_at(self, kind: LayerKind, position: Tensor) -> Angles:
        """The angles at a position on the device, int64 [1]."""
        cosine, sine = (one.index_select(1, position) for one in self._angles_of(kind))
        return cosine, sine

    def _layer(self, layer: int, length: _Length) -> None:
        row, kind = self.table.rows[layer], self.decoder.kinds[layer]
        output = self._run(self._layers[layer], length.hidden, row, length.ids, length.angles[kind])
        keep(output, length.hidden, row)

    def _new_length(self, tokens: int) -> _Length:
        decoder = self.decoder
        hidden = torch.zeros((1, tokens, decoder.hidden_size), dtype=decoder.dtype, device=self.device)
        ids = torch.arange(tokens, device=self.device).unsqueeze(0)
        angles: dict[LayerKind, Any] = {
            kind: tuple(
                torch.zeros((1, tokens, one.shape[2]), dtype=one.dtype, device=self.device)
                for one in self._angles_of(kind)
            )
            for kind in set(decoder.kinds)
        }
        return _Length(hidden, ids, angles, [])

    def _angles_of(self, kind: LayerKind) -> Angles:
        if kind not in self._angles:
            count = min(self.decoder.spec.model_positions, MOST_POSITIONS)
            like = torch.zeros((1, 1, 1), dtype=self.decoder.dtype, device=self.device)
            self._angles[kind] = self.decoder.positions.angles(kind, count, like)
        return self._angles[kind]


def _why_not(decoder: Decoder) -> str:
    """Why there can be no graphs of this model here, or ""."""
    if why := fits(decoder.head_dim, decoder.hidden_size, decoder.dtype):
        return why
    if decoder.spec.length_dependent:
        return "its rotary angles depend on the length of the text"
    if decoder.device.type == "cuda":
        try:
            import triton  # noqa: F401
        except ImportError:
            return "Triton is not installed"
    return ""


def _run_layer(layer: Any, hidden: Tensor, row: Tensor, ids: Tensor, angles: Angles) -> Tensor:
    output: Tensor = layer(
        hidden,
        attention_mask=row,
        position_embeddings=angles,
        position_ids=ids,
        past_key_values=NewRows(),
        use_cache=True,
    )
    return output
