"""Origin: where a block's bytes first became other than those that were computed. Pure: plan and digests in, op out.

Three digests of a block are known of each rank on its route: of what was announced, of what had arrived, and of what is
there now. The origin is the first place on the route where they differ.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from dinfer.kv.ledger import UNKNOWN, Digests
from dinfer.kv.source import Noted
from dinfer.plan.plan import Plan

CausePlace = Literal["wire", "memory", "compute", ""]


class Origin(NamedTuple):
    """`rank`: where a block first differed; `where`: on the wire to it, in its memory, in its compute, or nothing where
    that is not known; `op`: the op that brought it or, in quotes, after which it changed; `text`: for people; `hops`:
    how many hops the block has come from the rank that computes it."""

    rank: int
    where: CausePlace
    op: str
    text: str
    hops: int = 0


class BlockRoute:
    """The routes of blocks to ranks in a plan."""

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
        """The rank from which this one receives the block; None: it computes it."""
        return self._peers.get((rank, chunk, layer))

    def path(self, rank: int, chunk: int, layer: int) -> list[int]:
        """The ranks that the block passes: the one that computes it first, this one last."""
        found = [rank]
        while (peer := self.peer(found[0], chunk, layer)) is not None and peer not in found:
            found.insert(0, peer)
        return found

    def op(self, rank: int, chunk: int, layer: int) -> str:
        """The op that computes or receives the block on that rank, for example `recv kv c1 l7 <- 1`."""
        peer = self.peer(rank, chunk, layer)
        return f"layer c{chunk} l{layer}" if peer is None else f"recv kv c{chunk} l{layer} <- {peer}"

    def origin(
        self, rank: int, chunk: int, layer: int, noted: Mapping[int, Noted], now: Mapping[int, Digests]
    ) -> Origin:
        """Where a block that is wrong on that rank became so. `noted`, `now`: by rank, as far as they are known."""
        path, peer = self.path(rank, chunk, layer), self.peer(rank, chunk, layer)
        arrival = f"received by {self._plan.sync_strategy} hop {peer}→{rank} in chunk {chunk}"
        if peer is None:
            arrival = f"computed there in chunk {chunk}"
        hops, right = len(path) - 1, truth(noted, path[0])
        if right is None or any(one not in noted for one in path):
            return Origin(rank, "", self.op(rank, chunk, layer), arrival, hops)
        at, how = rank, "changed afterwards"
        for source, one in zip([None, *path], path, strict=False):
            if noted[one].came == right:
                continue
            if noted[one].edited:
                at, how = one, "edited by hand"
                break
            if source is not None and now.get(source) == noted[one].came:  # it was changed before it was sent
                at = source
                break
            if source is not None:
                text, op = ", where it changed on the wire", self.op(one, chunk, layer)
                if one != rank:
                    text, op = f"; it changed at hop {source}→{one}", f"{op} on rank {one}"
                return Origin(one, "wire", op, arrival + text, hops)
        text = f"; {how} in rank {at}'s memory, before it was passed on"
        if at == rank:
            text = f", {how} in its memory"
        op = f"after `{self.op(at, chunk, layer)}` in rank {at}'s memory"
        return Origin(at, "memory", op, arrival + text, hops)


def truth(noted: Mapping[int, Noted], owner: int) -> Digests | None:
    """The digests of the block as it was computed: what headers have announced to most receivers. None: no ledger has
    it.

    The owner's own ledger counts only where no receiver has one: it follows what its user edits, headers do not.
    """
    others = [one for rank, one in noted.items() if rank != owner and not one.edited]
    announced = [one.announced for one in others if one.announced != UNKNOWN]
    if announced:
        return max(announced, key=announced.count)
    return noted[owner].came if owner in noted else None
