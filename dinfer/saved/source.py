"""Source: the KV of a saved run, read from its folder when it is asked for. What is read is held to its digests."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dinfer.kv.digests import as_numbers, block_digests, row_digests
from dinfer.kv.ledger import BlockKey
from dinfer.kv.measure import per_head
from dinfer.kv.rows import numbers_text
from dinfer.kv.source import HeldSpans, Noted, Subject, ViewableSource
from dinfer.messages import Figures
from dinfer.saved.collect import first_holder, pieces
from dinfer.saved.format import DIGESTS, SavedError, came_name, kv_file, ledger_name, piece_name, rows_name


class Tensors:
    """Of one file, which stays open: nothing is read before it is asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with _damage_told(path):
            opened: Any = safe_open(path, framework="pt")  # its methods have no types
            self._file = opened
            self.names = frozenset(opened.keys())

    def get(self, name: str) -> Tensor | None:
        """None where it is not there. Raises SavedError."""
        if name not in self.names:
            return None
        with _damage_told(self._path):
            found: Tensor = self._file.get_tensor(name)
        return found

    def one(self, name: str) -> Tensor:
        """The same of a tensor that must be there."""
        found = self.get(name)
        if found is None:
            raise SavedError(f"{str(self._path)!r} is damaged: it has no tensor {name}.")
        return found


@contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    if not path.is_file():
        raise SavedError(f"{str(path.parent)!r} is damaged: {path.name} is missing.")
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise SavedError(f"{str(path)!r} is damaged: {error}.") from None


KEPT = 16
"""layers of ranks whose rows' digests are kept once they were read"""


class SavedSource(ViewableSource):
    """Of a folder, and what its `ranks` and `layers` say: see format. Raises SavedError for what it does not hold."""

    def __init__(
        self, folder: Path, subject: Subject, ranks: Sequence[dict[str, Any]], layers: Sequence[int]
    ) -> None:
        self._folder, self._subject, self._layers = folder, subject, tuple(layers)
        self._held = {one["rank"]: HeldSpans(tuple(one["spans"]), tuple(one["rows"])) for one in ranks}
        self._digests = Tensors(folder / DIGESTS)
        self._file = lru_cache(lambda layer: Tensors(folder / kv_file(layer)))
        self._rows = lru_cache(KEPT)(self._read_rows)

    @property
    def subject(self) -> Subject:
        return self._subject

    @property
    def ranks(self) -> Sequence[int]:
        return list(self._held)

    @property
    def bytes_moved(self) -> int:
        """Nothing moves between ranks."""
        return 0

    def held(self, ranks: Sequence[int]) -> list[HeldSpans]:
        self._check(ranks)
        return [self._held[rank] for rank in ranks]

    def digests(self, ranks: Sequence[int], layers: Sequence[int], spans: Sequence[range]) -> list[Tensor]:
        return [
            torch.stack(
                [
                    torch.stack([block_digests(self.rows(rank, layer, span)) for span in spans])
                    for layer in layers
                ]
            )
            for rank in ranks
        ]

    def noted(self, ranks: Sequence[int], layers: Sequence[int]) -> list[dict[BlockKey, Noted]]:
        self._check(ranks)
        return [self._noted(rank, layers) for rank in ranks]

    def noted_rows(self, rank: int, chunk: int, layer: int) -> Tensor | None:
        if (chunk, layer) not in self._noted(rank, [layer]):
            return None
        came = self._digests.get(came_name(rank, layer, chunk))
        return self.rows(rank, layer, self._subject.spans[chunk]) if came is None else came

    def rows(self, rank: int, layer: int, places: range) -> Tensor:
        return self._rows(rank, layer)[places.start : places.stop]

    def values(self, rank: int, layer: int, places: Sequence[int]) -> Tensor:
        self._check([rank])
        if not self.has_values(layer):
            raise SavedError(
                f"{self._subject.name} holds no values of layer {layer}: it was saved with {self.holds}."
            )
        asked, rows = set(places), self._held[rank].rows[layer]
        needed = [piece for piece in pieces(self._subject.spans, rows) if not asked.isdisjoint(piece)]
        if not needed:
            return self._piece(rank, layer, pieces(self._subject.spans, rows)[0])[:0]
        read = torch.cat([self._piece(rank, layer, piece) for piece in needed])
        at = {place: n for n, place in enumerate(place for piece in needed for place in piece)}
        return read[[at[place] for place in places]]

    def has_values(self, layer: int) -> bool:
        return layer in self._layers

    def summary(self, rank: int, layer: int, places: range) -> Figures:
        return per_head(self.values(rank, layer, places))

    def part(self, rank: int, layer: int, tensor: int, heads: Sequence[int], places: Sequence[int]) -> Tensor:
        return self.values(rank, layer, places)[:, tensor].transpose(0, 1)[list(heads)]

    @property
    def holds(self) -> str:
        """Which values there are, in words."""
        if not self._layers:
            return "digests alone"
        return f"values of layer{'s' * (len(self._layers) > 1)} {numbers_text(self._layers)}"

    # -- within

    def _check(self, ranks: Sequence[int]) -> None:
        if missing := [rank for rank in ranks if rank not in self._held]:
            there = ", ".join(map(str, self._held)) or "no rank"
            raise SavedError(
                f"{self._subject.name} holds nothing of rank {missing[0]}: it was saved when {there} could be asked."
            )

    def _first(self, layer: int) -> int:
        return first_holder(self._subject.plan, list(self._held), layer)

    def _noted(self, rank: int, layers: Sequence[int]) -> dict[BlockKey, Noted]:
        ledger = self._digests.get(ledger_name(rank))
        lines = [] if ledger is None else [line for line in ledger if int(line[1]) in layers]
        return {
            (int(line[0]), int(line[1])): Noted(as_numbers(line[3:5]), as_numbers(line[5:7]), bool(line[2]))
            for line in lines
        }

    def _read_rows(self, rank: int, layer: int) -> Tensor:
        self._check([rank])
        own = self._digests.get(rows_name(rank, layer))
        found = self._digests.one(rows_name(self._first(layer), layer)) if own is None else own
        wanted = (self._held[rank].rows[layer], 2, self._subject.kv_heads)
        if tuple(found.shape) != wanted:
            raise SavedError(
                f"{self._subject.name} is damaged: the digests of layer {layer} on rank {rank} are "
                f"{tuple(found.shape)}, and should be {wanted}."
            )
        return found

    def _piece(self, rank: int, layer: int, piece: range) -> Tensor:
        file = self._file(layer)
        own = file.get(piece_name(rank, piece.start))
        found = file.one(piece_name(self._first(layer), piece.start)) if own is None else own
        if not torch.equal(row_digests(found), self.rows(rank, layer, piece)):
            raise SavedError(
                f"{str(self._folder / kv_file(layer))!r} is damaged: rows {piece.start}–{piece.stop - 1} of rank "
                f"{rank} are not what their digests say."
            )
        return found
