"""Compares what a watched model computed with transformers' own forward of the same checkpoint on the same ids.

The probe has kept digests of rows, which tell whether they are equal bit for bit, and sketches, which tell about how
far they are apart; the tensors are gone. The forward runs in this process, in the pieces in which the model was fed,
and is digested and sketched likewise. It gets the mask and positions that the model was given; rows of padding are left
out. `taken` puts together what was kept, `comparison` says what was found.
"""

import math
from collections.abc import Mapping, Sequence
from time import perf_counter

import torch
from torch import Tensor

from dinfer.errors import NotPossible
from dinfer.model.decoder import Decoder
from dinfer.model.reference import Forward
from dinfer.model.tolerance import UNIT_ROUNDOFF, tolerance
from dinfer.watch.probe.digests import last_dim_digests, row_sketches, token_digests, token_sketches
from dinfer.watch.probe.rows import RowsTaken
from dinfer.watch.probe.tensors import HIDDEN, OUTPUT
from dinfer.watching.comparison import ComparedRows, WatchedComparison
from dinfer.watching.taken import (
    AFTER_ALL,
    LOGITS,
    ORDER,
    FedSequence,
    Rows,
    TapKey,
    checkpoint_of,
    dtype_of,
    fed_sequences,
    newest,
    pieces_of,
    tensors_of,
)


def compare(
    taken: Mapping[int, Sequence[RowsTaken]],
    checkpoint: str | None = None,
    ids: Sequence[int] | None = None,
    dtype: str | None = None,
) -> WatchedComparison:
    """Run transformers' forward, and compare what each rank has computed last. Raises NotPossible where checkpoint, ids
    or tensors are not known, ModelError for what is no checkpoint."""
    last = {rank: newest(rows) for rank, rows in taken.items()}
    tensors = {rank: tensors_of(rows) for rank, rows in last.items()}
    tensors = {rank: found for rank, found in tensors.items() if found}
    if not tensors:
        raise NotPossible(
            "nothing was taken that could be compared with a reference: no model of transformers has computed in a "
            "watch with compare=True (of the command: --compare), and nothing has called "
            'dinfer.tap("hidden", tensor, layer=…).'
        )
    path = checkpoint or checkpoint_of(last.values())
    fed = [FedSequence(list(ids), [True] * len(ids))] if ids is not None else fed_sequences(last.values())
    length = len(fed[0].ids)
    pieces = pieces_of(last.values(), length)
    dtype = dtype or dtype_of(tensors.values())
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


def _beside(rank: int, key: TapKey, mine: Rows, theirs: Rows, tolerated: float) -> ComparedRows | None:
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
        return ComparedRows(rank, key, start, changed, share, tolerated)
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
    return ComparedRows(rank, key, start, changed, torch.where(changed, share, 0.0), tolerated)


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
