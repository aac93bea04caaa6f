"""About: what `run.json` of a saved run says, each field checked as it is read; FORMAT.md says what they mean."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Raw, Struct

from dinfer.codec.choice import Codec
from dinfer.engine.prompt import Edit
from dinfer.files import FileError, read_bytes
from dinfer.monitor.signs import HangEvidence
from dinfer.plan.faults import KINDS, Fault
from dinfer.plan.plan import Plan
from dinfer.saved import format as layout
from dinfer.saved.format import SavedError, damaged

MAX_BYTES = 1 << 26
"""of run.json: a million tokens with their texts are 30 MB"""

Count = Annotated[int, Meta(ge=0, le=1 << 40)]
Index = Annotated[int, Meta(ge=0, le=9_999_999)]
Size = Annotated[int, Meta(ge=1, le=1 << 20)]
Scalar = str | int | float | bool | None
SavedBlock = tuple[Index, Index]


class SavedKv(Struct, frozen=True):
    """The sizes of K and V, and the layers whose values were saved."""

    heads: Size
    head_dim: Size
    dtype: str
    layers: tuple[Index, ...]


class SavedRank(Struct, frozen=True):
    """What one rank held, by layer."""

    rank: Index
    spans: tuple[Index, ...]
    rows: tuple[Count, ...]


class SavedCheckpoint(Struct, frozen=True):
    """Where the checkpoint was, and its fingerprint."""

    fingerprint: str
    path: str = ""


class SavedEdit(Struct, frozen=True):
    """What the user had changed at these positions; the tensors are in another file."""

    positions: tuple[Count, ...]
    kv: tuple[SavedBlock, ...]
    hidden: tuple[SavedBlock, ...]


class SavedOwn(Struct, frozen=True):
    """What else a replay of one rank needs."""

    device: str
    tokens: tuple[Index, ...]
    begun: tuple[bool, ...]
    final: bool
    edits: tuple[SavedEdit, ...]
    faults: tuple[dict[str, Scalar], ...]


class About(Struct, frozen=True):
    """All of run.json but `version`, which is checked before the rest is read."""

    ids: tuple[Index, ...]
    tokens: tuple[Index, ...]
    kv: SavedKv
    checkpoint: SavedCheckpoint
    standing: tuple[str, ...]
    ranks: tuple[SavedRank, ...]
    texts: tuple[str, ...] | None = None
    hidden: bool = False
    parameters: dict[str, Scalar | tuple[Scalar, ...]] | None = None
    state: str = ""
    positions: tuple[tuple[Count, ...], ...] = ()
    edited: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    own: dict[Index, SavedOwn] = {}
    evidence: Raw = Raw(b"null")
    files: dict[str, str] = {}

    @property
    def codec(self) -> str:
        """Of blocks on the wire."""
        return str((self.parameters or {}).get("codec", "none"))

    def check(self, plan: Plan) -> None:
        """Raises ValueError where it does not fit the plan."""
        Codec.of(self.codec)
        layers, ranks, spans = plan.shape.layers, plan.world_size, len(plan.shape.chunks)
        spans += len(self.tokens) > 1  # the last new token has no K and V
        ops = [tuple(len(lane.ops) for lane in lanes) for lanes in plan.lanes]
        if len(self.ids) != plan.shape.tokens:
            raise ValueError(f"{len(self.ids)} ids, and {plan.shape.tokens} tokens in {layout.PLAN}")
        _check_length("texts", self.texts or (), len(self.ids) + len(self.tokens), or_none=True)
        _check_length("standing", self.standing, ranks)
        _check_below("kv.layers", self.kv.layers, layers)
        _check_below("ranks", [one.rank for one in self.ranks], ranks)
        for one in self.ranks:
            _check_length(f"spans of rank {one.rank}", one.spans, layers)
            _check_length(f"rows of rank {one.rank}", one.rows, layers)
            _check_below(f"spans of rank {one.rank}", one.spans, spans + 1, unique=False)
        _check_length("positions", self.positions, ranks, or_none=True)
        for rank, positions in enumerate(self.positions):
            _check_positions(f"positions of rank {rank}", positions, ops[rank])
        _check_below("own", list(self.own), ranks)
        for rank, own in self.own.items():
            _check_length(f"own.{rank}.begun", own.begun, len(ops[rank]))
            for edit in own.edits:
                _check_positions(f"positions of an edit of rank {rank}", edit.positions, ops[rank])
                for key in (*edit.kv, *edit.hidden):
                    _check_below("an edit", [key[0]], len(plan.shape.chunks))
                    _check_below("an edit", [key[1]], layers)

    def judged(self) -> HangEvidence | None:
        """What a verdict is made of; None if it was not saved. Raises ValueError where it is of another form."""
        return None if bytes(self.evidence) == b"null" else HangEvidence.of_json(self.evidence)

    def faults_of(self, rank: int) -> tuple[Fault, ...]:
        """The faults that struck on a rank. Raises ValueError or TypeError for what is no fault."""
        found = tuple(Fault(**one) for one in self.own[rank].faults)  # type: ignore[arg-type]
        for one in found:
            msgspec.convert(one.as_dict(), Fault)
            if one.kind not in KINDS:
                raise ValueError(f"a fault of kind {one.kind!r}, which is none of {', '.join(KINDS)}")
        return found

    def edits_of(self, rank: int, tensor: Any) -> tuple[Edit, ...]:
        """The edits on a rank. `tensor(number, what, chunk, layer)`: what the user had left there."""
        return tuple(
            Edit(
                one.positions,
                {(c, n): tensor(number, "kv", c, n) for c, n in one.kv},
                {(c, n): tensor(number, "hidden", c, n) for c, n in one.hidden},
            )
            for number, one in enumerate(self.own[rank].edits)
        )


class _Format(Struct, frozen=True):
    format: Any = None
    version: Any = None


def read_about(folder: Path) -> About:
    """What `run.json` says. Raises SavedError for a folder that is no saved run, and for a newer format."""
    path = folder / layout.RUN
    if not path.is_file():
        raise SavedError(
            f"{str(folder)!r} is no saved run: it has no {layout.RUN}. run.save(folder) makes one."
        )
    try:
        data = read_bytes(path, MAX_BYTES).removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise damaged(folder, f"{layout.RUN} cannot be read ({error.strerror}).") from None
    except FileError as error:
        raise damaged(folder, f"{layout.RUN}: {error}.") from None
    try:
        said = msgspec.json.decode(data, type=_Format)
    except msgspec.ValidationError:
        said = _Format()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise damaged(folder, f"{layout.RUN} is no JSON ({error}).") from None
    if said.format != layout.FORMAT:
        raise SavedError(
            f'{str(folder)!r} is no saved run: its {layout.RUN} does not say "format": "{layout.FORMAT}".'
        )
    if not isinstance(said.version, int) or said.version < 1:
        raise damaged(folder, f"its {layout.RUN} says no version of its format.")
    if said.version > layout.VERSION:
        raise SavedError(
            f"{str(folder)!r} is of a newer dinfer: its format is version {said.version}, and this dinfer reads up to "
            f"{layout.VERSION}. Update dinfer to open it."
        )
    try:
        return msgspec.json.decode(data, type=About)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise damaged(folder, f"{layout.RUN}: {error}.") from None


def _check_length(name: str, values: Sequence[object], wanted: int, *, or_none: bool = False) -> None:
    if len(values) != wanted and (values or not or_none):
        raise ValueError(f"{len(values)} {name}, and should have {wanted}")


def _check_below(name: str, numbers: Sequence[int], count: int, *, unique: bool = True) -> None:
    """Raises ValueError for a number that is not below `count`, and for one that is there twice."""
    if wrong := [number for number in numbers if number >= count]:
        raise ValueError(f"{name} with {wrong[0]}; the largest is {count - 1}")
    if unique and len(set(numbers)) < len(numbers):
        raise ValueError(f"{name} with one number twice")


def _check_positions(name: str, positions: Sequence[int], ops: Sequence[int]) -> None:
    _check_length(name, positions, len(ops))
    for position, count in zip(positions, ops, strict=True):
        _check_below(name, [position], count + 1)
