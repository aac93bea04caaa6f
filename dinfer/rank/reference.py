"""The commands by which a session compares what a rank holds with transformers' own forward, run on that rank.

Answers may be long: a command leaves them here, and the session takes them a page at a time.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any, Protocol

import torch

from dinfer.engine.engine import Engine
from dinfer.kv.digests import as_numbers
from dinfer.kv.ledger import LedgerEntry
from dinfer.messages import Message
from dinfer.model.decoder import Decoder
from dinfer.model.errors import ModelError
from dinfer.model.free import free
from dinfer.model.memory import need, size_text
from dinfer.model.sampling import Sampler, Sampling
from dinfer.rank.commands import Command, CommandTable
from dinfer.rank.decode import Tokens
from dinfer.rank.examine import Examination
from dinfer.rank.inventory import Inventory

PAGE_BYTES = 128 * 1024


class Holder(Protocol):
    """What there is on a rank."""

    decoder: Decoder | None
    engine: Engine | None
    tokens: Tokens | None


class Stopped(RuntimeError):
    """The session does not want the answer any more."""


class References:
    """Of one rank."""

    def __init__(self, host: Holder) -> None:
        self._host = host
        self._stopped = threading.Event()
        self._items: list[Any] = []

    def held(self, _: Message) -> Message:
        """Digests of what is here now, and of what came to be here."""
        holding = self._holding()
        _settle(holding.cache.device)
        ledger = holding.state.ledger.entries
        blocks: list[Any] = [
            ["kv", *key, list(now), *_then(ledger.get(key))] for key, now in holding.digests().items()
        ]
        hidden = [["hidden", *key, digest] for key, digest in holding.hidden_digests().items()]
        return {
            "held": [holding.rows_held(layer) for layer in range(holding.layers)],
            "due": [holding.rows_due(layer) for layer in range(holding.layers)],
            "tokens": holding.tokens,
            "dtype": _name(holding.cache.dtype),
            **self._leave(blocks + hidden),
        }

    def run(self, message: Message) -> Message:
        """The forward, and how what is here differs from it. Raises ModelError where memory would not do."""
        self._stopped.clear()
        decoder, engine = self._host.decoder, self._host.engine
        holding = self._holding()
        assert decoder is not None
        assert engine is not None
        started = perf_counter()
        _settle(holding.cache.device)
        piece = engine.config.chunk_size if message["chunked"] else len(holding.ids)
        with _in_dtype(decoder, message["dtype"], len(holding.ids), piece) as reference:
            config = engine.config
            sampler = Sampler(Sampling(config.temperature, config.top_k, config.top_p, config.seed))
            found = Examination(
                decoder, reference, holding, sampler,
                chunks=message["chunks"], chunked=message["chunked"], check=self._check,
            )  # fmt: skip
            found.run()
            return {
                "exact": found.exact,
                "rows": found.expected_rows(),
                "threads": torch.get_num_threads(),
                "seconds": perf_counter() - started,
                "device": str(reference.device),
                "choices": found.choices,
                **self._leave(_told(found)),
            }

    def page(self, message: Message) -> Message:
        """What the last command has left, from an item on."""
        return self._page(message["start"])

    def stop(self, _: Message) -> Message:
        self._stopped.set()
        return {}

    def _check(self) -> None:
        if self._stopped.is_set():
            raise Stopped("compare was interrupted")

    def _holding(self) -> Inventory:
        if self._host.engine is None:
            raise RuntimeError("there is no prompt yet: session.prefill(…) first.")
        tokens = self._host.tokens
        executor = self._host.engine.executor
        return Inventory(executor, tokens.tokens, tokens.rows) if tokens else Inventory(executor, [])

    def _leave(self, items: list[Any]) -> Message:
        self._items = items
        return {"count": len(items), **self._page(0)}

    def _page(self, start: int) -> Message:
        page, size = list[Any](), 0
        for item in self._items[start:]:
            size += len(json.dumps(item)) + 2
            if page and size > PAGE_BYTES:
                break
            page.append(item)
        return {"items": page}


def reference_commands(host: Holder) -> CommandTable:
    """For `run.compare`. A compare asks for `reference_held` everywhere, then for `reference` where it is needed."""
    references = References(host)
    return {
        "reference_held": Command(references.held, slow=True),
        "reference": Command(references.run, slow=True),
        "reference_page": Command(references.page),
        "reference_stop": Command(references.stop),
    }


def _told(found: Examination) -> list[Any]:
    """All that was found, as JSON takes it."""
    told: list[Any] = [["kv", *key, list(digests)] for key, digests in found.digests().items()]
    told += [["hidden", *key, digest] for key, digest in found.hidden.items()]
    told += [["rows", layer, *one] for layer, rows in found.misplaced().items() for one in rows]
    told += [["measured", c, layer, name, *one] for (c, layer, name), one in found.measured.items()]
    return told


def _then(entry: LedgerEntry | None) -> list[Any]:
    """What the block was when it came to be here, and what it was announced as."""
    return [None, None] if entry is None else [as_numbers(entry.digests), entry.announced]


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
