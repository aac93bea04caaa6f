"""The commands by which a session compares what a rank holds with transformers' own forward, run on that rank."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Protocol

import torch

from dinfer.engine.engine import Engine
from dinfer.kv.digests import as_numbers
from dinfer.kv.ledger import LedgerEntry
from dinfer.messages import (
    DigestHeld,
    HeldBlock,
    HeldReport,
    Ok,
    ReferenceReport,
    RunReference,
    StopReference,
)
from dinfer.model.decoder import Decoder
from dinfer.model.errors import ModelError
from dinfer.model.free import free
from dinfer.model.memory import need, size_text
from dinfer.model.sampling import Sampler, Sampling
from dinfer.rank.commands import Handler, quick, slow
from dinfer.rank.decode import Tokens
from dinfer.rank.examine import Examination
from dinfer.rank.inventory import Inventory


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
    """For `run.compare`, which sends DigestHeld to all ranks, then RunReference where it is needed."""
    references = References(holder)
    return [
        slow(DigestHeld, references.held),
        slow(RunReference, references.run),
        quick(StopReference, references.stop),
    ]


class References:
    """Of one rank."""

    def __init__(self, holder: Holder) -> None:
        self._holder = holder
        self._stopped = threading.Event()

    def held(self, _: DigestHeld) -> HeldReport:
        """Digests of what is here now, and of what came to be here."""
        holding = self._holding()
        _settle(holding.cache.device)
        ledger = holding.state.ledger.entries
        return HeldReport(
            dtype=_name(holding.cache.dtype),
            held=tuple(holding.rows_held(layer) for layer in range(holding.layers)),
            due=tuple(holding.rows_due(layer) for layer in range(holding.layers)),
            tokens=tuple(holding.tokens),
            blocks=tuple(
                HeldBlock(*key, now, *_then(ledger.get(key))) for key, now in holding.digests().items()
            ),
            hidden=tuple((*key, digest) for key, digest in holding.hidden_digests().items()),
        )

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
                blocks=tuple(HeldBlock(*key, digests) for key, digests in found.digests().items()),
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


def _then(entry: LedgerEntry | None) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """The digests of a block when it came to be here, and those that were announced."""
    return (None, None) if entry is None else (as_numbers(entry.digests), entry.announced)


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
