"""Recovery after a fault: free what is blocked, bring back who is lost, let all meet again. Weights stay on the living.

Blocked lanes of ranks that live are drained: positions name, for each op that has begun and not ended, its
counterpart, and that is posted. A rank that does not come free that way is ended and started again.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from functools import partial

from dinfer.cluster.ranks import Ranks, answers
from dinfer.config import Backend
from dinfer.engine.board import Stand
from dinfer.messages import DrainChannels, Freeze, JoinGroup, LeaveGroup, LimitDecode, OpenStore, SetLimits
from dinfer.plan.graph import Channel, channel_of
from dinfer.plan.plan import Plan

FREEZE_S = 3.0

LEAVE_S = 8.0

MEET_S = 60.0

STILL_S = 0.1
"""ranks whose positions are published at least so often, and have not changed, do not move"""


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


def recover(
    ranks: Ranks,
    plan: Plan | None,
    backend: Backend,
    say: Callable[[str], None],
    known_stuck: Collection[int] = (),
) -> list[int]:
    """Bring all ranks to where a run can start; those that were started again, and have no weights.

    `known_stuck`: those in an op that does not end, which need not be asked to come free.

    Raises TimeoutError or RankRefused where that fails.
    """
    lost = {rank for rank, code in enumerate(ranks.exits()) if code is not None}
    lost |= set(ranks.silent())
    known = {rank for rank in known_stuck if rank not in lost and ranks.can_kill}
    for rank in sorted(lost | known):  # first of all: what waits for them ends with them
        ranks.kill(rank)
    ranks.free()
    living = [rank for rank in range(ranks.world_size) if rank not in lost | known]
    stuck = known | _end_the_stuck(ranks, plan, living)
    for rank in sorted(lost | stuck):
        say(f"rank {rank} {'was stuck and ' if rank in stuck else ''}is started again")
        ranks.revive(rank)
    meet(ranks, backend)
    return sorted(lost | stuck)


def meet(ranks: Ranks, backend: Backend = "gloo") -> None:
    """Let all ranks make a new group. Raises TimeoutError or RankRefused."""
    wanted = ranks.meeting()
    opened = ranks.ask({0: OpenStore(wanted.address, wanted.port)}, MEET_S)[0]
    command = JoinGroup(opened.address, opened.port, MEET_S, backend)
    ranks.ask(dict.fromkeys(range(ranks.world_size), command), MEET_S)


def _end_the_stuck(ranks: Ranks, plan: Plan | None, living: Sequence[int]) -> set[int]:
    """Have the living give up their run; those that could not, which are ended.

    Who is mute is stopped, or held by something that has the interpreter: it is ended, and asked for nothing more.
    The others leave together: whoever waits in a collective for one that has given it up comes free when that one has
    left.
    """
    # The first word is one that frees also who is held between two tokens.
    heard = answers(ranks, dict.fromkeys(living, LimitDecode(0)), FREEZE_S)
    mute = set(living) - set(heard)
    for rank in sorted(mute):
        ranks.kill(rank)
    frozen = answers(ranks, dict.fromkeys(heard, Freeze()), FREEZE_S)
    if plan:
        _drain(ranks, plan, frozen)
    left = answers(ranks, dict.fromkeys(heard, LeaveGroup()), LEAVE_S)
    held = {rank for rank in heard if rank not in left or not left[rank].free}
    for rank in sorted(held):
        ranks.kill(rank)
    return mute | held


def _drain(ranks: Ranks, plan: Plan, frozen: dict[int, Stand]) -> None:
    cut = tuple(frozen[rank].positions if rank in frozen else () for rank in range(plan.world_size))
    # Limits at positions, so that no lane takes up again what it is released from.
    held = answers(ranks, dict.fromkeys(frozen, SetLimits(cut, stopping=True)), FREEZE_S)
    posts = counterparts(plan, _still(ranks, list(held)))
    drains = {rank: DrainChannels(tuple(own["sends"]), tuple(own["recvs"])) for rank, own in posts.items()}
    answers(ranks, drains, FREEZE_S)


def _still(ranks: Ranks, living: Sequence[int]) -> dict[int, Stand]:
    """Where they stand once transfers between two of them that are under way have ended."""
    deadline = time.monotonic() + FREEZE_S
    with ranks.changed:
        before, found = None, _stands(ranks, living)
        while found != before and time.monotonic() < deadline:
            ranks.changed.wait_for(partial(_has_moved, ranks, living, found), STILL_S)
            before, found = found, _stands(ranks, living)
    return found


def _has_moved(ranks: Ranks, living: Sequence[int], before: dict[int, Stand]) -> bool:
    return _stands(ranks, living) != before


def _stands(ranks: Ranks, living: Sequence[int]) -> dict[int, Stand]:
    return {rank: stand for rank in living if (stand := ranks.ranks[rank].stand) is not None}
