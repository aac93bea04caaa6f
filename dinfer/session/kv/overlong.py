"""Overlong: layers of which a rank holds more rows than it should, or fewer, and what those rows are."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dinfer.session.kv.detail import Side, chunk_of
from dinfer.session.kv.difference import Difference
from dinfer.session.kv.lengths import repeats
from dinfer.session.kv.origin import Way
from dinfer.session.kv.rows import Finding, Kind
from dinfer.session.kv.source import Held, Subject
from dinfer.session.kv.words import concerned, numbers_text

GoodSide = Callable[[Side, int], Side | None]
"""another side whose layer is as it should be, if there is one"""


class _Wrong(NamedTuple):
    """One layer of one rank."""

    side: Side
    layer: int
    rows: int
    right: int
    findings: list[Finding]

    @property
    def looks(self) -> tuple[int, int, str]:
        """What is said of it, which may be said of others too."""
        return self.rows, self.right, "; ".join(finding.text for finding in self.findings)


class Overlong:
    """Of the layers of some sides. `known`: the cells that are explained, by the side's name and layer."""

    def __init__(
        self, subject: Subject, sides: Sequence[tuple[Side, Held]], layers: Sequence[int], way: Way
    ) -> None:
        self._subject, self._sides, self._layers, self._way = subject, sides, layers, way
        self.known: dict[tuple[str, int], Tensor] = {}

    def differences(self, good: GoodSide) -> list[Difference]:
        """One for each layer of a rank that is too long or too short."""
        wrong = [
            self._wrong(side, layer, held.rows[layer], right, good)
            for side, held in self._sides
            for layer in self._layers
            if held.rows[layer] != (right := self._right(held, layer))
        ]
        return [self._difference(one, wrong) for one in wrong]

    def _right(self, held: Held, layer: int) -> int:
        return self._subject.spans[held.spans[layer] - 1].stop if held.spans[layer] else 0

    def _wrong(self, side: Side, layer: int, rows: int, right: int, good: GoodSide) -> _Wrong:
        got = side.source.rows(side.rank, layer, range(rows))
        other = good(side, layer)
        want = other.source.rows(other.rank, layer, range(right)) if other else got
        findings = repeats(got, want)
        explained = [one.cells for one in findings]
        if explained:
            self.known[side.name, layer] = torch.stack(explained).any(0)
        return _Wrong(side, layer, rows, right, findings)

    def _difference(self, one: _Wrong, wrong: Sequence[_Wrong]) -> Difference:
        source = next((f.source for f in one.findings if f.source is not None), None)
        place = next((concerned(f.cells)[0] for f in one.findings if f.cells.any()), None)
        span = self._span(source if source is not None else min(place or 0, one.right - 1))
        chunk = chunk_of(self._subject, span)
        op = "decode" if chunk is None else self._way.op(one.side.rank, chunk, one.layer)
        after = op if chunk is None else f"after `{op}` in rank {one.side.rank}'s memory"
        return Difference(
            rank=one.side.rank, layer=one.layer, chunk=chunk, tensor=None, head=None, token=place, dim=None,
            values=None, op=after, kind=_kind(one), where="compute" if chunk is None else "memory",
            rows=abs(one.rows - one.right), name=one.side.name, note=self._note(one, wrong),
        )  # fmt: skip

    def _span(self, place: int) -> int:
        return next((n for n, span in enumerate(self._subject.spans) if place in span), 0)

    def _note(self, one: _Wrong, wrong: Sequence[_Wrong]) -> str:
        """For example `rank 0 holds 52 tokens of layer 0, the others 26; rows 26–51 repeat rows 0–25`."""
        alike = [other for other in wrong if other.looks == one.looks]
        names = list(dict.fromkeys(other.side.name for other in alike if other.layer == one.layer))
        layers = sorted({other.layer for other in alike if other.side.name == one.side.name})
        everyone = len(names) == len(self._sides) > 1
        who = f"all {len(names)} ranks hold" if everyone else f"{one.side.name} holds"
        lone = len(self._sides) == 1 or any(
            other.layer == one.layer and other.side.name != one.side.name for other in wrong
        )
        right = f"it should be {one.right}" if everyone or lone else f"the others {one.right}"
        which = f"layer{'s' * (len(layers) > 1)} {numbers_text(layers)}"
        texts = [finding.text for finding in one.findings]
        few = texts[:4] + [f"and {len(texts) - 4} more such"] * (len(texts) > 4)
        return "; ".join([f"{who} {one.rows} tokens of {which}, {right}", *few])


def _kind(one: _Wrong) -> Kind:
    found = [finding.kind for finding in one.findings]
    order: tuple[Kind, ...] = ("repeated", "missing", "shifted", "extra")
    return next((kind for kind in order if kind in found), "extra" if one.rows > one.right else "missing")
