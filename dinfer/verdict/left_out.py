"""Messages that one rank has left out of a row of them, by the chunks and layers that both ends name. Pure.

Messages of one link meet in the order of issue. If one is left out, every later one meets the place before its own:
what was meant for micro-batch 5 gets that of 6. Nothing shows of it where tensors are of one shape, until the last one
waits.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dinfer.verdict.matching import MatchedOps, RecordedOp

LEAST_ALIKE = 3
"""messages of a link that agree on their block before the one that was left out"""


class LeftOut(NamedTuple):
    """`rank` did not issue its part of a message, of which `lonely` is the other end's; that met `instead`."""

    rank: int
    lonely: RecordedOp
    instead: RecordedOp


def left_out(ops: MatchedOps) -> Iterator[LeftOut]:
    """The first such message of each link."""
    for sends, recvs in ops.links():
        sent, received = _blocks(sends), _blocks(recvs)
        pairs = min(len(sent), len(received))
        at = next((n for n in range(pairs) if sent[n] != received[n]), pairs)
        if at < LEAST_ALIKE or at == pairs or None in (*sent[: at + 1], *received[: at + 1]):
            continue
        if sent[at : at + 2] == received[at : at + 2][::-1]:  # they have changed places
            continue
        if _follow(sent[at:], received[at + 1 :]):
            yield LeftOut(sends[at].event.rank, recvs[at], sends[at])
        elif _follow(received[at:], sent[at + 1 :]):
            yield LeftOut(recvs[at].event.rank, sends[at], recvs[at])


def _follow(some: Sequence[object], others: Sequence[object]) -> bool:
    """Whether these blocks are the others, as far as both go."""
    both = min(len(some), len(others))
    return both > 0 and list(some[:both]) == list(others[:both])


def _blocks(ops: Sequence[RecordedOp]) -> list[object]:
    """Layer and chunk of each op, None where neither is known."""
    found = ((op.event.layer, op.event.chunk) for op in ops)
    return [None if block == (None, None) else block for block in found]
