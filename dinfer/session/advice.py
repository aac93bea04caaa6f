"""What to do about a run that stands still: one line, by what is seen of its ranks. Pure."""

from collections.abc import Sequence

from dinfer.config import Config
from dinfer.plan.ops import Op
from dinfer.plan.plan import Plan
from dinfer.session.states import RankState

STOPPED = ("T", "t")
"""states of a process that a signal or a debugger has stopped"""


def advice(plan: Plan, ranks: Sequence[RankState], config: Config) -> str:
    """Who should be looked at first: a stopped rank, one that has not loaded, one that computes, else the network."""
    if stopped := [rank for rank, state in enumerate(ranks) if state.process in STOPPED]:
        return (
            f"{_ranks(stopped)} stopped by a signal or a debugger: let it go on (kill -CONT, or the debugger's "
            "continue) and run again."
        )
    if loading := [
        rank for rank, state in enumerate(ranks) if state.phase not in ("prefill", "decode", "done")
    ]:
        return (
            f"{_ranks(loading)} still starting or loading: raise start_timeout ({config.start_timeout:g}) if the "
            f"checkpoint is large or its disk slow; else see {config.log_dir}/rank{loading[0]}.log."
        )
    busy = [rank for rank, state in enumerate(ranks) if _computes(plan, rank, state)]
    if len(busy) == len(ranks):
        return f"All ranks are computing: if that is only slow, raise timeout ({config.timeout:g}) or lower chunk_size."
    if busy:
        return (
            f"{_ranks(busy)} computing, and the others wait for what comes of it: if that is only slow, raise timeout "
            f"({config.timeout:g}) or lower chunk_size; if it hangs, a debugger shows where (DINFER_DEBUGPY=1)."
        )
    return _waiting(plan, ranks)


def _waiting(plan: Plan, ranks: Sequence[RankState]) -> str:
    """Nobody computes: what the ranks wait for has no end of its own."""
    waits = [
        f"rank {rank} for rank {op.peer}"
        for rank, state in enumerate(ranks)
        for op in _started(plan, rank, state)[:1]
        if op.is_transfer
    ]
    who = f" ({', '.join(waits)})" if waits else ""
    return (
        f"Every rank waits for a peer{who}: prove the plan with dinfer verify, and the links with dinfer doctor; "
        "a longer timeout will not help."
    )


def _computes(plan: Plan, rank: int, state: RankState) -> bool:
    if state.phase == "decode":
        return state.process == "R"
    return any(not op.is_transfer for op in _started(plan, rank, state))


def _started(plan: Plan, rank: int, state: RankState) -> list[Op]:
    """The ops that a rank is in, by lane."""
    lanes, stand = plan.lanes[rank], state.stand
    if state.phase != "prefill" or stand is None or len(stand.positions) != len(lanes):
        return []
    places = zip(lanes, stand.positions, stand.started, strict=True)
    return [lane.ops[position] for lane, position, started in places if started and position < len(lane.ops)]


def _ranks(ranks: Sequence[int]) -> str:
    listed = ", ".join(map(str, ranks))
    return f"Ranks {listed} are" if len(ranks) > 1 else f"Rank {listed} is"
