"""Read: the parts of a saved folder, checked: its plan, trace, KV as a Source, and records of ranks for replays.

Whatever cannot be read raises a SavedError that names the file.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dinfer.config import Config
from dinfer.engine.prompt import Edit
from dinfer.kv.digests import as_numbers, block_digests, row_digests
from dinfer.kv.ledger import BlockKey
from dinfer.kv.measure import per_head
from dinfer.kv.rows import numbers_text
from dinfer.kv.source import HeldSpans, Noted, Subject, ViewableSource
from dinfer.messages import Figures
from dinfer.plan.faults import Fault
from dinfer.plan.ops import PlanError
from dinfer.plan.plan import parse_plan
from dinfer.saved import format as layout
from dinfer.saved.format import SavedError, damaged
from dinfer.saved.replay.record import Own, RankRecord, check_rank, record_of
from dinfer.trace.export import TraceError
from dinfer.trace.read import read_jsonl
from dinfer.trace.trace import Trace


class Tensors:
    """The tensors of one file, which stays open; each is read when it is asked for."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise damaged(path.parent, f"{path.name} is missing.")
        self._path = path
        with self._readable():
            opened: Any = safe_open(path, framework="pt")  # its methods have no types
            self._file, self.names = opened, frozenset(opened.keys())

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (SafetensorError, OSError) as error:
            raise damaged(self._path, f"{error}.") from None

    def get(self, name: str) -> Tensor | None:
        """The tensor of that name; None if the file has none. Raises SavedError."""
        with self._readable():
            return self._file.get_tensor(name) if name in self.names else None

    def one(self, *names: str) -> Tensor:
        """The first of these tensors that is there; one of them must be."""
        for name in names:
            if (found := self.get(name)) is not None:
                return found
        raise damaged(self._path, f"it has no tensor {names[-1]}.")


class SavedSource(ViewableSource):
    """The KV in a folder; `ranks` and `layers` as in its run.json: see format. Raises SavedError for what it lacks."""

    bytes_moved = 0  # nothing moves between ranks

    def __init__(
        self, folder: Path, subject: Subject, ranks: Sequence[dict[str, Any]], layers: Sequence[int]
    ) -> None:
        self.subject, self._folder, self._layers = subject, folder, tuple(layers)
        self._held = {one["rank"]: HeldSpans(tuple(one["spans"]), tuple(one["rows"])) for one in ranks}
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
        came = self._digests.get(layout.came_name(rank, layer, chunk))
        return self.rows(rank, layer, self.subject.spans[chunk]) if came is None else came

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
        ledger = self._digests.get(layout.ledger_name(rank))
        return {
            (int(line[0]), int(line[1])): Noted(as_numbers(line[3:5]), as_numbers(line[5:7]), bool(line[2]))
            for line in (() if ledger is None else ledger)
            if int(line[1]) in layers
        }

    def _read_rows(self, rank: int, layer: int) -> Tensor:
        self._check([rank])
        names = (layout.rows_name(one, layer) for one in (rank, self._first(layer)))
        found = self._digests.one(*names)
        wanted = (self._held[rank].rows[layer], 2, self.subject.kv_heads)
        if tuple(found.shape) != wanted:
            raise SavedError(
                f"{self.subject.name} is damaged: the digests of layer {layer} on rank {rank} are "
                f"{tuple(found.shape)}, and should be {wanted}."
            )
        return found

    def _piece(self, rank: int, layer: int, piece: range) -> Tensor:
        names = (layout.piece_name(one, piece.start) for one in (rank, self._first(layer)))
        found = self._file(layer).one(*names)
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


def read_about(folder: Path) -> dict[str, Any]:
    """What `run.json` says. Raises SavedError for a folder that is no saved run, and for a newer format."""
    path = folder / layout.RUN
    if not path.is_file():
        raise SavedError(
            f"{str(folder)!r} is no saved run: it has no {layout.RUN}. run.save(folder) makes one."
        )
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise damaged(folder, f"{layout.RUN} is no JSON ({error}).") from None
    if not isinstance(about, dict) or about.get("format") != layout.FORMAT:
        raise SavedError(
            f'{str(folder)!r} is no saved run: its {layout.RUN} does not say "format": "{layout.FORMAT}".'
        )
    version = about.get("version")
    if not isinstance(version, int) or version < 1:
        raise damaged(folder, f"its {layout.RUN} says no version of its format.")
    if version > layout.VERSION:
        raise SavedError(
            f"{str(folder)!r} is of a newer dinfer: its format is version {version}, and this dinfer reads up to "
            f"{layout.VERSION}. Update dinfer to open it."
        )
    return about


def read_trace(folder: Path, about: dict[str, Any]) -> Trace:
    check_sum(folder, layout.TRACE, about)
    try:
        return read_jsonl(folder / layout.TRACE)
    except TraceError as error:
        raise damaged(folder, str(error)) from None


def read_source(folder: Path, about: dict[str, Any]) -> SavedSource:
    """The KV, and with it the plan."""
    check_sum(folder, layout.PLAN, about)
    try:
        plan = parse_plan((folder / layout.PLAN).read_text(encoding="utf-8"))
    except (PlanError, ValueError) as error:
        raise damaged(folder, f"{layout.PLAN}: {error}") from None
    check_sum(folder, layout.DIGESTS, about)
    with well_formed(folder):
        kv, texts = about["kv"], about.get("texts")
        dtype = getattr(torch, kv["dtype"], None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"the dtype {kv['dtype']!r}, which torch does not know")
        subject = Subject(
            name=f"saved run {folder.name!r}", standing=tuple(about["standing"]), plan=plan,
            ids=(*about["ids"], *about["tokens"]), texts=tuple(texts or ()), kv_heads=int(kv["heads"]),
            head_dim=int(kv["head_dim"]), dtype=dtype, checkpoint=about["checkpoint"]["fingerprint"],
        )  # fmt: skip
        if len(about["ids"]) != plan.shape.tokens:
            raise ValueError(f"{len(about['ids'])} ids, and {plan.shape.tokens} tokens in {layout.PLAN}")
        return SavedSource(folder, subject, about["ranks"], kv["layers"])


def check_sum(folder: Path, name: str, about: dict[str, Any]) -> None:
    """Raises SavedError if the file is missing, or is not the one that was written."""
    if not (folder / name).is_file():
        raise damaged(folder, f"{name} is missing.")
    expected = about.get("files", {}).get(name)
    if expected is not None and layout.sha256_of(folder / name) != expected:
        raise damaged(folder, f"{name} is not what was written (its SHA-256 differs).")


@contextmanager
def well_formed(folder: Path) -> Iterator[None]:
    """Raises SavedError if what is done meanwhile misses something in `run.json`, or finds another form."""
    try:
        yield
    except SavedError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise damaged(folder, f"{layout.RUN} has {what}.") from None


def read_record(
    folder: Path, about: dict[str, Any], source: SavedSource, rank: int, failure: str
) -> RankRecord:
    """The record of that rank. Raises PlanError for an unknown rank, SavedError if the folder lacks what is needed."""
    subject = source.subject
    check_rank(rank, subject.plan)
    if str(rank) not in about.get("own", {}) or not about.get("positions"):
        there = "it was saved with hidden=False" if not about.get("hidden") else "the rank did not answer"
        raise SavedError(f"{subject.name} holds nothing to replay rank {rank} from: {there}.")
    check_sum(folder, layout.HIDDEN, about)
    states = Tensors(folder / layout.HIDDEN)
    with well_formed(folder):
        parameters: dict[str, Any] = about["parameters"]
        given: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in parameters.items()}
        return record_of(
            source,
            rank,
            _own(about["own"][str(rank)], rank, states),
            config=Config(**given, prompt_ids=subject.prompt, log_dir=""),
            positions=tuple(about["positions"][rank]),
            hidden=lambda chunk, layer: states.get(layout.hidden_name(rank, chunk, layer)),
            block=lambda chunk, layer: (
                source.values(rank, layer, subject.spans[chunk]) if source.has_values(layer) else None
            ),
            failure=failure,
        )


def _own(values: dict[str, Any], rank: int, states: Tensors) -> Own:
    def edited(number: int, what: str, keys: list[BlockKey]) -> dict[BlockKey, Tensor]:
        return {(c, n): states.one(layout.edit_name(rank, number, what, c, n)) for c, n in keys}

    return Own(
        device=values["device"],
        tokens=tuple(values["tokens"]),
        begun=tuple(values["begun"]),
        final=states.one(layout.final_name(rank)) if values["final"] else None,
        edits=tuple(
            Edit(tuple(one["positions"]), edited(n, "kv", one["kv"]), edited(n, "hidden", one["hidden"]))
            for n, one in enumerate(values["edits"])
        ),
        faults=tuple(map(Fault.of, values["faults"])),
    )
