"""Compares what a rank holds with transformers' own forward, run on that rank: the forward, and its commands.

Each tensor is compared on its device as soon as the forward has made it, and only figures are kept. The forward may run
in other chunks or in another dtype than the run did. What a difference means is decided in `kv.reference`.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Protocol

import torch
from torch import Tensor

from dinfer.engine.engine import Engine
from dinfer.errors import ModelError
from dinfer.kv.digests import as_numbers, block_digests, row_digests
from dinfer.kv.measure import CellDifference, measure
from dinfer.kv.reference.reports import FINAL, TokenChoice
from dinfer.kv.rows import Misplaced, misplaced_in_blocks, misplaced_rows
from dinfer.messages import (
    DigestHidden,
    HiddenDigests,
    Ok,
    ReferenceReport,
    RunReference,
    StopReference,
)
from dinfer.model.cache import KVCache
from dinfer.model.decoder import Decoder
from dinfer.model.free import free
from dinfer.model.memory import need, size_text
from dinfer.model.reference import Forward
from dinfer.model.sampling import Sampler, Sampling
from dinfer.rank.commands import Handler, quick, slow
from dinfer.rank.decode import Tokens
from dinfer.rank.inventory import Inventory, InventoryKey, hidden_digest, zero_row_digest


class LayerReplay:
    """Computes again what entered each layer of one rank's run. Ask for each chunk's layers in order."""

    def __init__(self, decoder: Decoder, holding: Inventory) -> None:
        self._decoder, self._holding = decoder, holding
        self._scratch = _Scratch(holding.cache)
        self._at: dict[int, Tensor | None] = {}

    def hidden(self, chunk: int, rows: range, layer: int) -> Tensor | None:
        """What entered `layer`, [1, tokens, hidden_size], for these rows of that chunk; the rank's own tensor if it is
        kept. None if the run has not come that far, or this rank lacks the KV to compute it."""
        kept = self._holding.state.hidden.get((chunk, layer))
        if kept is not None:
            self._at[rows.start] = kept
        elif layer == 0:
            self._at[rows.start] = self._decoder.embed(self._holding.ids[rows.start : rows.stop])
        else:
            self._at[rows.start] = self._next(chunk, rows, layer - 1)
        return self._at[rows.start]

    def _next(self, chunk: int, rows: range, layer: int) -> Tensor | None:
        before = self._at[rows.start]
        if before is None or not all(self._holding.holds(n, layer) for n in range(chunk + 1)):
            return None
        self._scratch.take(self._holding.cache, layer, rows.start)
        return self._decoder.layer(layer, before, self._scratch, rows.start)


class _Scratch(KVCache):
    """A cache with room for one layer, whichever that is."""

    def __init__(self, like: KVCache) -> None:
        super().__init__(1, like.capacity, like.kv_heads, like.head_dim, like.dtype, like.device)

    def tensor(self, layer: int) -> Tensor:  # noqa: ARG002 - the same for all
        return self._tensors[0]

    def take(self, cache: KVCache, layer: int, rows: int) -> None:
        self._tensors[0][:rows].copy_(cache.block(layer, 0, rows))


class Examination:
    """One forward, compared with one rank. `decoder`: the rank's model; `reference`: the model that the forward runs;
    `chunks`: how many of the prompt's chunks to run; new tokens follow only after all of them. `check()` is called
    often and may raise, to stop it."""

    def __init__(
        self,
        decoder: Decoder,
        reference: Decoder,
        holding: Inventory,
        sampler: Sampler,
        *,
        chunks: int,
        chunked: bool,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.exact = chunked and reference.dtype == decoder.dtype
        self.measured: dict[tuple[int, int, str], CellDifference] = {}
        self.hidden: dict[InventoryKey, int] = {}
        """digests of the reference's hidden states, or of this rank's if bits may differ"""
        self.choices: list[TokenChoice] = []
        self._holding, self._sampler, self._check = holding, sampler, check
        self._chunked, self._chunks = chunked, chunks
        self._rows: list[list[Tensor]] = [[] for _ in range(holding.layers)]
        self._replay = LayerReplay(decoder, holding)
        self._forward = Forward(reference, self._see)
        self._piece = range(0)

    def run(self) -> None:
        """Feed the prompt, then the run's new tokens one by one. Raises what `check` raises."""
        holding, tokens = self._holding, self._holding.tokens
        for rows in self._pieces():
            self._piece = rows
            fed = self._forward.feed(holding.ids[rows.start : rows.stop])
            if rows.stop == len(holding.state.ids):
                self._compare_final(fed.hidden[:, -1:])
            step = rows.stop - len(holding.state.ids)
            if 0 <= step < len(tokens):
                self._compare_choice(step, tokens[step], fed.logits)

    def expected_rows(self) -> int:
        """How many tokens were fed."""
        return self._piece.stop

    def digests(self) -> dict[InventoryKey, tuple[int, int]]:
        """The digests of the reference's blocks; empty if bits may differ."""
        if not self.exact:
            return {}
        found = {}
        for layer, pieces in enumerate(self._rows):
            rows = torch.cat(pieces)
            for chunk, span in enumerate(self._holding.chunks):
                if span.stop <= len(rows):
                    found[chunk, layer] = as_numbers(block_digests(rows[span.start : span.stop]))
        return found

    def misplaced(self) -> dict[int, list[Misplaced]]:
        """By layer, the rows that lie where others should. If bits may differ, the right rows are unknown: then only
        rows that repeat others are named, and only in layers of the wrong length."""
        layers = range(self._holding.layers)
        return {layer: found for layer in layers if (found := self._misplaced(layer))}

    def _misplaced(self, layer: int) -> list[Misplaced]:
        due, held = self._holding.rows_due(layer), self._holding.rows_held(layer)
        if held == due and not (self.exact and self._differs(layer)):
            return []
        got = row_digests(self._holding.cache.block(layer, 0, held)).cpu()
        want = torch.cat(self._rows[layer])[:due].cpu() if self.exact else got
        if held != due:
            return misplaced_rows(got, want)
        return misplaced_in_blocks(got, want, self._holding.chunks, zero_row_digest(self._holding.cache))

    def _pieces(self) -> Sequence[range]:
        prompt = self._holding.chunks[: self._chunks]
        if not self._chunked and prompt:
            prompt = [range(prompt[-1].stop)]
        whole = prompt and prompt[-1].stop == len(self._holding.state.ids)
        new = range(len(self._holding.state.ids), len(self._holding.ids)) if whole else ()
        return [*prompt, *(range(at, at + 1) for at in new)]

    def _see(self, what: str, layer: int, tensor: Tensor) -> None:
        self._check()
        if what == "kv" and self.exact:
            self._rows[layer].append(row_digests(tensor))
        for chunk, span in enumerate(self._holding.chunks):
            rows = range(max(span.start, self._piece.start), min(span.stop, self._piece.stop))
            if rows:
                here = slice(rows.start - self._piece.start, rows.stop - self._piece.start)
                if what == "kv":
                    self._compare_block(chunk, layer, rows, tensor[here])
                else:
                    self._compare_hidden(chunk, layer, rows, tensor[:, here])

    def _compare_block(self, chunk: int, layer: int, rows: range, theirs: Tensor) -> None:
        if not self._holding.holds(chunk, layer):
            return
        mine = self._holding.cache.block(layer, rows.start, rows.stop)
        for index, name in enumerate("KV"):
            self._note((chunk, layer, name), measure(mine[:, index], theirs[:, index], rows.start))

    def _compare_hidden(self, chunk: int, layer: int, rows: range, theirs: Tensor) -> None:
        mine = self._replay.hidden(chunk, rows, layer)
        if mine is not None:
            self._note((chunk, layer, "hidden"), measure(mine[0], theirs[0], rows.start))
        digested = theirs if self.exact else mine
        if digested is not None and chunk < self._holding.prompt_chunks:
            self.hidden[chunk, layer] = int(hidden_digest(digested))

    def _compare_final(self, theirs: Tensor) -> None:
        mine, chunk = self._holding.state.final, self._holding.prompt_chunks - 1
        if mine is not None:
            key = (chunk, self._holding.layers + 1)
            self._note((*key, FINAL), measure(mine[0], theirs[0], len(self._holding.state.ids) - 1))
            self.hidden[key] = int(hidden_digest(theirs if self.exact else mine))

    def _compare_choice(self, step: int, token: int, logits: Tensor) -> None:
        chosen = self._sampler(logits, step)
        if chosen != token:
            self.choices.append(TokenChoice(step, token, chosen, float(logits[chosen] - logits[token])))

    def _note(self, key: tuple[int, int, str], found: CellDifference) -> None:
        before = self.measured.get(key)
        self.measured[key] = before.with_(found) if before else found

    def _differs(self, layer: int) -> bool:
        return any(
            one.changed for (_, at, name), one in self.measured.items() if at == layer and name in "KV"
        )


class Holder(Protocol):
    """What there is on a rank."""

    @property
    def decoder(self) -> Decoder | None: ...

    @property
    def engine(self) -> Engine | None: ...

    @property
    def tokens(self) -> Tokens | None: ...


class Stopped(RuntimeError):
    """The session does not want the answer any more."""


def reference_commands(holder: Holder) -> list[Handler]:
    """For `run.compare`, which sends DigestHidden to all ranks, then RunReference where it is needed."""
    references = References(holder)
    return [
        slow(DigestHidden, references.hidden),
        slow(RunReference, references.run),
        quick(StopReference, references.stop),
    ]


class References:
    """Of one rank."""

    def __init__(self, holder: Holder) -> None:
        self._holder = holder
        self._stopped = threading.Event()

    def hidden(self, _: DigestHidden) -> HiddenDigests:
        """Digests of the hidden states that are here now."""
        holding = self._holding()
        _settle(holding.cache.device)
        return HiddenDigests(tuple((*key, digest) for key, digest in holding.hidden_digests().items()))

    def run(self, command: RunReference) -> ReferenceReport:
        """The forward, and how what is here differs from it. Raises ModelError where memory would not do."""
        self._stopped.clear()
        decoder, engine = self._holder.decoder, self._holder.engine
        holding = self._holding()
        assert decoder is not None
        assert engine is not None
        started = perf_counter()
        _settle(holding.cache.device)
        piece = engine.config.chunk_size if command.chunked else len(holding.ids)
        with _in_dtype(decoder, command.dtype, len(holding.ids), piece) as reference:
            config = engine.config
            sampler = Sampler(Sampling(config.temperature, config.top_k, config.top_p, config.seed))
            found = Examination(
                decoder, reference, holding, sampler,
                chunks=command.chunks, chunked=command.chunked, check=self._check,
            )  # fmt: skip
            found.run()
            return ReferenceReport(
                exact=found.exact,
                rows=found.expected_rows(),
                threads=torch.get_num_threads(),
                seconds=perf_counter() - started,
                device=str(reference.device),
                choices=tuple(found.choices),
                blocks=tuple((*key, digests) for key, digests in found.digests().items()),
                hidden=tuple((*key, digest) for key, digest in found.hidden.items()),
                misplaced=tuple((layer, one) for layer, rows in found.misplaced().items() for one in rows),
                measured=tuple((*key, one) for key, one in found.measured.items()),
            )

    def stop(self, _: StopReference) -> Ok:
        self._stopped.set()
        return Ok()

    def _check(self) -> None:
        if self._stopped.is_set():
            raise Stopped("compare was interrupted")

    def _holding(self) -> Inventory:
        if self._holder.engine is None:
            raise RuntimeError("there is no prompt yet: session.prefill(…) first.")
        tokens = self._holder.tokens
        executor = self._holder.engine.executor
        return Inventory(executor, tokens.tokens, tokens.rows) if tokens else Inventory(executor, [])


@contextmanager
def _in_dtype(decoder: Decoder, dtype: str, tokens: int, piece: int) -> Iterator[Decoder]:
    """The model in a dtype: the rank's own, or the same checkpoint once more. Raises ModelError for lack of memory."""
    own = _name(decoder.dtype)
    _check_memory(decoder, dtype, tokens, piece, again=dtype != own)
    if dtype == own:
        yield decoder
    else:
        yield Decoder.load(decoder.spec.path, dtype, str(decoder.device))


def _check_memory(decoder: Decoder, dtype: str, tokens: int, piece: int, *, again: bool) -> None:
    wanted = need(decoder.spec, dtype, tokens, piece)
    parts = {"a second KV": wanted.kv_bytes, "hidden states and a layer's work": wanted.hidden_bytes}
    if again:
        parts[f"the weights once more, in {dtype}"] = wanted.weights_bytes
    total, available = sum(parts.values()), free(str(decoder.device))
    if available is not None and total > available:
        said = ", ".join(f"{name} {size_text(size)}" for name, size in parts.items())
        advice = (
            "compare in the run's own dtype" if again else "compare a shorter prompt, or free memory first"
        )
        raise ModelError(
            f"the reference needs {size_text(total)} on {decoder.device} ({said}); {size_text(available)} are free: "
            f"{advice}."
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _settle(device: torch.device) -> None:
    """Have all that was issued to a GPU be done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
