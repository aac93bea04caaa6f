"""The state of one prompt on one rank during prefill: KV cache, hidden states, ledger."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from dinfer.codec.choice import NONE, Codec
from dinfer.engine.coded import CodedBlocks
from dinfer.engine.corruption import Alarm, Corruption
from dinfer.engine.faults import Faults
from dinfer.engine.finite import FiniteCheck
from dinfer.kv.ledger import UNKNOWN, BlockKey, Ledger, LedgerEntry
from dinfer.model.cache import KVCache
from dinfer.model.decoder import Decoder
from dinfer.model.kernels.graphs import LayerGraphs
from dinfer.model.kernels.table import Kept
from dinfer.plan.ops import FINAL, Op, Value
from dinfer.plan.plan import Lane, Plan
from dinfer.transport.cuda_order import Ordering
from dinfer.transport.header import Header


class Prefill:
    """One prompt's state on one rank.

    `hidden`: (chunk, layer) → the hidden state before that layer, [1, tokens, hidden_size]. Those that entered this
    rank (by embedding or from a peer) are kept, so that going back can recompute from them; the others are dropped once
    every op that needs them has run. `final`: the normed hidden state of the last token, [1, 1, hidden_size].
    `differing`: (chunk, layer) → how a received block differs from its digests. `extra`: by layer, rows beyond the
    plan's, from faults. `digests`: whether to keep a ledger; `alarm` is called for corrupted blocks;
    `finite` looks for NaN and Inf. `codec`: of blocks on the wire, see `coded`.
    `graphs`: run layers; None: transformers' own kernels do.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        plan: Plan,
        rank: int,
        ids: Sequence[int],
        *,
        digests: bool,
        alarm: Alarm,
        finite: FiniteCheck,
        graphs: LayerGraphs | None = None,
        codec: Codec = NONE,
    ) -> None:
        self.decoder, self.cache, self.plan, self.rank = decoder, cache, plan, rank
        self.ids = list(ids)
        self.hidden: dict[tuple[int, int], Tensor] = {}
        self.final: Tensor | None = None
        self.ledger = Ledger(rank, on=digests)
        self.alarm, self.finite = alarm, finite
        self.differing: dict[tuple[int, int], str] = {}
        self.extra: dict[int, int] = {}
        self.ordering = Ordering(cache.device)
        own = [op for lane in plan.lanes[rank] for op in lane.ops]
        self.faults = Faults(self, own)
        self.coded = CodedBlocks(self, codec)
        self._entered = {v for op in own if op.kind in ("embed", "recv") for v in op.makes()}
        self._uses = Counter(need for op in own for need in op.needs() if need.what == "hidden")
        self._ids = decoder.checked_ids(self.ids)
        self._graphs = graphs
        self._kept: Kept | None = None
        self._chained = _chained(plan.lanes[rank])
        """hidden states that the next layer takes at once: they may stay in the graphs' buffer"""
        if graphs is not None:
            slots = len(plan.shape.chunks)
            self._kept = Kept.of(cache, slots, digests=digests, largest=finite.of_layers)
            self.ledger.kept = self._kept_digests

    @property
    def kernels(self) -> str:
        """What runs the layers: "exact", "graph" or "compiled"."""
        return "exact" if self._graphs is None else self._graphs.mode

    def _kept_digests(self, key: BlockKey) -> LedgerEntry:
        """The digests that a graph has taken of a block."""
        kept, (chunk, layer), rows = self._kept, key, self.rows(key[0])
        assert kept is not None
        assert kept.rows is not None
        assert kept.blocks is not None
        return LedgerEntry(kept.rows[layer, rows.start : rows.stop], kept.blocks[layer, chunk])

    def free(self) -> None:
        """Free the tensors, so that a leftover reference to this prompt does not keep its KV in memory."""
        self.finite.close()
        self.coded.free()
        self.cache, self.hidden, self.final = self.decoder.new_cache(1), {}, None
        self.ledger.keep(())
        self._graphs = self._kept = None

    def rows(self, chunk: int) -> range:
        """The token positions of a chunk."""
        return self.plan.shape.chunks[chunk]

    def block(self, chunk: int, layer: int) -> Tensor:
        """The block in the cache, a view [tokens, 2, kv_heads, head_dim]."""
        rows = self.rows(chunk)
        return self.cache.block(layer, rows.start, rows.stop)

    def embed(self, chunk: int) -> Tensor:
        """The embeddings of a chunk's tokens, [1, tokens, hidden_size]."""
        rows = self.rows(chunk)
        return self.decoder.embed_known(self._ids[rows.start : rows.stop])

    def take_hidden(self, chunk: int, layer: int) -> Tensor:
        """The hidden state before `layer`, [1, tokens, hidden_size]; dropped after the last op that needs it."""
        value = Value("hidden", chunk, layer)
        self._uses[value] -= 1
        if self._uses[value] <= 0 and value not in self._entered:
            return self.hidden.pop((chunk, layer))
        return self.hidden[chunk, layer]

    def receive_block(self, op: Op, announced: Tensor, block: Tensor) -> Tensor | None:
        """Enter a received block into the ledger, with the signature of its header, int64 [3]. Returns its digests,
        int64 [2], on the signature's device; None without a ledger."""
        return self.receive_decoded(op, announced, block, None)

    def receive_decoded(
        self, op: Op, announced: Tensor, block: Tensor, meanwhile: Callable[[], None] | None
    ) -> Tensor | None:
        """As `receive_block`; `meanwhile` is called now and then."""
        if self.faults.on_wire(op, block):
            self.coded.changed((op.chunk, op.layer))
        found = self.ledger.arrived((op.chunk, op.layer), block, announced, meanwhile)
        self.faults.in_memory(op, block)
        return found

    def receive_hidden(self, op: Op, _: Tensor, hidden: Tensor) -> None:
        """Look at a received hidden state, [1, tokens, hidden_size]; on a stream, where nothing is signed."""
        self.finite.made(op, hidden)

    def check_digests(self, op: Op, came: Header, found: tuple[int, int] | None) -> Corruption | None:
        """Compare the digests of a received block with those in its header; returns how it was corrupted."""
        self.differing.pop((op.chunk, op.layer), None)
        if found is None or came.digests in (UNKNOWN, found):
            return None
        changed = [name for name, one, other in zip("KV", came.digests, found, strict=True) if one != other]
        first = came.changed - 1 if came.changed else None
        names = " and ".join(changed)
        corrupt = Corruption(self.rank, op.chunk, op.layer, names, came.nbytes, op.peer, first)
        self.differing[op.chunk, op.layer] = corrupt.what
        return corrupt

    def changed_blocks(self) -> list[Corruption]:
        """The blocks that have changed in memory, by chunk and layer. Waits for the device once, and once for each."""
        changed = {key: self.ledger.changed(key, self.block(*key)) for key in sorted(self.ledger.entries)}
        flags = torch.stack([rows.any() for rows in changed.values()]).tolist() if changed else []
        found = []
        for (chunk, layer), rows in (one for one, flag in zip(changed.items(), flags, strict=True) if flag):
            places = rows.nonzero().tolist()  # in the order of token in the block, K or V, head
            names = [name for n, name in enumerate("KV") if any(place[1] == n for place in places)]
            token, _, head = places[0]
            where = {"rows": len(places), "token": self.rows(chunk).start + token, "head": head}
            nbytes = self.block(chunk, layer).nbytes
            found.append(Corruption(self.rank, chunk, layer, " and ".join(names), nbytes, **where))
        return found

    def made_by(self, op: Op) -> list[tuple[str, Tensor]]:
        """The tensors that an op made on this rank, by name: K, V, and the hidden state if it is still needed."""
        made = []
        if op.kind == "layer" or (op.kind == "recv" and op.what == "kv"):
            block = (self.coded if op.kind == "layer" else self).block(op.chunk, op.layer)
            made += [("K", block[:, 0]), ("V", block[:, 1])]
        for value in op.makes():
            if value.what == "hidden" and (hidden := self.hidden.get((value.chunk, value.layer))) is not None:
                made.append(("hidden", hidden))
            elif value.what == "final" and self.final is not None:
                made.append(("final", self.final))
        return made

    def record_edits(self, layers: Collection[int]) -> None:
        """Take digests of these layers' blocks again: the user has edited KV or hidden states on the default stream."""
        self.ordering.forget()
        for chunk, layer in [key for key in self.ledger.entries if key[1] in layers]:
            if self.ledger.edited((chunk, layer), self.block(chunk, layer)):
                self.coded.edited((chunk, layer))

    def layer(self, op: Op) -> None:
        """Run a layer op: compute its block and the next hidden state, look for NaN and Inf, and take digests."""
        key, following = (op.chunk, op.layer), (op.chunk, op.layer + 1)
        output, is_kept = self._run(*key, self.take_hidden(*key), self._kept)
        if is_kept and not self.faults.are_armed and self.finite.of_layers is not None:
            self.finite.kept(op)
            if self.ledger.on:
                self.ledger.made_by_graph(key)
            self.coded.computed(key)
        else:
            self._look_at(op, output)
        if (uses := self._uses[Value("hidden", *following)]) > 0:
            stays = self._graphs is None or (uses == 1 and following in self._chained)
            self.hidden[following] = output if stays else output.clone()

    def _look_at(self, op: Op, output: Tensor) -> None:
        """Let faults strike what a layer op has made, take its digests, and look for NaN and Inf."""
        block = self.coded.block(op.chunk, op.layer)
        self.faults.computed(op, block)
        self.finite.made(op, output, block)
        if not self.coded.computed((op.chunk, op.layer)):
            self.ledger.made((op.chunk, op.layer), block)
            self.faults.in_memory(op, block)

    def _run(self, chunk: int, layer: int, hidden: Tensor, kept: Kept | None) -> tuple[Tensor, bool]:
        """Run a layer on a chunk's hidden state and write its block.

        Returns the next hidden state, same shape, and whether it was a graph, which has kept what `kept` is for; then
        the hidden state lies in a buffer that the next run overwrites.
        """
        rows, shift, graphs = self.rows(chunk), self.faults.shift(chunk, layer), self._graphs
        if graphs is None or shift or not graphs.holds(len(rows), rows.stop):
            cache = self.coded.cache
            output = self.decoder.layer(layer, hidden, cache, rows.start)
            if shift:
                self.faults.note_right(chunk, layer, self.coded.block(chunk, layer))
                output = self.decoder.layer(layer, hidden, cache, rows.start, shift)
            return output, False
        graphs.bind(self.cache, kept)
        graphs.begin(len(rows), rows.start, chunk)
        return graphs.run(layer, hidden), True

    def rewind(self, done: Iterable[Op], todo: Iterable[Op]) -> None:
        """Go back to the state in which exactly the ops `done` have run.

        Hidden states that `todo` needs and that were dropped are recomputed from those that entered the rank.
        """
        done, todo = list(done), list(todo)
        made = {value for op in done for value in op.makes()}
        self.ordering.forget()
        self.finite.rewound(done)
        self._uses = Counter(need for op in todo for need in op.needs() if need.what == "hidden")
        if FINAL not in made:
            self.final = None
        self.ledger.keep({(value.chunk, value.layer) for value in made if value.what == "kv"})
        self.coded.rewound(made, todo)
        self.faults.rewound(lambda chunk, layer: Value("kv", chunk, layer) in made, todo)
        for key in list(self.hidden):
            value = Value("hidden", *key)
            if value not in made or not (value in self._entered or self._uses[value] > 0):
                del self.hidden[key]
        if self._graphs is not None:  # what lies in their buffer would be overwritten
            self.hidden = {key: hidden.clone() for key, hidden in self.hidden.items()}
        for _, chunk, layer in sorted(made.intersection(self._uses)):
            if (chunk, layer) in self.hidden:
                continue
            entry = max(known for c, known in self.hidden if c == chunk and known < layer)
            hidden = self.hidden[chunk, entry]
            for index in range(entry, layer):
                block = self.coded.block(chunk, index)
                current = block.clone()
                hidden, _ = self._run(chunk, index, hidden, None)
                block.copy_(current)  # a fault or the user may have changed it since it was computed
            self.hidden[chunk, layer] = hidden if self._graphs is None else hidden.clone()


def _chained(lanes: Iterable[Lane]) -> set[tuple[int, int]]:
    """The hidden states, by chunk and layer, that the next layer op of their lane takes."""
    found = set()
    for lane in lanes:
        layers = [op for op in lane.ops if op.kind == "layer"]
        found |= {
            (b.chunk, b.layer) for a, b in pairwise(layers) if (a.chunk, a.layer + 1) == (b.chunk, b.layer)
        }
    return found
