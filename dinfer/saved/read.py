"""Read: the parts of a saved folder, checked: its plan, trace, KV as a Source, and records of ranks for replays.

Whatever cannot be read raises a SavedError that names the file.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dinfer.config import Config
from dinfer.files import FileError, as_text, read_bytes
from dinfer.kv.digests import as_numbers, block_digests, row_digests
from dinfer.kv.ledger import BlockKey
from dinfer.kv.measure import per_head
from dinfer.kv.rows import numbers_text
from dinfer.kv.source import HeldSpans, Noted, Subject, ViewableSource
from dinfer.messages import Figures
from dinfer.plan.ops import PlanError
from dinfer.plan.plan import parse_plan
from dinfer.saved import format as layout
from dinfer.saved.about import About, SavedRank
from dinfer.saved.format import SavedError, damaged
from dinfer.saved.replay.record import Own, RankRecord, check_rank, record_of
from dinfer.trace.export import TraceError
from dinfer.trace.read import read_jsonl
from dinfer.trace.trace import Trace

MAX_HEADER = 25_000_000
"""bytes; a quarter of what safetensors allows, and 200,000 tensors"""

TensorShape = Sequence[int | None]
"""of a tensor; None: any"""


class Tensors:
    """The tensors of one file, which stays open; each is checked and read when it is asked for."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise damaged(path.parent, f"{path.name} is missing.")
        self._path = path
        with self._readable():
            with path.open("rb") as file:
                if int.from_bytes(file.read(8), "little") > MAX_HEADER:
                    raise damaged(path, f"its header would be longer than {MAX_HEADER:,} bytes.")
            opened: Any = safe_open(path, framework="pt")  # its methods have no types
            self._file, self.names = opened, frozenset(opened.keys())

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        # The last two: a dtype unknown to torch.
        except (SafetensorError, OSError, AttributeError, KeyError) as error:
            raise damaged(self._path, f"{error}.") from None

    def get(self, name: str, shape: TensorShape, dtype: torch.dtype) -> Tensor | None:
        """The tensor of that name; None if the file has none. Raises SavedError, also for another shape or dtype."""
        if name not in self.names:
            return None
        with self._readable():
            found = tuple(self._file.get_slice(name).get_shape())
            if len(found) == len(shape) and all(b in (a, None) for a, b in zip(found, shape, strict=True)):
                tensor: Tensor = self._file.get_tensor(name)
                if tensor.dtype == dtype:
                    return tensor
                raise damaged(self._path, f"{name} is {tensor.dtype}, and should be {dtype}.")
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise damaged(self._path, f"{name} is {list(found)}, and should be [{wanted}].")

    def one(self, *names: str, shape: TensorShape, dtype: torch.dtype) -> Tensor:
        """The first of these tensors that is there; one of them must be."""
        for name in names:
            if (found := self.get(name, shape, dtype)) is not None:
                return found
        raise damaged(self._path, f"it has no tensor {names[-1]}.")


class SavedSource(ViewableSource):
    """The KV in a folder; `ranks` and `layers` as in its run.json: see format. Raises SavedError for what it lacks."""

    bytes_moved = 0  # nothing moves between ranks

    def __init__(
        self, folder: Path, subject: Subject, ranks: Sequence[SavedRank], layers: Sequence[int]
    ) -> None:
        self.subject, self._folder, self._layers = subject, folder, tuple(layers)
        self._held = {one.rank: HeldSpans(one.spans, one.rows) for one in ranks}
        self.ranks = list(self._held)
        self._digests = Tensors(folder / layout.DIGESTS)
        self._file = lru_cache(lambda layer: Tensors(folder / layout.kv_file(layer)))
        self._rows = lru_cache(16)(self._read_rows)  # so many layers, counted by rank, are kept in memory

    def held(self, ranks: Sequence[int]) -> list[HeldSpans]:
        self._check(ranks)
        return [self._held[rank] for rank in ranks]

    def digests(self, ranks: Sequence[int], layers: Sequence[int], spans: Sequence[range]) -> list[Tensor]:
        def of(rank: int, layer: int) -> Tensor:
            return torch.stack([block_digests(self.rows(rank, layer, span)) for span in spans])

        return [torch.stack([of(rank, layer) for layer in layers]) for rank in ranks]

    def noted(self, ranks: Sequence[int], layers: Sequence[int]) -> list[dict[BlockKey, Noted]]:
        self._check(ranks)
        return [self._notes(rank, layers) for rank in ranks]

    def noted_rows(self, rank: int, chunk: int, layer: int) -> Tensor | None:
        if (chunk, layer) not in self._notes(rank, [layer]):
            return None
        span = self.subject.spans[chunk]
        shape = (len(span), 2, self.subject.kv_heads)
        came = self._digests.get(layout.came_name(rank, layer, chunk), shape, torch.int64)
        return self.rows(rank, layer, span) if came is None else came

    def rows(self, rank: int, layer: int, places: range) -> Tensor:
        return self._rows(rank, layer)[places.start : places.stop]

    def values(self, rank: int, layer: int, places: Sequence[int]) -> Tensor:
        self._check([rank])
        if not self.has_values(layer):
            raise SavedError(
                f"{self.subject.name} holds no values of layer {layer}: it was saved with {self.holds}."
            )
        asked, pieces = set(places), layout.pieces(self.subject.spans, self._held[rank].rows[layer])
        needed = [piece for piece in pieces if not asked.isdisjoint(piece)] or pieces[:1]
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
        """Which values the folder has, in words."""
        if not self._layers:
            return "only digests"
        return f"values of layer{'s' * (len(self._layers) > 1)} {numbers_text(self._layers)}"

    # -- within

    def _check(self, ranks: Sequence[int]) -> None:
        if missing := [rank for rank in ranks if rank not in self._held]:
            there = ", ".join(map(str, self._held)) or "no rank"
            raise SavedError(
                f"{self.subject.name} has nothing of rank {missing[0]}: when it was saved, {there} answered."
            )

    def _notes(self, rank: int, layers: Sequence[int]) -> dict[BlockKey, Noted]:
        ledger = self._digests.get(layout.ledger_name(rank), (None, layout.LEDGER_COLUMNS), torch.int64)
        if ledger is None:
            return {}
        spans, count = len(self.subject.spans), self.subject.plan.shape.layers
        if not all(0 <= chunk < spans and 0 <= layer < count for chunk, layer in ledger[:, :2].tolist()):
            raise damaged(
                self._folder, f"the ledger of rank {rank} names a block that this run does not have."
            )
        return {
            (int(line[0]), int(line[1])): Noted(as_numbers(line[3:5]), as_numbers(line[5:7]), bool(line[2]))
            for line in ledger
            if int(line[1]) in layers
        }

    def _read_rows(self, rank: int, layer: int) -> Tensor:
        self._check([rank])
        names = (layout.rows_name(one, layer) for one in (rank, self._first(layer)))
        shape = (self._held[rank].rows[layer], 2, self.subject.kv_heads)
        return self._digests.one(*names, shape=shape, dtype=torch.int64)

    def _piece(self, rank: int, layer: int, piece: range) -> Tensor:
        subject = self.subject
        names = (layout.piece_name(one, piece.start) for one in (rank, self._first(layer)))
        shape = (len(piece), 2, subject.kv_heads, subject.head_dim)
        found = self._file(layer).one(*names, shape=shape, dtype=subject.dtype)
        if not torch.equal(row_digests(found), self.rows(rank, layer, piece)):
            raise damaged(
                self._folder / layout.kv_file(layer),
                f"rows {piece.start}–{piece.stop - 1} of rank {rank} do not match their digests.",
            )
        return found

    def _first(self, layer: int) -> int:
        """The rank that holds what ranks without tensors of their own do."""
        return layout.first_holder(self.subject.plan, self.ranks, layer)


# -- the parts of a folder

MAX_PLAN = 1 << 26
"""bytes"""


def read_trace(folder: Path, about: About) -> Trace:
    check_sum(folder, layout.TRACE, about)
    try:
        return read_jsonl(folder / layout.TRACE)
    except (TraceError, OSError) as error:
        raise damaged(folder, str(error)) from None


def read_source(folder: Path, about: About) -> SavedSource:
    """The KV, and with it the plan."""
    check_sum(folder, layout.PLAN, about)
    try:
        plan = parse_plan(as_text(read_bytes(folder / layout.PLAN, MAX_PLAN)))
    except (PlanError, FileError, OSError) as error:
        raise damaged(folder, f"{layout.PLAN}: {error}") from None
    check_sum(folder, layout.DIGESTS, about)
    with well_formed(folder):
        about.check(plan)
        dtype = getattr(torch, about.kv.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"the dtype {about.kv.dtype!r}, which torch does not know")
        subject = Subject(
            name=f"saved run {folder.name!r}", standing=about.standing, plan=plan, ids=(*about.ids, *about.tokens),
            texts=about.texts or (), kv_heads=about.kv.heads, head_dim=about.kv.head_dim, dtype=dtype,
            checkpoint=about.checkpoint.fingerprint, codec=about.codec,
        )  # fmt: skip
        return SavedSource(folder, subject, about.ranks, about.kv.layers)


def check_sum(folder: Path, name: str, about: About) -> None:
    """Raises SavedError if the file is missing, or is not the one that was written."""
    if not (folder / name).is_file():
        raise damaged(folder, f"{name} is missing.")
    expected = about.files.get(name)
    try:
        differs = expected is not None and layout.sha256_of(folder / name) != expected
    except OSError as error:
        raise damaged(folder, f"{name} cannot be read ({error.strerror}).") from None
    if differs:
        raise damaged(folder, f"{name} is not what was written (its SHA-256 differs).")


@contextmanager
def well_formed(folder: Path) -> Iterator[None]:
    """Raises SavedError if what is done meanwhile finds something in `run.json` that does not fit."""
    try:
        yield
    except SavedError:
        raise
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise damaged(folder, f"{layout.RUN} has {error}.") from None


def read_record(folder: Path, about: About, source: SavedSource, rank: int, failure: str) -> RankRecord:
    """The record of that rank. Raises PlanError for an unknown rank, SavedError if the folder lacks what is needed."""
    subject = source.subject
    check_rank(rank, subject.plan)
    if rank not in about.own or not about.positions:
        there = "it was saved with hidden=False" if not about.hidden else "the rank did not answer"
        raise SavedError(f"{subject.name} holds nothing to replay rank {rank} from: {there}.")
    check_sum(folder, layout.HIDDEN, about)
    states, chunks, own = Tensors(folder / layout.HIDDEN), subject.plan.shape.chunks, about.own[rank]

    def edited(number: int, what: str, chunk: int, layer: int) -> Tensor:
        tokens = len(chunks[chunk])
        shape = (tokens, 2, subject.kv_heads, subject.head_dim) if what == "kv" else (1, tokens, None)
        return states.one(
            layout.edit_name(rank, number, what, chunk, layer), shape=shape, dtype=subject.dtype
        )

    with well_formed(folder):
        given: dict[str, Any] = about.parameters or {}
        final = (
            states.one(layout.final_name(rank), shape=(1, 1, None), dtype=subject.dtype)
            if own.final
            else None
        )
        return record_of(
            source,
            rank,
            Own(
                device=own.device,
                tokens=own.tokens,
                begun=own.begun,
                final=final,
                edits=about.edits_of(rank, edited),
                faults=about.faults_of(rank),
            ),
            config=Config.of({**given, "prompt_ids": subject.prompt, "log_dir": ""}),
            positions=about.positions[rank],
            hidden=lambda chunk, layer: states.get(
                layout.hidden_name(rank, chunk, layer), (len(chunks[chunk]), None), subject.dtype
            ),
            block=lambda chunk, layer: (
                source.values(rank, layer, subject.spans[chunk]) if source.has_values(layer) else None
            ),
            failure=failure,
        )
