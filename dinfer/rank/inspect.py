"""Inspect: what a rank tells its session of the KV it holds, computed where the KV lies. Nothing here changes any.

Tensors go in safetensors format. Of many bytes the answer has the first, and the session asks for the others by number,
so that the rank's state still reaches the session meanwhile. A place is a row's index in a layer's cache.
"""

import itertools
from collections.abc import Sequence
from typing import Protocol

import safetensors.torch
import torch
from torch import Tensor

from dinfer.engine.engine import Engine
from dinfer.kv.digests import as_numbers, block_digests, row_digests
from dinfer.kv.measure import per_head
from dinfer.messages import (
    AttentionData,
    DigestKv,
    DigestRows,
    EditedBlocks,
    HiddenSpans,
    KvSpans,
    ListHidden,
    ListKv,
    NotedBlock,
    NotedKv,
    RankNotes,
    ReadAttention,
    ReadBlocks,
    ReadEdit,
    ReadFinalHidden,
    ReadHidden,
    ReadKvPart,
    ReadMore,
    ReadNotedKv,
    ReadNotedRows,
    ReadNotes,
    ReadRows,
    SummarizeHidden,
    SummarizeKv,
    TensorData,
    TensorSummary,
)
from dinfer.model.attention import attention, hidden_before
from dinfer.rank.commands import Handler, slow
from dinfer.rank.decode import Tokens

PIECE = 8 << 20
"""Bytes of one answer. More would hold up the rank's state for seconds on a slow network, and it would seem silent."""

KEPT = 4
"""How many answers are kept until they have been fetched; of one that is given up, the rest goes in time."""


class InspectedRank(Protocol):
    """One rank of a session."""

    rank: int

    @property
    def engine(self) -> Engine | None: ...

    @property
    def tokens(self) -> Tokens | None: ...


def inspect_commands(service: InspectedRank) -> list[Handler]:
    """They are slow: they compute on the rank's device, and a session asks them of a rank that stands."""
    found = Inspection(service)
    return [
        slow(ListKv, found.spans),
        slow(DigestKv, found.digests),
        slow(ReadNotedKv, found.noted),
        slow(ReadNotedRows, found.noted_rows),
        slow(DigestRows, found.row_digests),
        slow(ReadRows, found.rows),
        slow(ReadKvPart, found.part),
        slow(SummarizeKv, found.summary),
        slow(ListHidden, found.hidden_spans),
        slow(ReadHidden, found.hidden),
        slow(SummarizeHidden, found.hidden_summary),
        slow(ReadAttention, found.attention),
        slow(ReadBlocks, found.blocks),
        slow(ReadFinalHidden, found.final),
        slow(ReadNotes, found.notes),
        slow(ReadEdit, found.edit),
        slow(ReadMore, found.more),
    ]


class Inspection:
    """Of one rank. Each method carries out the command that it takes; what it answers stands there."""

    def __init__(self, service: InspectedRank) -> None:
        self._service = service
        self._numbers = itertools.count(1)
        self._kept: dict[int, bytes] = {}

    # -- KV

    def spans(self, _: ListKv) -> KvSpans:
        layers = range(self._engine.decoder.num_layers)
        spans = [self._chunks(layer) for layer in layers]
        whole = len(self._engine.prompt.plan.shape.chunks)
        new = bool(self._service.tokens and len(self._service.tokens.tokens) > 1)
        rows = tuple(self._held_rows(layer) for layer in layers)
        return KvSpans(tuple(count + (new and count == whole) for count in spans), rows)

    def digests(self, command: DigestKv) -> TensorData:
        of_layers = [
            torch.stack([block_digests(row_digests(self._block(layer, *span))) for span in command.spans])
            for layer in command.layers
        ]
        return self._answer(torch.stack(of_layers))

    def noted(self, command: ReadNotedKv) -> NotedKv:
        blocks, came = list[NotedBlock](), list[Tensor]()
        for (chunk, layer), entry in sorted(self._engine.prompt.state.ledger.entries.items()):
            if layer in command.layers:
                differs = entry.announced not in (None, (0, 0), as_numbers(entry.digests))
                came.append(entry.digests)
                blocks.append(NotedBlock(chunk, layer, entry.announced if differs else None, entry.edited))
        data = self._answer(torch.stack(came) if came else torch.zeros(0, 2, dtype=torch.int64))
        return NotedKv(data.size, data.number, data.data, blocks=tuple(blocks))

    def noted_rows(self, command: ReadNotedRows) -> TensorData:
        entry = self._engine.prompt.state.ledger.entries.get((command.chunk, command.layer))
        return self._answer(entry.rows if entry else None)

    def row_digests(self, command: DigestRows) -> TensorData:
        return self._answer(row_digests(self._block(command.layer, command.start, command.stop)))

    def rows(self, command: ReadRows) -> TensorData:
        held = self._block(command.layer, 0, self._held_rows(command.layer))
        return self._answer(held[_index(command.places, held)])

    def part(self, command: ReadKvPart) -> TensorData:
        held = self._block(command.layer, 0, self._held_rows(command.layer))[:, command.tensor]
        heads, places = _index(command.heads, held), _index(command.places, held)
        return self._answer(held.transpose(0, 1)[heads[:, None], places])

    def summary(self, command: SummarizeKv) -> TensorSummary:
        return TensorSummary(per_head(self._block(command.layer, command.start, command.stop)))

    # -- what the layers compute

    def hidden_spans(self, _: ListHidden) -> HiddenSpans:
        first: dict[int, int] = {}
        for chunk, layer in self._engine.prompt.state.hidden:
            first[chunk] = min(layer, first.get(chunk, layer))
        return HiddenSpans(first)

    def hidden(self, command: ReadHidden) -> TensorData:
        return self._answer(self._hidden(command.chunk, command.layer))

    def hidden_summary(self, command: SummarizeHidden) -> TensorSummary:
        return TensorSummary(per_head(self._hidden(command.chunk, command.layer)[:, None, None]))

    def attention(self, command: ReadAttention) -> AttentionData:
        chunk, layer, state = command.chunk, command.layer, self._engine.prompt.state
        hidden, start = self._hidden(chunk, layer)[None], state.rows(chunk).start
        found = attention(self._engine.decoder, layer, hidden, state.cache, start)
        weights = found.weights[list(command.heads)] if command.heads else found.weights
        data = self._answer(weights)
        return AttentionData(data.size, data.number, data.data, first_key=found.first_key)

    # -- what a replay needs beside that

    def blocks(self, command: ReadBlocks) -> TensorData:
        state = self._engine.prompt.state
        return self._answer(torch.cat([state.block(chunk, command.layer) for chunk in command.chunks]))

    def final(self, _: ReadFinalHidden) -> TensorData:
        return self._answer(self._engine.prompt.state.final)

    def notes(self, _: ReadNotes) -> RankNotes:
        edits = self._engine.prompt.edits.history
        tokens = self._service.tokens.tokens if self._service.tokens else []
        return RankNotes(
            tuple(tokens),
            tuple(EditedBlocks(edit.positions, tuple(edit.kv), tuple(edit.hidden)) for edit in edits),
        )

    def edit(self, command: ReadEdit) -> TensorData:
        edit = self._engine.prompt.edits.history[command.number]
        tensors = edit.kv if command.what == "kv" else edit.hidden
        return self._answer(tensors[command.chunk, command.layer])

    # -- tensors as bytes

    def more(self, command: ReadMore) -> TensorData:
        data = self._kept.get(command.number)
        if data is None:
            raise RuntimeError(f"rank {self._service.rank} has given up that answer: ask again.")
        start = command.start
        if start + PIECE >= len(data):
            del self._kept[command.number]
        return TensorData(len(data), command.number, data[start : start + PIECE])

    def _answer(self, tensor: Tensor | None) -> TensorData:
        """One tensor, or none, and the rest of its bytes kept for `more`."""
        tensors = {} if tensor is None else {"tensor": tensor.detach().contiguous().cpu()}
        data = safetensors.torch.save(tensors)
        if len(data) <= PIECE:
            return TensorData(len(data), 0, data)
        number = next(self._numbers)
        self._kept[number] = data
        while len(self._kept) > KEPT:
            del self._kept[min(self._kept)]
        return TensorData(len(data), number, data[:PIECE])

    # -- what there is

    @property
    def _engine(self) -> Engine:
        if self._service.engine is None:
            raise RuntimeError(f"rank {self._service.rank} has no prompt yet: session.prefill(…) first.")
        return self._service.engine

    def _chunks(self, layer: int) -> int:
        executor = self._engine.executor
        chunks = range(len(executor.plan.shape.chunks))
        return next((chunk for chunk in chunks if not executor.holds_block(chunk, layer)), len(chunks))

    def _held_rows(self, layer: int) -> int:
        prompt, chunks = self._engine.prompt, self._chunks(layer)
        made = prompt.plan.shape.chunks[chunks - 1].stop if chunks else 0
        if chunks == len(prompt.plan.shape.chunks) and self._service.tokens:
            made = self._service.tokens.rows or made
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
                f"rank {self._service.rank} has no hidden state of chunk {chunk} to come to layer {layer} from."
            )
        return found[0]


def _index(places: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(places, dtype=torch.long, device=like.device)
