"""Compares what a watched model computed with transformers' own forward of the same checkpoint on the same ids.

The probe has kept digests of rows, which tell whether they are equal bit for bit, and sketches, which tell about how
far they are apart; the tensors are gone. The forward runs in this process, in the pieces in which the model was fed,
and is digested and sketched likewise. It gets the mask and positions that the model was given; rows of padding are left
out.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from time import perf_counter
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from dinfer.display import Composed, Displayable, Table, Tidy
from dinfer.errors import NotPossible
from dinfer.kv.reference.judge import CauseKind
from dinfer.kv.rows import places_text
from dinfer.model.decoder import Decoder
from dinfer.model.reference import Forward
from dinfer.model.tolerance import UNIT_ROUNDOFF, tolerance
from dinfer.severity import Severity
from dinfer.tabular import Cells, Tabular
from dinfer.verdict.where import ranks_text
from dinfer.watch.probe.digests import SKETCH, last_dim_digests, row_sketches, token_digests, token_sketches
from dinfer.watch.probe.rows import RowsTaken
from dinfer.watch.probe.tensors import HIDDEN, IDS, OUTPUT

T = TypeVar("T")

KV, LOGITS = "kv", "logits"

ORDER = (HIDDEN, "K", "V", OUTPUT, LOGITS)
"""what is compared, in the order in which a layer makes it"""

AFTER_ALL = 1 << 30
"""the layer of logits: behind all others"""


class Rows(NamedTuple):
    """Rows of one tensor, from the place `start` on: `digests` int64 [rows], `sketches` float32 [rows, SKETCH] or None,
    and the dtype of the values."""

    start: int
    digests: Tensor
    sketches: Tensor | None
    dtype: str

    @property
    def stop(self) -> int:
        return self.start + len(self.digests)


TapKey = tuple[int, int, str]
"""sequence of the batch, layer, and one of ORDER"""


class FedSequence(NamedTuple):
    """What one sequence of the batch was fed: token ids; for each whether it is attended to, or only padding; and its
    position, None for all as transformers numbers them."""

    ids: list[int]
    is_attended: list[bool]
    positions: list[int] | None = None

    @property
    def mask(self) -> list[int] | None:
        """As a model takes it; None if there is no padding."""
        return None if all(self.is_attended) else [int(one) for one in self.is_attended]


class RowDeviation(NamedTuple):
    """Where a rank first differs from the reference.

    `ranks`: those that differ there; `right`: those that have the reference's row; `difference`: about how far the row
    lies from the reference's, as a share of that one's length, NaN if unknown; `tolerated`: what rounding explains of
    it; `source`: the token whose row it is, if it is another's.
    """

    kind: Literal["wire", "compute", "placement"]
    ranks: tuple[int, ...]
    right: tuple[int, ...]
    chunk: int
    layer: int
    tensor: str
    token: int
    difference: float
    tolerated: float
    source: int | None


class _Compared(NamedTuple):
    """One tensor of one rank beside the reference, row by row: `share` is the difference as a share of the length."""

    rank: int
    key: TapKey
    start: int
    changed: Tensor
    share: Tensor
    tolerated: float

    @property
    def wrong(self) -> Tensor:
        return self.changed & ~(self.share <= self.tolerated)

    def only(self, is_attended: Sequence[bool]) -> "_Compared":
        """Without what differs in rows of padding, which nobody uses."""
        keep = torch.tensor(is_attended[self.start : self.start + len(self.share)])
        share = torch.where(keep, self.share, torch.zeros_like(self.share))
        return self._replace(changed=self.changed & keep, share=share)

    def has(self, row: int) -> bool:
        return self.start <= row < self.start + len(self.share)


def compare(
    taken: Mapping[int, Sequence[RowsTaken]],
    checkpoint: str | None = None,
    ids: Sequence[int] | None = None,
    dtype: str | None = None,
) -> "WatchedComparison":
    """Run transformers' forward, and compare what each rank has computed last. Raises NotPossible where checkpoint, ids
    or tensors are not known, ModelError for what is no checkpoint."""
    newest = {rank: _newest(rows) for rank, rows in taken.items()}
    tensors = {rank: _tensors(rows) for rank, rows in newest.items()}
    tensors = {rank: found for rank, found in tensors.items() if found}
    if not tensors:
        raise NotPossible(
            "nothing was taken that could be compared with a reference: start the watch by "
            "dinfer.watch(…, compare=True), session.watch(compare=True) or `dinfer watch --compare`, or tap by "
            'dinfer.tap("hidden", tensor, layer=…).'
        )
    path = checkpoint or _checkpoint(newest.values())
    fed = [FedSequence(list(ids), [True] * len(ids))] if ids is not None else _fed(newest.values())
    length = len(fed[0].ids)
    pieces = _pieces(newest.values(), length)
    dtype = dtype or _dtype(tensors.values())
    check_dtype(dtype)
    began = perf_counter()
    decoder = Decoder.load(path, dtype)
    reference: dict[TapKey, Rows] = {}
    for number, sequence in enumerate(fed):
        reference |= _reference(decoder, number, sequence, pieces)
    width = max(decoder.hidden_size, decoder.spec.intermediate_size, length)
    compared = []
    for rank, own in tensors.items():
        if logits := {key: parts for key, parts in own.items() if key[2] == LOGITS}:
            own |= {key: _of_pieces(parts, pieces) for key, parts in logits.items()}
        for key, parts in own.items():
            layer = min(key[1], decoder.num_layers)
            for part in parts if key in reference else ():
                tolerated = tolerance(dtype, part.dtype, layer, width)
                if one := _beside(rank, key, part, reference[key], tolerated):
                    is_attended = fed[key[0]].is_attended
                    if key[2] == LOGITS:
                        is_attended = [is_attended[piece.stop - 1] for piece in pieces]
                    compared.append(one.only(is_attended))
    if not compared:
        raise NotPossible(
            f"none of the tensors taken is one of the reference's: these are {', '.join(ORDER)} of "
            f"{decoder.num_layers} layers, for {length} tokens."
        )
    fed_text = f"{length:,} tokens in {len(pieces)} piece{'s' * (len(pieces) != 1)}"
    if padding := sum(sequence.is_attended.count(False) for sequence in fed):
        fed_text += f", of which {padding:,} of all {len(fed)} sequences are padding and are left out"
    about = f"reference: {path}, {dtype}, {fed_text} ({perf_counter() - began:.2g} s)"
    others = sorted({key[2] for own in tensors.values() for key in own} - set(ORDER))
    return WatchedComparison(compared, tensors, reference, pieces, about, others)


class WatchedComparison(Tidy, Tabular, Composed):
    """What `watch.compare("reference")` returns. `first`: the first place where a rank differs from the reference by
    more than rounding explains, None if there is none; `not_compared`: names of taps that the reference does not
    have."""

    INTERNAL = frozenset({"severity"})

    def __init__(
        self,
        compared: Sequence[_Compared],
        tensors: Mapping[int, Mapping[TapKey, Sequence[Rows]]],
        reference: Mapping[TapKey, Rows],
        pieces: Sequence[range],
        about: str,
        not_compared: Sequence[str],
    ) -> None:
        self._compared, self._tensors, self._reference = compared, tensors, reference
        self._pieces, self._about, self.not_compared = pieces, about, list(not_compared)
        self.first: RowDeviation | None = self._first(lambda one: one.wrong)

    @property
    def equal(self) -> bool:
        """Whether all that was compared is the reference's, bit for bit."""
        return not any(bool(one.changed.any()) for one in self._compared)

    @property
    def within_tolerance(self) -> bool:
        return self.first is None

    @property
    def kind(self) -> CauseKind:
        """ "equal"; "wire": bytes changed on the wire or in memory; "compute": they were computed wrong; "placement":
        rows lie where others should; "drift": rounding explains all differences."""
        if self.first:
            return self.first.kind
        return "equal" if self.equal else "drift"

    @property
    def severity(self) -> Severity:
        return Severity.OK if self.within_tolerance else Severity.ERROR

    @property
    def verdict(self) -> str:
        """One sentence."""
        who = ranks_text(sorted({one.rank for one in self._compared}))
        if self.equal:
            return f"equal: {who} computed what transformers' own forward makes, bit for bit"
        if self.first is None:
            furthest = max(self._compared, key=lambda one: float(one.share.max()) / one.tolerated)
            part = float(furthest.share.max()) / furthest.tolerated
            place = _place_text(furthest.key[1], furthest.key[2])
            return (
                f"within tolerance: what {who} computed differs from the reference by at most {part:.2g} of what "
                f"rounding explains ({place})"
            )
        words = {
            "wire": "the wire or memory changed bytes",
            "compute": "the compute differs",
            "placement": "placement is wrong",
        }
        return f"{words[self.first.kind]}: {self._text(self.first)}"

    def table(self) -> Table:
        """The largest difference of each layer and tensor on any rank, as a share of the row's length."""
        layers = sorted({one.key[1] for one in self._compared})
        names = [name for name in ORDER if any(one.key[2] == name for one in self._compared)]
        lines = []
        for layer in layers:
            mine = [one for one in self._compared if one.key[1] == layer]
            shares = {name: [float(one.share.max()) for one in mine if one.key[2] == name] for name in names}
            cells = [f"{max(shares[name]):.2g}" if shares[name] else "–" for name in names]
            lines.append(["end" if layer == AFTER_ALL else layer, *cells, f"{mine[0].tolerated:.2g}"])
        return Table(["layer", *names, "tolerated"], lines, about=ABOUT_COLUMNS)

    def _tabulated(self) -> tuple[Sequence[str], Iterable[Cells]]:
        return self.table()._tabulated()

    def _parts(self) -> Iterable[str | Displayable]:
        lines = [self.verdict, self._about, self._extent()]
        if not self.equal and self.first is None and (bits := self._first(lambda one: one.changed)):
            lines.append(f"bit for bit, the first that differs is {self._where(bits)}")
        yield "\n".join(lines)
        if not self.equal:
            yield self.table()

    def _extent(self) -> str:
        names = [name for name in ORDER if any(one.key[2] == name for one in self._compared)]
        layers = sorted({one.key[1] for one in self._compared} - {AFTER_ALL})
        rows = sum(len(one.share) for one in self._compared)
        text = f"compared: {', '.join(names)} of {len(layers)} layers, {rows:,} rows"
        return text + (f"; not compared: {', '.join(self.not_compared)}" if self.not_compared else "")

    # -- the first deviation

    def _first(self, which: Callable[[_Compared], Tensor]) -> RowDeviation | None:
        """The first in the order of computing: by piece, layer, tensor and token."""
        found: list[tuple[tuple[int, int, int, int], _Compared, int]] = []
        for one in self._compared:
            places = which(one).nonzero().flatten()
            if len(places):
                row = one.start + int(places[0])
                token = self._pieces[row].stop - 1 if one.key[2] == LOGITS else row
                found.append(((self._piece(token), one.key[1], ORDER.index(one.key[2]), token), one, row))
        if not found:
            return None
        order, one, row = min(found, key=lambda each: (each[0], each[1].rank))
        ranks = {other.rank for at, other, _ in found if at == order and other.key == one.key}
        right = tuple(
            sorted(
                {other.rank for other in self._compared if other.key == one.key and other.has(row)} - ranks
            )
        )
        source = self._source(one, row)
        return RowDeviation(
            self._kind(one, row, right, source), tuple(sorted(ranks)), right, order[0], one.key[1], one.key[2],
            order[3], float(one.share[row - one.start]), one.tolerated, source,
        )  # fmt: skip

    def _kind(
        self, one: _Compared, row: int, right: Sequence[int], source: int | None
    ) -> Literal["wire", "compute", "placement"]:
        sequence, layer, tensor = one.key
        if source is not None:
            return "placement"
        made_by = (sequence, layer - 1, OUTPUT)
        is_made = any(other.key == made_by and other.has(row) for other in self._compared)
        # What made it comes before in the order, so it is right.
        return "wire" if right or (tensor == HIDDEN and is_made) else "compute"

    def _source(self, one: _Compared, row: int) -> int | None:
        """The token of the reference whose row this is, bit for bit."""
        for part in self._tensors[one.rank][one.key] if one.key[2] != LOGITS else ():
            if part.start <= row < part.stop:
                mine, theirs = part.digests[row - part.start], self._reference[one.key]
                places = (theirs.digests == mine).nonzero().flatten()
                if len(places) and part.dtype == theirs.dtype:
                    return theirs.start + int(places[0])
        return None

    def _piece(self, token: int) -> int:
        return next((n for n, piece in enumerate(self._pieces) if token in piece), len(self._pieces))

    def _where(self, one: RowDeviation) -> str:
        return f"{_place_text(one.layer, one.tensor)}, chunk {one.chunk}, token {one.token}, on {ranks_text(one.ranks)}"

    def _text(self, one: RowDeviation) -> str:
        if one.source is not None:
            return f"{self._where(one)}: it holds what belongs to {places_text([one.source])}"
        how = "by an unknown amount: only digests were taken, a watch with compare=True takes more"
        if not math.isnan(one.difference):
            how = (
                f"about {one.difference:.2g} of its length from the reference's, where rounding explains "
                f"{one.tolerated:.2g}"
            )
        beside = ""
        if one.kind == "wire" and one.right:
            has = "has" if len(one.right) == 1 else "have"
            beside = f"; {ranks_text(one.right)} {has} the reference's"
        elif one.kind == "wire":
            beside = f"; what left layer {one.layer - 1} is the reference's"
        return f"{self._where(one)}: {how}{beside}"


ABOUT_COLUMNS = {
    HIDDEN: "what enters the layer: its largest difference from the reference, as a share of the row's length",
    OUTPUT: "what leaves the layer",
    "tolerated": "up to this share is what rounding explains",
}


def _place_text(layer: int, tensor: str) -> str:
    if layer == AFTER_ALL:
        return tensor
    return {HIDDEN: f"what enters layer {layer}", OUTPUT: f"what leaves layer {layer}"}.get(
        tensor, f"layer {layer}, {tensor}"
    )


# -- what was taken


def _newest(rows: Sequence[RowsTaken]) -> list[RowsTaken]:
    """Of the cache that was used last; what belongs to no cache, all."""
    newest = max((one.cache for one in rows), default=0)
    return [one for one in rows if one.cache in (0, newest)]


def _tensors(rows: Sequence[RowsTaken]) -> dict[TapKey, list[Rows]]:
    """By tensor its rows, in parts; what was written to the same place again counts, not what it replaced."""
    found: dict[TapKey, dict[int, Rows]] = {}
    for one in rows:
        if one.name.startswith(IDS) or not one.digests or not one.digests[0]:
            continue
        layer = AFTER_ALL if one.name == LOGITS else one.layer
        if layer is None:
            continue
        parts = len(one.digests[0][0])
        digests = _signed(one.digests)
        sketches = None
        if one.sketches:
            sketches = torch.frombuffer(bytearray(one.sketches.tobytes()), dtype=torch.float32)
            sketches = sketches.view(len(one.digests), -1, parts, SKETCH)
        names = "KV" if one.name == KV and parts == 2 else (one.name,)
        for sequence in range(len(one.digests)):
            for n, name in enumerate(names):
                part = None if sketches is None else sketches[sequence, :, n]
                made = Rows(one.start, digests[sequence, :, n], part, one.dtype)
                _put(found.setdefault((sequence, layer, name), {}), range(made.start, made.stop), made)
    return {key: list(parts.values()) for key, parts in found.items()}


def _put(parts: dict[int, T], span: range, part: T) -> None:
    """Put what was written last to these rows into `parts`, by first row. Parts that begin among them are replaced; and
    what is written from the first row on is of another prompt."""
    overlapped = [at for at in parts if span.start == 0 or at in span]
    for at in overlapped:
        del parts[at]
    parts[span.start] = part


def _signed(digests: Sequence[Sequence[tuple[int, ...]]]) -> Tensor:
    """Unsigned numbers of 64 bits as int64 [batch, rows, parts]."""
    half = 1 << 63
    return torch.tensor([[[n - 2 * half if n >= half else n for n in row] for row in one] for one in digests])


def _checkpoint(taken: Iterable[Sequence[RowsTaken]]) -> str:
    names = {one.name.removeprefix(IDS) for rows in taken for one in rows if one.name.startswith(IDS)}
    names.discard("")
    if len(names) == 1:
        return names.pop()
    many = (
        f"several models were seen ({', '.join(sorted(names))})"
        if names
        else "no model said where it comes from"
    )
    raise NotPossible(
        f'which checkpoint is not known: {many}; give compare("reference", checkpoint="folder").'
    )


def _fed(taken: Iterable[Sequence[RowsTaken]]) -> list[FedSequence]:
    """What each sequence was fed, as the first rank that saw the ids has it."""
    for rows in taken:
        parts: dict[int, RowsTaken] = {}
        for one in rows:
            if one.name.startswith(IDS) and one.digests:
                _put(parts, range(one.start, one.start + len(one.digests[0])), one)
        if not parts:
            continue
        words = [list[tuple[int, ...]]() for _ in next(iter(parts.values())).digests]
        for start in sorted(parts):
            if start != len(words[0]) or len(parts[start].digests) != len(words):
                raise NotPossible(
                    f'the ids that were seen have a gap before token {start}; give compare("reference", ids=[…]).'
                )
            for sequence, digests in enumerate(parts[start].digests):
                words[sequence] += digests
        return [_sequence(of_one) for of_one in words]
    raise NotPossible(
        'the token ids are not known: no whole model of transformers was called; give compare("reference", ids=[…]).'
    )


def _sequence(words: Sequence[tuple[int, ...]]) -> FedSequence:
    """From ids, or ids with what the probe knows of their mask and positions."""
    places = [row[1] if len(row) > 1 else 1 for row in words]
    positions = [place // 2 - 1 if place > 1 else at for at, place in enumerate(places)]
    is_as_counted = positions == list(range(len(words)))
    return FedSequence(
        [row[0] for row in words], [bool(place % 2) for place in places], None if is_as_counted else positions
    )


def _pieces(taken: Iterable[Sequence[RowsTaken]], tokens: int) -> list[range]:
    """What was fed at a time: by the ids, else by the rows of the first layer that was taken."""
    spans: dict[int, set[range]] = {}
    for rows in taken:
        for one in rows:
            if one.digests and (one.name.startswith(IDS) or one.layer is not None):
                layer = -1 if one.name.startswith(IDS) or one.layer is None else one.layer
                spans.setdefault(layer, set()).add(range(one.start, one.start + len(one.digests[0])))
    found = sorted(spans[min(spans)], key=lambda span: span.start) if spans else []
    ends = [0, *(span.stop for span in found)]
    is_whole = all(span.start == end for span, end in zip(found, ends, strict=False)) and ends[-1] == tokens
    return found if is_whole else [range(tokens)]


def check_dtype(dtype: str) -> None:
    """Raises NotPossible for a dtype that no reference has."""
    if dtype not in UNIT_ROUNDOFF:
        raise NotPossible(
            f'dtype {dtype!r} has no reference; give one of {", ".join(UNIT_ROUNDOFF)}: compare("reference", dtype=…).'
        )


def _of_pieces(parts: Sequence[Rows], pieces: Sequence[range]) -> list[Rows]:
    """Logits as the reference has them: of the last token of each piece, numbered by pieces."""
    found = []
    for number, part in enumerate(parts):
        at = number
        if len(parts) != len(pieces):
            at = next((n for n, piece in enumerate(pieces) if piece.stop == part.stop), -1)
        if at >= 0:
            sketches = None if part.sketches is None else part.sketches[-1:]
            found.append(Rows(at, part.digests[-1:], sketches, part.dtype))
    return found


def _beside(rank: int, key: TapKey, mine: Rows, theirs: Rows, tolerated: float) -> _Compared | None:
    """The rows that both have."""
    start, stop = max(mine.start, theirs.start), min(mine.stop, theirs.stop)
    if start >= stop:
        return None
    here, there = (
        slice(start - mine.start, stop - mine.start),
        slice(start - theirs.start, stop - theirs.start),
    )
    changed = mine.digests[here] != theirs.digests[there]
    if mine.sketches is None or theirs.sketches is None:
        share = torch.where(changed, math.nan, 0.0)
        return _Compared(rank, key, start, changed, share, tolerated)
    one, other = mine.sketches[here].double(), theirs.sketches[there].double()
    apart, length = (one - other).norm(dim=-1), other.norm(dim=-1)
    share = torch.where(apart > 0, apart / length, 0.0)
    share = torch.where(one.isfinite().all(-1) & other.isfinite().all(-1), share, math.inf)
    if (
        key[2] == LOGITS
    ):  # the head rounds otherwise where it is given all rows than where it is given the last alone
        changed = ~(share <= tolerated)
    elif mine.dtype != theirs.dtype:
        changed = share > 0
    return _Compared(rank, key, start, changed, torch.where(changed, share, 0.0), tolerated)


def _dtype(tensors: Iterable[Mapping[TapKey, Sequence[Rows]]]) -> str:
    """That of KV or hidden states."""
    dtypes = [rows[0].dtype for own in tensors for key, rows in own.items() if key[2] != LOGITS]
    return dtypes[0] if dtypes else "auto"


# -- the reference


def _reference(
    decoder: Decoder, sequence: int, fed: FedSequence, pieces: Sequence[range]
) -> dict[TapKey, Rows]:
    parts: dict[TapKey, list[tuple[Tensor, Tensor]]] = {}

    def add(layer: int, tensor: str, digests: Tensor, sketches: Tensor) -> None:
        parts.setdefault((sequence, layer, tensor), []).append((digests.cpu(), sketches.cpu()))

    def see(what: str, layer: int, tensor: Tensor) -> None:
        if what == "hidden":
            rows = (last_dim_digests(tensor[0]), row_sketches(tensor[0]))
            if layer < decoder.num_layers:
                add(layer, HIDDEN, *rows)
            if layer:
                add(layer - 1, OUTPUT, *rows)
            return
        for n, name in enumerate("KV"):
            heads = tensor[:, n].transpose(0, 1)  # [kv_heads, tokens, head_dim]
            add(layer, name, token_digests(heads), token_sketches(heads))

    forward = Forward(decoder, see)
    for piece in pieces:
        span = slice(piece.start, piece.stop)
        output = forward.feed(
            fed.ids[span],
            None if fed.mask is None else fed.mask[: piece.stop],
            None if fed.positions is None else fed.positions[span],
        )
        add(AFTER_ALL, LOGITS, last_dim_digests(output.logits[None]), row_sketches(output.logits[None]))
    dtype = str(decoder.dtype).removeprefix("torch.")
    return {
        key: Rows(
            0,
            torch.cat([digests for digests, _ in some]),
            torch.cat([sketches for _, sketches in some]),
            "float32" if key[2] == LOGITS else dtype,
        )
        for key, some in parts.items()
    }
