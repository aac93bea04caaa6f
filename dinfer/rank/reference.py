"""Compares what a rank holds with transformers' own forward, run on that rank: the forward, and its commands.

Each tensor is compared on its device as soon as the forward has made it, and only figures are kept. The forward may run
in other chunks or in another dtype than the run did. What a difference means is decided in `kv.reference`.
"""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter

import torch
from torch import Tensor

from dinfer.codec.coding import as_received
from dinfer.engine.engine import Engine
from dinfer.errors import ModelError
from dinfer.kv.digests import as_numbers, block_digests, row_digests
from dinfer.kv.measure import CellDifference, measure
from dinfer.kv.reference.reports import FINAL, TokenChoice
from dinfer.kv.rows import Misplaced, misplaced_in_blocks, misplaced_rows
from dinfer.messages import (
    Comparing,
    DigestHidden,
    HiddenDigests,
    ReferenceReport,
    RunReference,
    StopReference,
)
from dinfer.model.cache import KVCache
from dinfer.model.decoder import Decoder
from dinfer.model.memory import free, need, size_text
from dinfer.model.reference import Forward
from dinfer.model.sampling import Sampler, Sampling
from dinfer.rank.commands import Handler, quick, slow
from dinfer.rank.decode import PromptOnRank
from dinfer.rank.inventory import Inventory, InventoryKey, hidden_digest, zero_row_digest

TELL_S = 0.2
"""seconds between two reports of how far the reference is"""


class LayerReplay:
    """Computes again what entered each layer of one rank's run. Ask for each chunk's layers in order."""

    def __init__(self, decoder: Decoder, holding: Inventory) -> None:
        self._decoder, self._holding = decoder, holding
        self._scratch = _Scratch(holding.cache)
        self._at: dict[int, Tensor | None] = {}

    def hidden(self, chunk: int, rows: range, layer: int) -> Tensor | None:
        """What entered `layer`, [1, tokens, hidden_size], for these rows of that chunk; the rank's own tensor if it is
        kept. None if the run has not come that far, or this rank lacks the KV to compute it."""
        holding, start = self._holding, rows.start
        found = holding.state.hidden.get((chunk, layer))
        is_prompt = chunk < holding.prompt_chunks
        if found is None and layer == 0:
            found = self._decoder.embed(holding.ids[start : rows.stop])
        elif found is None:
            before = self._at[start]
            known = all(holding.holds(n, layer - 1) for n in range(chunk + 1))
            if (
                is_prompt and holding.state.coded.codec.is_lossy
            ):  # only the owner has what the layer computed on
                known &= holding.state.plan.shape.owners[layer - 1] == holding.state.rank
            if before is not None and known:
                cache = holding.state.coded.cache if is_prompt else holding.cache
                self._scratch.take(cache, layer - 1, start)
                found = self._decoder.layer(layer - 1, before, self._scratch, start)
        self._at[start] = found
        return found


class _Scratch(KVCache):
    """A cache with room for one layer, whichever that is."""

    def __init__(self, like: KVCache) -> None:
        super().__init__(1, like.capacity, like.kv_heads, like.head_dim, like.dtype, like.device)

    def tensor(self, layer: int) -> Tensor:  # noqa: ARG002 - the same for all
        return self._tensors[0]

    def take(self, cache: KVCache, layer: int, rows: int) -> None:
        self._tensors[0][:rows].copy_(cache.block(layer, 0, rows))


class Examination:
    """One forward of the model `reference`, as the command says, compared with what a rank holds. `check(done, total)`,
    in tokens fed, is called after each layer and may raise, to stop it."""

    def __init__(
        self,
        engine: Engine,
        holding: Inventory,
        reference: Decoder,
        command: RunReference,
        check: Callable[[int, int], None],
    ) -> None:
        alike = command.chunked and reference.dtype == engine.decoder.dtype
        self.exact = alike and engine.kernels == "exact"
        self.fed = range(0)
        """the rows that the forward was fed last"""
        self.measured: dict[tuple[int, int, str], CellDifference] = {}
        self.hidden: dict[InventoryKey, int] = {}
        """digests of the reference's hidden states, or of this rank's if bits may differ"""
        self.choices: list[TokenChoice] = []
        self.loss: dict[str, CellDifference] = {}
        """what a lossy codec changes: of K and V of the prompt, and of the logits of new tokens"""
        self.lost_choices: list[TokenChoice] = []
        self._codec = holding.state.coded.codec
        config = engine.config
        self._sampler = Sampler(Sampling(config.temperature, config.top_k, config.top_p, config.seed))
        self._holding, self._command, self._check = holding, command, check
        self._total = sum(map(len, self._pieces()))
        self._rows: list[list[Tensor]] = [[] for _ in range(holding.layers)]
        self._replay = LayerReplay(engine.decoder, holding)
        self._forward = Forward(reference, self._see)

    def run(self) -> None:
        """Feed the prompt, then the run's new tokens one by one. Raises what `check` raises."""
        holding, tokens = self._holding, self._holding.tokens
        exact: Forward | None = None
        for rows in self._pieces():
            self.fed, ids = rows, holding.ids[rows.start : rows.stop]
            step = rows.stop - len(holding.state.ids)
            if (
                step > 0 and exact is None and self._codec.is_lossy
            ):  # as ranks do, decode from what the codec makes
                exact = self._forward.fork(lambda *_: None)
                self._forward.replace_kv(partial(as_received, self._codec))
            output = self._forward.feed(ids)
            if exact is not None:
                self._lose(step, exact.feed(ids).logits, output.logits)
            if step == 0 and (mine := holding.state.final) is not None:
                theirs, key = output.hidden[:, -1:], (holding.prompt_chunks - 1, holding.layers + 1)
                self._add((*key, FINAL), measure(mine[0], theirs[0], rows.stop - 1))
                self.hidden[key] = int(hidden_digest(theirs if self.exact else mine))
            if 0 <= step < len(tokens):
                token, logits = tokens[step], output.logits
                if (chosen := self._sampler(logits, step)) != token:
                    gap = float(logits[chosen] - logits[token])
                    self.choices.append(TokenChoice(step, token, chosen, gap))

    def _lose(self, step: int, exact: Tensor, coded: Tensor) -> None:
        """Note what the codec changes in the logits of a new token, [vocab_size], and whether it is another one."""
        self._add_loss("logits", coded, exact)
        tokens = self._holding.tokens
        if step < len(tokens) and (chosen := self._sampler(exact, step)) != tokens[step]:
            gap = float(exact[chosen] - exact[tokens[step]])
            self.lost_choices.append(TokenChoice(step, tokens[step], chosen, gap))

    def _add_loss(self, name: str, coded: Tensor, exact: Tensor) -> None:
        found, before = measure(coded, exact), self.loss.get(name)
        self.loss[name] = before.with_(found) if before else found

    def digests(self) -> dict[InventoryKey, tuple[int, int]]:
        """The digests of the reference's blocks; empty if bits may differ."""
        found = {}
        for layer, pieces in enumerate(self._rows if self.exact else ()):
            rows = torch.cat(pieces)
            for chunk, span in enumerate(self._holding.chunks):
                if span.stop <= len(rows):
                    found[chunk, layer] = as_numbers(block_digests(rows[span.start : span.stop]))
        return found

    def misplaced(self) -> list[tuple[int, Misplaced]]:
        """The rows that lie where others should, each with its layer. If bits may differ, the right rows are unknown:
        then only rows that repeat others are named, and only in layers of the wrong length."""
        found, holding = list[tuple[int, Misplaced]](), self._holding
        changed = {
            layer for (_, layer, name), one in self.measured.items() if name in ("K", "V") and one.changed
        }
        for layer in range(holding.layers):
            due, held = holding.rows_due(layer), holding.rows_held(layer)
            if held == due and not (self.exact and layer in changed):
                continue
            got = row_digests(holding.cache.block(layer, 0, held)).cpu()
            want = torch.cat(self._rows[layer])[:due].cpu() if self.exact else got
            if held != due:
                rows = misplaced_rows(got, want)
            else:
                rows = misplaced_in_blocks(got, want, holding.chunks, zero_row_digest(holding.cache))
            found += [(layer, one) for one in rows]
        return found

    def _pieces(self) -> Sequence[range]:
        """The rows that the forward is fed one after another: new tokens only after the whole prompt."""
        holding = self._holding
        prompt, tokens = holding.chunks[: self._command.chunks], len(holding.state.ids)
        if not self._command.chunked and prompt:
            prompt = [range(prompt[-1].stop)]
        new = range(tokens, len(holding.ids)) if prompt and prompt[-1].stop == tokens else ()
        return [*prompt, *(range(at, at + 1) for at in new)]

    def _see(self, what: str, layer: int, tensor: Tensor) -> None:
        """Compare a tensor that the forward has made with what this rank has of it, chunk by chunk."""
        holding, fed = self._holding, self.fed
        self._check(fed.start + len(fed) * min(layer, holding.layers) // holding.layers, self._total)
        if what == "kv" and self._codec.is_lossy and fed.start < len(holding.state.ids):
            exact, tensor = tensor, as_received(self._codec, tensor)
            for index, name in enumerate("KV"):
                self._add_loss(name, tensor[:, index], exact[:, index])
        if what == "kv" and self.exact:
            self._rows[layer].append(row_digests(tensor))
        for chunk, span in enumerate(holding.chunks):
            rows = range(max(span.start, fed.start), min(span.stop, fed.stop))
            here = slice(rows.start - fed.start, rows.stop - fed.start)
            if rows and what == "hidden":
                self._compare_hidden(chunk, layer, rows, tensor[:, here])
            elif rows and holding.holds(chunk, layer):
                block, theirs = holding.cache.block(layer, rows.start, rows.stop), tensor[here]
                for index, name in enumerate("KV"):
                    self._add((chunk, layer, name), measure(block[:, index], theirs[:, index], rows.start))

    def _compare_hidden(self, chunk: int, layer: int, rows: range, theirs: Tensor) -> None:
        mine = self._replay.hidden(chunk, rows, layer)
        if mine is not None:
            self._add((chunk, layer, "hidden"), measure(mine[0], theirs[0], rows.start))
        digested = theirs if self.exact else mine
        if digested is not None and chunk < self._holding.prompt_chunks:
            self.hidden[chunk, layer] = int(hidden_digest(digested))

    def _add(self, key: tuple[int, int, str], found: CellDifference) -> None:
        before = self.measured.get(key)
        self.measured[key] = before.with_(found) if before else found


class Stopped(RuntimeError):
    """The session does not want the answer any more."""


def reference_commands(
    prompt: Callable[[], PromptOnRank], tell: Callable[[Comparing], None]
) -> list[Handler]:
    """For `run.compare`, which sends DigestHidden to all ranks, then RunReference where it is needed. `prompt` raises
    RuntimeError where there is none; `tell` reports to the session."""
    references = References(prompt, tell)
    return [
        slow(DigestHidden, references.hidden),
        slow(RunReference, references.run),
        quick(StopReference, references.stop),
    ]


class References:
    """Of one rank."""

    def __init__(self, prompt: Callable[[], PromptOnRank], tell: Callable[[Comparing], None]) -> None:
        self._prompt, self._tell = prompt, tell
        self._told = 0.0
        self._stopped = threading.Event()

    def hidden(self, _: DigestHidden) -> HiddenDigests:
        """Digests of the hidden states that are here now, and the new tokens."""
        holding = Inventory(self._prompt())
        _settle(holding.cache.device)
        digests = tuple((*key, digest) for key, digest in holding.hidden_digests().items())
        return HiddenDigests(digests, tuple(holding.tokens))

    def run(self, command: RunReference) -> ReferenceReport:
        """The forward, and how what is here differs from it. Raises ModelError where memory would not do."""
        self._stopped.clear()
        prompt = self._prompt()
        engine, holding = prompt.engine, Inventory(prompt)
        started = perf_counter()
        _settle(holding.cache.device)
        piece = engine.prompt.plan.shape.chunk_size if command.chunked else len(holding.ids)
        reference = _in_dtype(engine.decoder, command.dtype, len(holding.ids), piece)
        found = Examination(engine, holding, reference, command, self._check)
        found.run()
        return ReferenceReport(
            exact=found.exact,
            kernels=engine.kernels,
            rows=found.fed.stop,
            threads=torch.get_num_threads(),
            seconds=perf_counter() - started,
            device=str(reference.device),
            choices=tuple(found.choices),
            blocks=tuple((*key, digests) for key, digests in found.digests().items()),
            hidden=tuple((*key, digest) for key, digest in found.hidden.items()),
            misplaced=tuple(found.misplaced()),
            measured=tuple((*key, one) for key, one in found.measured.items()),
            loss=tuple(found.loss.items()),
            lost_choices=tuple(found.lost_choices),
        )

    def stop(self, _: StopReference) -> None:
        self._stopped.set()

    def _check(self, done: int, total: int) -> None:
        if self._stopped.is_set():
            raise Stopped("compare was interrupted")
        if (now := perf_counter()) - self._told > TELL_S:
            self._told = now
            self._tell(Comparing(done, total))


def _in_dtype(decoder: Decoder, dtype: str, tokens: int, piece: int) -> Decoder:
    """The model in a dtype: the rank's own, or the same checkpoint once more. Raises ModelError for lack of memory."""
    again = dtype != _name(decoder.dtype)
    wanted = need(decoder.spec, dtype, tokens, piece)
    parts = {"a second KV": wanted.kv_bytes, "hidden states and a layer's work": wanted.hidden_bytes}
    if again:
        parts[f"the weights once more, in {dtype}"] = wanted.weights_bytes
    total, available = sum(parts.values()), free(str(decoder.device))
    if available is not None and total > available:
        listed = ", ".join(f"{name} {size_text(size)}" for name, size in parts.items())
        advice = (
            "compare in the run's own dtype" if again else "compare a shorter prompt, or free memory first"
        )
        raise ModelError(
            f"the reference needs {size_text(total)} on {decoder.device} ({listed}); {size_text(available)} are free: "
            f"{advice}."
        )
    return Decoder.load(decoder.spec.path, dtype, str(decoder.device)) if again else decoder


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _settle(device: torch.device) -> None:
    """Have all that was issued to a GPU be done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
