"""Verdict: the first line of a diff. Pure."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dinfer.engine.ledger import Key
from dinfer.session.kv.difference import Difference
from dinfer.session.kv.source import Subject
from dinfer.session.kv.words import numbers_text


class Compared(NamedTuple):
    """What was compared: `blocks` are those that all sides hold, by span and layer; `world_size`: how many ranks there
    are; `other`: the name of the other source, if there is one."""

    subject: Subject
    ranks: tuple[int, ...]
    layers: tuple[int, ...]
    blocks: tuple[Key, ...]
    world_size: int
    other: str

    @property
    def values(self) -> int:
        """How many values were compared on each rank."""
        tokens = sum(len(self.subject.spans[span]) for span, _ in self.blocks)
        return tokens * 2 * self.subject.kv_heads * self.subject.head_dim


def equal_text(compared: Compared) -> str:
    """For example `all 3 ranks hold the same 36 × 8 blocks, bit for bit`."""
    blocks, missing = _blocks_text(compared)
    if compared.other:
        return f"{compared.subject.name} and {compared.other} hold the same {blocks}, bit for bit{missing}"
    if len(compared.ranks) == 1:
        return f"rank {compared.ranks[0]} holds {blocks} as they were made, bit for bit{missing}"
    return f"{_who(compared)} hold the same {blocks}, bit for bit{missing}"


def unequal_text(compared: Compared, differences: Sequence[Difference], values: Mapping[str, int]) -> str:
    """The first difference in a sentence; of a value, how many of how many differ."""
    first = differences[0]
    if first.kind != "value" or first.values is None:
        return str(first)
    count = values.get(first.name, 0)
    some = "at least " if any(one.dim is None and one.name == first.name for one in differences) else ""
    place, came = str(first).removesuffix(f"; {first.came}"), first.came
    total = f"{some}{count:,} of {compared.values:,} values"
    return "; ".join(part for part in (place, total, came) if part)


def _blocks_text(compared: Compared) -> tuple[str, str]:
    """How many blocks, and which of those asked for are not there yet."""
    chunks = len(compared.subject.plan.shape.chunks)
    prompt = [key for key in compared.blocks if key[0] < chunks]
    new = {span for span, _ in compared.blocks if span >= chunks}
    of_layers, of_chunks = len({layer for _, layer in prompt}), len({span for span, _ in prompt})
    whole = of_layers * of_chunks == len(prompt)
    text = f"{of_layers} × {of_chunks} blocks" if whole else f"{len(prompt)} blocks"
    if new:
        tokens = len(compared.subject.spans[chunks])
        text += f", and rows of {tokens} new token{'s' * (tokens > 1)}"
    asked = len(compared.layers) * chunks
    if of_chunks < chunks and len(prompt) < asked and not whole:
        return text, f" ({asked - len(prompt)} are not on all of them yet)"
    return text, ""


def _who(compared: Compared) -> str:
    ranks = compared.ranks
    if len(ranks) == compared.world_size:
        return f"all {len(ranks)} ranks" if len(ranks) > 2 else "both ranks"
    return f"ranks {numbers_text(ranks) if len(ranks) > 2 else ' and '.join(map(str, ranks))}"
