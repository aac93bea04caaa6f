"""Recovery after a fault: free what is blocked, bring back who is lost, let all meet again. Weights stay on the living.

Blocked lanes of ranks that live are drained: positions name, for each op that has begun and not ended, its
counterpart, and that is posted. A rank that does not come free that way is ended and started again.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from dinfer.config import Backend
from dinfer.engine.board import Stand
from dinfer.engine.commands import Message, stand_of
from dinfer.plan.graph import Channel, channel_of
from dinfer.plan.plan import Plan
from dinfer.session.ranks import Ranks

FREEZE_S = 3.0
LEAVE_S = 8.0
MEET_S = 60.0


def counterparts(plan: Plan, stands: dict[int, Stand]) -> dict[int, dict[str, list[Channel]]]:
    """By rank, the channels on which it must send or receive so that the living ranks, which are those of `stands`,
    come free. Pure."""
    posts: dict[int, dict[str, list[Channel]]] = defaultdict(lambda: {"sends": [], "recvs": []})
    begun = [
        (rank, lane.ops[position])
        for rank, stand in stands.items()
        for lane, position, started in zip(plan.lanes[rank], stand.positions, stand.started, strict=True)
        if started
    ]
    channels = {(channel_of(rank, op), op.kind): rank for rank, op in begun if op.is_transfer}
    for rank, op in begun:
        channel = channel_of(rank, op)
        other = "recv" if op.kind == "send" else "send"
        if op.is_transfer and op.peer in stands and (channel, other) not in channels:
            posts[op.peer]["sends" if op.kind == "recv" else "recvs"].append(channel)
    return dict(posts)


def recover(ranks: Ranks, plan: Plan | None, backend: Backend, say: Callable[[str], None]) -> list[int]:
    """Bring all ranks to where a run can start; those that were started again, and have no weights.

    Raises TimeoutError or RankRefused where that fails.
    """
    lost = {rank for rank, code in enumerate(ranks.exits()) if code is not None}
    lost |= {rank for rank, state in enumerate(ranks.ranks) if state.gone}
    lost |= set(ranks.silent())
    living = [rank for rank in range(ranks.world_size) if rank not in lost]
    ranks.free()
    lost |= _stuck(ranks, plan, living)
    for rank in sorted(lost):
        say(f"rank {rank} is started again")
        ranks.kill(rank)
        ranks.revive(rank)
    meet(ranks, backend)
    return sorted(lost)


def meet(ranks: Ranks, backend: Backend = "gloo") -> None:
    """Let all ranks make a new group. Raises TimeoutError or RankRefused."""
    where = ranks.ask({0: {"do": "open", **ranks.meeting()}}, MEET_S)[0]
    place = {"address": where["address"], "port": where["port"], "timeout": MEET_S, "backend": backend}
    ranks.ask({rank: {"do": "meet", **place} for rank in range(ranks.world_size)}, MEET_S)


def _stuck(ranks: Ranks, plan: Plan | None, living: Iterable[int]) -> set[int]:
    """Have the living give up their run; those that cannot."""
    stuck = set[int]()
    stands: dict[int, Stand] = {}
    for rank in living:
        answer = _try(ranks, rank, FREEZE_S, do="freeze")
        if answer is not None and "positions" in answer:
            stands[rank] = stand_of(answer)
    if plan:
        _drain(ranks, plan, stands)
    for rank in living:
        answer = _try(ranks, rank, LEAVE_S, do="leave")
        if answer is None or not answer.get("free"):
            stuck.add(rank)
    return stuck


def _drain(ranks: Ranks, plan: Plan, stands: dict[int, Stand]) -> None:
    cut = tuple(stands[rank].positions if rank in stands else () for rank in range(plan.world_size))
    for rank in stands:  # so that no lane takes up again what it is released from
        _try(ranks, rank, FREEZE_S, do="limits", cut=cut, stopping=True)
    for rank, channels in counterparts(plan, stands).items():
        _try(ranks, rank, FREEZE_S, do="drain", **channels)


def _try(ranks: Ranks, rank: int, timeout: float, **message: Any) -> Message | None:
    """A rank's answer; None where it refuses or does not answer."""
    try:
        return ranks.ask({rank: message}, timeout)[rank]
    except (TimeoutError, RuntimeError):
        return None
