"""Inspect: what a rank tells its session of the KV it holds, computed where the KV lies. Nothing here changes any.

Tensors go in safetensors format. Of many bytes the answer has the first, and the session asks for the others by number,
so that the rank's state still reaches the session meanwhile. A place is a row's index in a layer's cache.
"""

import itertools
from collections.abc import Callable, Sequence

import safetensors.torch
import torch
from torch import Tensor

from dinfer import messages
from dinfer.codec.coding import as_received
from dinfer.engine.prefill import Prefill
from dinfer.kv.digests import as_numbers, block_digests, row_digests
from dinfer.kv.measure import CellDifference, measure, per_head
from dinfer.model.attention import attention, hidden_before
from dinfer.rank.commands import Handler, looking
from dinfer.rank.decode import PromptOnRank
from dinfer.rank.inventory import Inventory

PIECE = 8 << 20
"""Bytes of one answer. More would hold up the rank's state for seconds on a slow network, and it would seem silent."""

KEPT = 4
"""How many answers are kept until they have been fetched; of one that is given up, the rest goes in time."""


def inspect_commands(rank: int, prompt: Callable[[], PromptOnRank]) -> list[Handler]:
    """A session asks them of a rank that stands, or that is blocked in decode. `prompt` raises RuntimeError where there
    is none."""
    found = Inspection(rank, prompt)
    return [
        looking(messages.ListKv, found.spans),
        looking(messages.DigestKv, found.digests),
        looking(messages.ReadNotedKv, found.ledger),
        looking(messages.ReadNotedRows, found.ledger_rows),
        looking(messages.DigestRows, found.row_digests),
        looking(messages.ReadRows, found.rows),
        looking(messages.ReadKvPart, found.part),
        looking(messages.SummarizeKv, found.summary),
        looking(messages.MeasureLoss, found.loss),
        looking(messages.ListHidden, found.hidden_spans),
        looking(messages.ReadHidden, found.hidden),
        looking(messages.SummarizeHidden, found.hidden_summary),
        looking(messages.ReadAttention, found.attention),
        looking(messages.ReadBlocks, found.blocks),
        looking(messages.ReadFinalHidden, found.final),
        looking(messages.ReadNotes, found.notes),
        looking(messages.ReadEdit, found.edit),
        looking(messages.ReadMore, found.more),
    ]


class Inspection:
    """Of one rank. Each method carries out the command that it takes; what it answers stands there."""

    def __init__(self, rank: int, prompt: Callable[[], PromptOnRank]) -> None:
        self._rank, self._prompt = rank, prompt
        self._numbers = itertools.count(1)
        self._kept: dict[int, bytes] = {}

    # -- KV

    def spans(self, _: messages.ListKv) -> messages.KvSpans:
        held = Inventory(self._prompt())
        layers = range(held.layers)
        spans, rows = tuple(map(held.chunks_held, layers)), tuple(map(held.rows_held, layers))
        return messages.KvSpans(spans, rows, held.new_rows)

    def digests(self, command: messages.DigestKv) -> messages.TensorData:
        held = Inventory(self._prompt())
        of_layers = [
            torch.stack([block_digests(row_digests(held.rows(layer, *span))) for span in command.spans])
            for layer in command.layers
        ]
        return self._answer(torch.stack(of_layers))

    def ledger(self, command: messages.ReadNotedKv) -> messages.NotedKv:
        blocks, came = list[messages.NotedBlock](), list[Tensor]()
        for (chunk, layer), entry in sorted(self._state().ledger.entries.items()):
            if layer in command.layers:
                differs = entry.announced not in (None, (0, 0), as_numbers(entry.digests))
                came.append(entry.digests)
                blocks.append(
                    messages.NotedBlock(chunk, layer, entry.announced if differs else None, entry.edited)
                )
        data = self._answer(torch.stack(came) if came else torch.zeros(0, 2, dtype=torch.int64))
        return messages.NotedKv(data.size, data.number, data.data, blocks=tuple(blocks))

    def ledger_rows(self, command: messages.ReadNotedRows) -> messages.TensorData:
        entry = self._state().ledger.entries.get((command.chunk, command.layer))
        return self._answer(entry.rows if entry else None)

    def row_digests(self, command: messages.DigestRows) -> messages.TensorData:
        held = Inventory(self._prompt())
        return self._answer(row_digests(held.rows(command.layer, command.start, command.stop)))

    def rows(self, command: messages.ReadRows) -> messages.TensorData:
        rows = Inventory(self._prompt()).rows(command.layer)
        return self._answer(rows[_index(command.places, rows)])

    def part(self, command: messages.ReadKvPart) -> messages.TensorData:
        rows = Inventory(self._prompt()).rows(command.layer)[:, command.tensor]
        heads, places = _index(command.heads, rows), _index(command.places, rows)
        return self._answer(rows.transpose(0, 1)[heads[:, None], places])

    def summary(self, command: messages.SummarizeKv) -> messages.TensorSummary:
        held = Inventory(self._prompt())
        return messages.TensorSummary(per_head(held.rows(command.layer, command.start, command.stop)))

    def loss(self, command: messages.MeasureLoss) -> messages.KvLoss:
        coded, found = self._state().coded, dict[str, CellDifference]()
        for key in coded.made_here():
            if key[0] in command.chunks and key[1] in command.layers:
                exact = coded.block(*key)
                made = as_received(coded.codec, exact)
                for index, name in enumerate("KV"):
                    one = measure(made[:, index], exact[:, index])
                    found[name] = found[name].with_(one) if name in found else one
        return messages.KvLoss(tuple(found.items()))

    # -- what the layers compute

    def hidden_spans(self, _: messages.ListHidden) -> messages.HiddenSpans:
        first: dict[int, int] = {}
        for chunk, layer in self._prompt().engine.prompt.state.hidden:
            first[chunk] = min(layer, first.get(chunk, layer))
        return messages.HiddenSpans(first)

    def hidden(self, command: messages.ReadHidden) -> messages.TensorData:
        return self._answer(self._hidden(command.chunk, command.layer))

    def hidden_summary(self, command: messages.SummarizeHidden) -> messages.TensorSummary:
        return messages.TensorSummary(per_head(self._hidden(command.chunk, command.layer)[:, None, None]))

    def attention(self, command: messages.ReadAttention) -> messages.AttentionData:
        engine, layer = self._prompt().engine, command.layer
        state = engine.prompt.state
        hidden, start = self._hidden(command.chunk, layer)[None], state.rows(command.chunk).start
        found = attention(engine.decoder, layer, hidden, state.coded.cache, start)
        weights = found.weights[list(command.heads)] if command.heads else found.weights
        data = self._answer(weights)
        return messages.AttentionData(data.size, data.number, data.data, first_key=found.first_key)

    def _hidden(self, chunk: int, layer: int) -> Tensor:
        engine = self._prompt().engine
        state = engine.prompt.state
        start = state.rows(chunk).start
        found = hidden_before(engine.decoder, chunk, layer, state.hidden, state.coded.cache, start)
        if found is None:
            raise RuntimeError(
                f"rank {self._rank} has no hidden state of chunk {chunk} to come to layer {layer} from."
            )
        return found[0]

    # -- what a replay needs beside that

    def blocks(self, command: messages.ReadBlocks) -> messages.TensorData:
        state = self._state()
        return self._answer(torch.cat([state.block(chunk, command.layer) for chunk in command.chunks]))

    def final(self, _: messages.ReadFinalHidden) -> messages.TensorData:
        return self._answer(self._prompt().engine.prompt.state.final)

    def notes(self, _: messages.ReadNotes) -> messages.RankNotes:
        engine, tokens = self._prompt()
        edits = (
            messages.EditedBlocks(edit.positions, tuple(edit.kv), tuple(edit.hidden))
            for edit in engine.prompt.edits.history
        )
        return messages.RankNotes(tuple(tokens.tokens), tuple(edits))

    def edit(self, command: messages.ReadEdit) -> messages.TensorData:
        edit = self._prompt().engine.prompt.edits.history[command.number]
        tensors = edit.kv if command.what == "kv" else edit.hidden
        return self._answer(tensors[command.chunk, command.layer])

    def _state(self) -> Prefill:
        """The prompt's, with all blocks as all ranks get them."""
        return Inventory(self._prompt()).state

    # -- tensors as bytes

    def more(self, command: messages.ReadMore) -> messages.TensorData:
        data = self._kept.get(command.number)
        if data is None:
            raise RuntimeError(f"rank {self._rank} has given up that answer: ask again.")
        start = command.start
        if start + PIECE >= len(data):
            del self._kept[command.number]
        return messages.TensorData(len(data), command.number, data[start : start + PIECE])

    def _answer(self, tensor: Tensor | None) -> messages.TensorData:
        """One tensor, or none, and the rest of its bytes kept for `more`."""
        tensors = {} if tensor is None else {"tensor": tensor.detach().contiguous().cpu()}
        data = safetensors.torch.save(tensors)
        if len(data) <= PIECE:
            return messages.TensorData(len(data), 0, data)
        number = next(self._numbers)
        self._kept[number] = data
        while len(self._kept) > KEPT:
            del self._kept[min(self._kept)]
        return messages.TensorData(len(data), number, data[:PIECE])


def _index(places: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(places, dtype=torch.long, device=like.device)
