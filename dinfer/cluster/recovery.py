"""Recovery after a fault: free blocked ranks, start lost ones again, let all meet. Ranks that live keep their weights.

Blocked lanes of ranks that live are drained: the positions name each op that has begun and not ended, and its
counterpart is posted. A rank that this does not free is killed and started again. So is one whose `%%px` cell does not
end, though it is interrupted: it could run no other.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence

from dinfer.cluster.ranks import RankRefused, Ranks, answers
from dinfer.config import Backend
from dinfer.engine.board import Stand
from dinfer.messages import DrainChannels, Freeze, JoinGroup, LeaveGroup, LimitDecode, OpenStore, SetLimits
from dinfer.plan.graph import Channel, channel_of
from dinfer.plan.plan import Plan

FREEZE_S = 3.0

LEAVE_S = 8.0

CELL_S = 3.0
"""for so long a cell may take to end once the ranks that it waits for have left, or it was interrupted"""

MEET_S = 60.0

STILL_S = 0.1
"""Positions are published at least this often: where they have not changed, the rank does not move."""


def counterparts(plan: Plan, stands: dict[int, Stand]) -> dict[int, dict[str, list[Channel]]]:
    """By rank, the channels on which it must send or receive so that the living ranks, those in `stands`, come free.
    Pure."""
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
    *,
    kill: bool = True,
) -> list[int]:
    """Bring all ranks to where a run can start. Returns those that were started again, and so have no weights.

    `known_stuck`: ranks in an op that does not end; they are not asked to come free. `say` gets a line per event.
    Without `kill`, only what is blocked is freed. Raises TimeoutError or RankRefused where that fails.
    """
    lost = {rank for rank, code in enumerate(ranks.exits()) if code is not None} | set(ranks.silent())
    stuck = {rank for rank in known_stuck if rank not in lost and ranks.can_kill}
    if len(lost | stuck) == ranks.world_size and stuck:
        # One of those that wait for others comes free once these have ended, and keeps its weights.
        stuck.discard(min(stuck))

    def end(silent: Collection[int]) -> None:
        """Kill ranks that do not answer: they are stuck, unless their process has died since it was looked at."""
        if silent and not kill:
            who = ", ".join(map(str, sorted(silent)))
            raise RankRefused(f"rank {who} does not come free of its op: session.recover() starts it again.")
        exits = ranks.exits() if silent else []
        for rank in sorted(silent):
            (stuck if exits[rank] is None else lost).add(rank)
            ranks.kill(rank)

    for rank in sorted(lost | stuck):  # first, since what waits for them ends with them
        ranks.kill(rank)
    ranks.free()
    living = [rank for rank in range(ranks.world_size) if rank not in lost | stuck]
    # A rank that does not answer is stopped, or its GIL is held: kill it. LimitDecode first: it also frees a rank that
    # is held between two tokens.
    heard = answers(ranks, dict.fromkeys(living, LimitDecode(0)), FREEZE_S)
    end(set(living) - set(heard))
    frozen = answers(ranks, dict.fromkeys(heard, Freeze()), FREEZE_S)
    if plan:
        _drain(ranks, plan, frozen)
    # The others leave together: whoever waits in a collective for a rank that has given it up comes free once that rank
    # has left.
    left = answers(ranks, dict.fromkeys(heard, LeaveGroup()), LEAVE_S)
    end({rank for rank in heard if rank not in left or not left[rank].free})
    if kill and (busy := _in_cells(ranks, sorted({*heard} - stuck - lost), say)):
        if len(lost | stuck) + len(busy) == ranks.world_size:
            end(busy[1:])
            busy = ranks.in_cells(busy[:1], CELL_S)
        end(busy)
    for rank in sorted(lost | stuck):
        say(f"rank {rank} {'was stuck and ' if rank in stuck else ''}is started again")
        ranks.revive(rank)
    meet(ranks, backend)
    return sorted(lost | stuck)


def _in_cells(ranks: Ranks, among: Sequence[int], say: Callable[[str], None]) -> list[int]:
    """Those of these ranks whose cell does not end."""
    busy = ranks.in_cells(among, CELL_S)
    if busy:
        for rank in busy:
            say(f"rank {rank}'s cell is interrupted")
            ranks.interrupt(rank)
        busy = ranks.in_cells(busy, CELL_S)
    return busy


def meet(ranks: Ranks, backend: Backend = "gloo") -> None:
    """Let all ranks make a new group. Raises TimeoutError or RankRefused."""
    wanted = ranks.meeting()
    opened = ranks.ask({0: OpenStore(wanted.address, wanted.port)}, MEET_S)[0]
    command = JoinGroup(opened.address, opened.port, MEET_S, backend)
    ranks.ask(dict.fromkeys(range(ranks.world_size), command), MEET_S)


def _drain(ranks: Ranks, plan: Plan, frozen: dict[int, Stand]) -> None:
    """Post the counterparts of all transfers between these ranks that are under way."""
    cut = tuple(frozen[rank].positions if rank in frozen else () for rank in range(plan.world_size))
    # With limits at their positions, no lane begins again the op that it is released from.
    held = answers(ranks, dict.fromkeys(frozen, SetLimits(cut, stopping=True)), FREEZE_S)

    def stands() -> dict[int, Stand]:
        return {rank: stand for rank in held if (stand := ranks.ranks[rank].stand) is not None}

    def has_moved() -> bool:
        return stands() != found

    deadline = time.monotonic() + FREEZE_S
    with ranks.changed:  # until the transfers between them that have both ends have ended
        found = stands()
        while time.monotonic() < deadline and ranks.changed.wait_for(has_moved, STILL_S):
            found = stands()
    posts = counterparts(plan, found)
    drains = {rank: DrainChannels(tuple(own["sends"]), tuple(own["recvs"])) for rank, own in posts.items()}
    answers(ranks, drains, FREEZE_S)
