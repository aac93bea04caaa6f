"""Inspect: what a rank tells its session of the KV it holds, computed where the KV lies. Nothing here changes any.

What is larger than a message goes in pieces: the answer holds the first, the session asks for the others by number.
A place is a row's index in a layer's cache.
"""

import base64
import itertools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from dinfer.engine.engine import Engine
from dinfer.kv.digests import as_numbers, block_digests, row_digests
from dinfer.kv.measure import per_head
from dinfer.messages import Message
from dinfer.model.attention import attention, hidden_before
from dinfer.rank.commands import Command, CommandTable
from dinfer.rank.decode import Tokens

PIECE = 150_000
"""bytes of one answer; as base64 in a JSON line they stay under 256 KiB"""

KEPT = 4
"""answers whose pieces are kept until they are fetched; of one that is given up, the pieces go in time"""


class InspectedRank(Protocol):
    """What is asked: one rank of a session."""

    rank: int
    engine: Engine | None
    tokens: Tokens | None


def inspect_commands(host: InspectedRank) -> CommandTable:
    """They are slow: they compute on the rank's device, and a session asks them of a rank that stands."""
    found = Inspection(host)
    table: dict[str, Callable[[Message], Message]] = {
        "kv_held": found.held,
        "kv_digests": found.digests,
        "kv_noted": found.noted,
        "kv_noted_rows": found.noted_rows,
        "kv_rows": found.rows,
        "kv_values": found.values,
        "kv_part": found.part,
        "kv_summary": found.summary,
        "hidden_held": found.hidden_held,
        "hidden": found.hidden,
        "hidden_summary": found.hidden_summary,
        "attention": found.attention,
        "record_kv": found.record_kv,
        "record_final": found.record_final,
        "record_notes": found.record_notes,
        "record_edit": found.record_edit,
        "piece": found.piece,
    }
    return {name: Command(function, slow=True) for name, function in table.items()}


class Inspection:
    """Of one rank; its methods are commands."""

    def __init__(self, host: InspectedRank) -> None:
        self._host = host
        self._numbers = itertools.count(1)
        self._kept: dict[int, bytes] = {}

    # -- KV

    def held(self, _: Message) -> Message:
        """By layer: how many of the prompt's chunks and then of the new tokens are here, and how many rows."""
        layers = range(self._engine.decoder.num_layers)
        spans = [self._chunks(layer) for layer in layers]
        whole = len(self._engine.prompt.plan.shape.chunks)
        new = bool(self._host.tokens and len(self._host.tokens.tokens) > 1)
        return {
            "spans": [count + (new and count == whole) for count in spans],
            "rows": [self._held_rows(layer) for layer in layers],
        }

    def digests(self, message: Message) -> Message:
        """Those of blocks, as they are now: int64 [layers, spans, 2]."""
        of_layers = [
            torch.stack([block_digests(row_digests(self._block(layer, *span))) for span in message["spans"]])
            for layer in message["layers"]
        ]
        return self._answer(torch.stack(of_layers))

    def noted(self, message: Message) -> Message:
        """What the ledger says of the blocks of these layers: digests, int64 [blocks, 2]; of each, chunk and layer and,
        where it differs, what was announced; and which the user has edited."""
        asked, said, edited = set(message["layers"]), list[list[int]](), list[list[int]]()
        came = list[Tensor]()
        for (chunk, layer), entry in sorted(self._engine.prompt.state.ledger.entries.items()):
            if layer in asked:
                announced = entry.announced
                differs = announced not in (None, (0, 0), as_numbers(entry.digests))
                came.append(entry.digests)
                said.append([chunk, layer, *(announced if differs and announced else ())])
                edited += [[chunk, layer]] * entry.edited
        digests = torch.stack(came) if came else torch.zeros(0, 2, dtype=torch.int64)
        return {**self._answer(digests), "blocks": said, "edited": edited}

    def noted_rows(self, message: Message) -> Message:
        entry = self._engine.prompt.state.ledger.entries.get((message["chunk"], message["layer"]))
        return self._answer(entry.rows) if entry else {"none": True}

    def rows(self, message: Message) -> Message:
        """Digests of rows, as they are now: int64 [places, 2, kv_heads]."""
        return self._answer(row_digests(self._block(message["layer"], message["start"], message["stop"])))

    def values(self, message: Message) -> Message:
        """The rows in these places: [places, 2, kv_heads, head_dim]."""
        held = self._block(message["layer"], 0, self._held_rows(message["layer"]))
        return self._answer(held[torch.tensor(message["places"], dtype=torch.long, device=held.device)])

    def part(self, message: Message) -> Message:
        """K or V of these heads and places: [heads, places, head_dim]."""
        held = self._block(message["layer"], 0, self._held_rows(message["layer"]))[:, message["tensor"]]
        heads, places = (
            torch.tensor(message[name], dtype=torch.long, device=held.device) for name in ("heads", "places")
        )
        return self._answer(held.transpose(0, 1)[heads[:, None], places])

    def summary(self, message: Message) -> Message:
        """K and V of these places, by head, in a few numbers each."""
        return per_head(self._block(message["layer"], message["start"], message["stop"]))

    # -- what the layers compute

    def hidden_held(self, _: Message) -> Message:
        """Hidden states that can be had here: chunk and the first layer before which, from there on to the last of this
        rank's."""
        first: dict[int, int] = {}
        for chunk, layer in self._engine.prompt.state.hidden:
            first[chunk] = min(layer, first.get(chunk, layer))
        return {"first": sorted(first.items())}

    def hidden(self, message: Message) -> Message:
        """Before a layer: [tokens, hidden_size]; computed anew where it is not at hand."""
        return self._answer(self._hidden(message["chunk"], message["layer"]))

    def hidden_summary(self, message: Message) -> Message:
        """The same in a few numbers, as of one head."""
        return per_head(self._hidden(message["chunk"], message["layer"])[:, None, None])

    def attention(self, message: Message) -> Message:
        """The weights of these heads, [heads, queries, keys], and the first key's token."""
        chunk, layer, state = message["chunk"], message["layer"], self._engine.prompt.state
        rows = state.rows(chunk)
        found = attention(
            self._engine.decoder, layer, self._hidden(chunk, layer)[None], state.cache, rows.start
        )
        weights = found.weights[message["heads"]] if message["heads"] else found.weights
        return {**self._answer(weights), "first_key": found.first_key}

    # -- what a replay needs beside that

    def record_kv(self, message: Message) -> Message:
        """Blocks of one layer, one after another: [tokens, 2, kv_heads, head_dim]."""
        state = self._engine.prompt.state
        return self._answer(torch.cat([state.block(chunk, message["layer"]) for chunk in message["chunks"]]))

    def record_final(self, _: Message) -> Message:
        """The normed hidden state of the prompt's last token: [1, 1, hidden_size]."""
        final = self._engine.prompt.state.final
        return {"none": True} if final is None else self._answer(final)

    def record_notes(self, _: Message) -> Message:
        """This rank's new tokens, and each edit: where the lanes stood, and the chunk and layer of what was changed."""
        return {
            "tokens": self._host.tokens.tokens if self._host.tokens else [],
            "edits": [
                {"positions": edit.positions, "kv": list(edit.kv), "hidden": list(edit.hidden)}
                for edit in self._engine.prompt.edits.history
            ],
        }

    def record_edit(self, message: Message) -> Message:
        """A tensor ("kv" or "hidden") as the edit of that number has left it."""
        edit = self._engine.prompt.edits.history[message["number"]]
        tensors = edit.kv if message["what"] == "kv" else edit.hidden
        return self._answer(tensors[message["chunk"], message["layer"]])

    # -- pieces

    def piece(self, message: Message) -> Message:
        """One more piece of an answer, from byte `start` on."""
        data = self._kept.get(message["number"])
        if data is None:
            raise RuntimeError(f"rank {self._host.rank} has given up that answer: ask again.")
        start = message["start"]
        if start + PIECE >= len(data):
            del self._kept[message["number"]]
        return {"data": _text(data[start : start + PIECE])}

    def _answer(self, tensor: Tensor) -> Message:
        there = tensor.detach().contiguous().cpu()
        data = there.view(-1).view(torch.uint8).numpy().tobytes() if there.numel() else b""
        said: dict[str, Any] = {
            "shape": list(there.shape),
            "dtype": str(there.dtype).removeprefix("torch."),
            "data": _text(data[:PIECE]),
        }
        if len(data) > PIECE:
            said["number"] = number = next(self._numbers)
            self._kept[number] = data
            while len(self._kept) > KEPT:
                del self._kept[min(self._kept)]
        return said

    # -- what there is

    @property
    def _engine(self) -> Engine:
        if self._host.engine is None:
            raise RuntimeError(f"rank {self._host.rank} has no prompt yet: session.prefill(…) first.")
        return self._host.engine

    def _chunks(self, layer: int) -> int:
        executor = self._engine.executor
        chunks = range(len(executor.plan.shape.chunks))
        return next((chunk for chunk in chunks if not executor.holds_block(chunk, layer)), len(chunks))

    def _held_rows(self, layer: int) -> int:
        prompt, chunks = self._engine.prompt, self._chunks(layer)
        made = prompt.plan.shape.chunks[chunks - 1].stop if chunks else 0
        if chunks == len(prompt.plan.shape.chunks) and self._host.tokens:
            made = self._host.tokens.rows or made
        return min(prompt.state.cache.capacity, made + prompt.state.extra.get(layer, 0))

    def _block(self, layer: int, start: int, stop: int) -> Tensor:
        stop = min(stop, self._held_rows(layer))
        return self._engine.prompt.state.cache.block(layer, min(start, stop), stop)

    def _hidden(self, chunk: int, layer: int) -> Tensor:
        state = self._engine.prompt.state
        found = hidden_before(
            self._engine.decoder, chunk, layer, state.hidden, state.cache, state.rows(chunk).start
        )
        if found is None:
            raise RuntimeError(
                f"rank {self._host.rank} has no hidden state of chunk {chunk} to come to layer {layer} from."
            )
        return found[0]


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
