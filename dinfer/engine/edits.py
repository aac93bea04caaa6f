"""Edits: has the user changed a tensor between two steps? Then an uninterrupted run is no measure any more.

torch counts in-place changes of a tensor and all its views (`_version`). What the engine's own ops leave is noted
after each op; what differs from that at the next step was changed by hand. Bytes that arrive over gloo do not count
up, so they need no note. Blocks that were changed by hand are entered into the ledger anew, as what they are now. Of KV
the layer is known, not the rows: a fault of memory in the same layer since the last step is taken for part of the edit.
What the user has left is kept, for who replays this rank; of KV only where a ledger tells which blocks have changed.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from dinfer.engine.handlers import Prefill
from dinfer.engine.ledger import Key
from dinfer.plan.ops import Op
from dinfer.trace.events import Event

Mark = tuple[int, int]
"""Which tensor, and how often it was changed."""


class Edit(NamedTuple):
    """What a user had changed while the rank's lanes stood at these positions: blocks, [tokens, 2, kv_heads, head_dim],
    and hidden states, [1, tokens, hidden_size], as they were left."""

    positions: tuple[int, ...]
    kv: dict[Key, Tensor]
    hidden: dict[Key, Tensor]


class Edits:
    """Of one prompt on one rank. Called with every event, on the lanes' threads. `positions`: where the lanes stand."""

    def __init__(self, state: Prefill, positions: Callable[[], tuple[int, ...]] = tuple) -> None:
        self._state, self._positions = state, positions
        self.found: list[str] = []
        self.history: list[Edit] = []
        self._kv: dict[int, int] = {}
        self._hidden: dict[tuple[int, int], Mark] = {}
        self._unsaid: list[str] = []
        self.note_all()

    def __call__(self, _: Event, op: Op) -> None:
        for value in op.makes():
            if value.what == "kv":
                self.note(value.layer)
            elif (hidden := self._state.hidden.get((value.chunk, value.layer))) is not None:
                self._hidden[value.chunk, value.layer] = _mark(hidden)

    def note(self, layer: int) -> None:
        """Take the KV of a layer as the engine's own."""
        self._kv[layer] = self._version(layer)

    def note_all(self) -> None:
        """Take what there is now as the engine's own."""
        self._kv = {layer: self._version(layer) for layer in range(self._state.cache.layers)}
        self._hidden = {key: _mark(hidden) for key, hidden in self._state.hidden.items()}

    def look(self) -> list[str]:
        """What has been changed by hand since it was last asked, in words; for a rank that stands."""
        self.enter()
        said, self._unsaid = self._unsaid, []
        return said

    def enter(self) -> None:
        """Take in what has been changed by hand since the engine's last op."""
        layers = [n for n, version in self._kv.items() if version != self._version(n)]
        states = {
            k: hidden for k, hidden in self._state.hidden.items() if self._hidden.get(k) != _mark(hidden)
        }
        changed = [f"KV of layer {n}" for n in layers]
        changed += [f"hidden c{chunk} l{layer}" for chunk, layer in states]
        if changed:
            self._keep(layers, states)  # before the ledger takes them in: it tells which blocks they are
            self._state.take_edits(layers)
            self.found += [what for what in changed if what not in self.found]
            self._unsaid += changed
            self.note_all()

    def rewound(self) -> None:
        """The rank has gone back to where it stands now; what it has kept of edits is still in force."""
        at, blocks, states = self._positions(), self._state.ledger.entries, self._state.hidden
        self.history = [
            Edit(
                tuple(map(min, edit.positions, at)),
                {key: block for key, block in edit.kv.items() if key in blocks},
                {key: hidden for key, hidden in edit.hidden.items() if key in states},
            )
            for edit in self.history
        ]
        self.note_all()

    def _keep(self, layers: list[int], states: dict[Key, Tensor]) -> None:
        state = self._state
        kv = {
            (chunk, layer): block.clone()
            for chunk, layer in state.ledger.entries
            if layer in layers
            and state.ledger.changed((chunk, layer), block := state.block(chunk, layer)).any()
        }
        self.history.append(Edit(self._positions(), kv, {key: one.clone() for key, one in states.items()}))

    def _version(self, layer: int) -> int:
        return self._state.cache.tensor(layer)._version


def _mark(tensor: Tensor) -> Mark:
    return id(tensor), tensor._version
