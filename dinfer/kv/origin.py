"""Origin: where a block's bytes first became other than those that were computed. Pure: plan and digests in, op out.

Of every rank on a block's way three digests are known: what had arrived, what was announced, and what is there now. The
first place on the way where they part is the origin.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from dinfer.kv.ledger import UNKNOWN, Digests
from dinfer.kv.source import Noted
from dinfer.plan.plan import Plan

CausePlace = Literal["wire", "memory", "compute", ""]


class Origin(NamedTuple):
    """`rank`: where it first differed; `where`: on the wire to it, in its memory, in its compute, or nothing where that
    is not known; `op`: the op that brought it or, in quotes, after which it changed; `text`: for people."""

    rank: int
    where: CausePlace
    op: str
    text: str


class BlockRoute:
    """How blocks come to ranks, by a plan."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._peers = {
            (rank, op.chunk, op.layer): op.peer
            for rank, lanes in enumerate(plan.lanes)
            for lane in lanes
            for op in lane.ops
            if op.kind == "recv" and op.what == "kv"
        }

    def peer(self, rank: int, chunk: int, layer: int) -> int | None:
        """From whom a rank gets that block; None: it computes it."""
        return self._peers.get((rank, chunk, layer))

    def hops(self, rank: int, chunk: int, layer: int) -> int:
        """How many hops away from who computes the block."""
        return len(self.path(rank, chunk, layer)) - 1

    def path(self, rank: int, chunk: int, layer: int) -> list[int]:
        """The ranks that the block passes on its way to this one, who computes it first."""
        found = [rank]
        while (peer := self.peer(found[0], chunk, layer)) is not None and peer not in found:
            found.insert(0, peer)
        return found

    def op(self, rank: int, chunk: int, layer: int) -> str:
        """The op that makes the block on that rank, for example `recv kv c1 l7 <- 1`."""
        peer = self.peer(rank, chunk, layer)
        return f"layer c{chunk} l{layer}" if peer is None else f"recv kv c{chunk} l{layer} <- {peer}"

    def came(self, rank: int, chunk: int, layer: int) -> str:
        """How the block came to be on that rank, in words."""
        peer = self.peer(rank, chunk, layer)
        if peer is None:
            return f"computed there in chunk {chunk}"
        return f"received by {self._plan.sync_strategy} hop {peer}→{rank} in chunk {chunk}"

    def origin(
        self, rank: int, chunk: int, layer: int, noted: Mapping[int, Noted], now: Mapping[int, Digests]
    ) -> Origin:
        """Of what is wrong with the block on that rank. `noted` and `now` are by rank, as far as they are known."""
        path = self.path(rank, chunk, layer)
        right = truth(noted, path[0])
        came = self.came(rank, chunk, layer)
        if right is None or any(one not in noted for one in path):
            return Origin(rank, "", self.op(rank, chunk, layer), came)
        for source, one in zip([None, *path], path, strict=False):
            if noted[one].edited and noted[one].came != right:
                return self._at(one, True, rank, chunk, layer, "edited by hand")
            if source is not None and noted[one].came != right:
                changed_before = now.get(source) == noted[one].came
                return self._at(source if changed_before else one, changed_before, rank, chunk, layer)
        return self._at(rank, True, rank, chunk, layer)

    def _at(
        self, at: int, in_memory: bool, rank: int, chunk: int, layer: int, how: str = "changed afterwards"
    ) -> Origin:
        op, came = self.op(at, chunk, layer), self.came(rank, chunk, layer)
        if in_memory:
            text = f"{came}, {how} in its memory"
            if at != rank:
                text = f"{came}; {how} in rank {at}'s memory, before it was passed on"
            return Origin(at, "memory", f"after `{op}` in rank {at}'s memory", text)
        hop = f"{self.peer(at, chunk, layer)}→{at}"
        text = f"{came}, where it changed on the wire" if at == rank else f"{came}; it changed at hop {hop}"
        return Origin(at, "wire", op, text)


def truth(noted: Mapping[int, Noted], owner: int) -> Digests | None:
    """The digests of the block as it was computed: what its receivers were announced; None where no ledger tells.

    The owner's own word counts where nobody else has one: its ledger follows what its user edits, headers do not.
    """
    others = [one for rank, one in noted.items() if rank != owner and not one.edited]
    said = [one.announced for one in others if one.announced != UNKNOWN]
    return max(said, key=said.count) if said else noted[owner].came if owner in noted else None
