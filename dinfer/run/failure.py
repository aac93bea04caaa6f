"""Which rank is the cause when a run cannot go on, in one message. Pure: states in, text out.

A raised error ranks above a death, and both above what a lost peer does to the others.
"""

import signal
from collections.abc import Sequence

from dinfer.cluster.ranks import LOST, RankState
from dinfer.config import Config
from dinfer.messages import Failed
from dinfer.plan.ops import Op
from dinfer.plan.plan import Plan
from dinfer.verdict.where import rank_text

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


SILENT = 257
"""The same for one whose watcher has not been heard of for `silence_limit` seconds."""

HANDED_ON = (
    "another session has joined these engines since, so this one and its runs are over: go on with that one, or join "
    "again with dinfer.connect(…)."
)

UNASKED = (
    "If nobody killed it, the kernel did, because memory ran out (see dmesg): lower chunk_size or the length, take "
    "dtype bfloat16, or fewer ranks on this machine."
)


def silence_limit(timeout: float) -> float:
    """Seconds after which a watcher, which speaks ten times a second, is given up; well within the run's `timeout`."""
    return min(10.0, max(timeout / 2, 3.0))


def broken(plan: Plan, ranks: Sequence[RankState], exits: Sequence[int | None], config: Config) -> str | None:
    """What has been raised, and who has died; None if nothing. `exits[rank]` is set for ranks that ended without a
    result."""
    if were_handed_on(ranks):
        return HANDED_ON
    errors = [(rank, state.error) for rank, state in enumerate(ranks) if state.error]
    primary = [(rank, error) for rank, error in errors if not error.secondary]
    dead = [rank for rank, code in enumerate(exits) if code is not None and not ranks[rank].error]
    if primary:
        rank, error = primary[0]
        if len(primary) > 1 and len({said.message for _, said in primary}) == 1:
            return error.message  # what all have found together is no rank's own
        return _told(error, rank, config)
    if dead:
        if len(dead) > 1 and all(exits[rank] == SILENT for rank in dead) and len(dead) == len(ranks) - 1:
            return _cut_off(plan, ranks, config)
        told = [_death(plan, rank, ranks[rank], exits[rank], config) for rank in dead]
        return (
            told[0] if config.log_dir else "\n".join([*told, "`session.recover()` brings back who is gone."])
        )
    if errors:
        rank, error = errors[0]
        return _told(error, rank, config)
    return None


def were_handed_on(ranks: Sequence[RankState]) -> bool:
    """Whether another session has joined these ranks' engines since."""
    return any(state.handed_on for state in ranks)


def is_certain(ranks: Sequence[RankState], exits: Sequence[int | None]) -> bool:
    """Whether more will not be known of a failure: its cause is, and those who died have had their last word, which is
    where they stood. What a lost peer does to the others is often heard of before."""
    dead = [rank for rank, code in enumerate(exits) if code is not None]
    raised = any(state.error and not state.error.secondary for state in ranks)
    return bool(dead or raised) and all(ranks[rank].gone for rank in dead)


def is_about_a_message(ranks: Sequence[RankState]) -> bool:
    """Whether a rank has got a message that was not the one expected."""
    return any(state.error and state.error.came for state in ranks)


def silent_text(plan: Plan, rank: int, state: RankState) -> str:
    """What to say of a rank that does not answer, though nothing says that it is gone."""
    why = "its process is stopped" if state.stopped else "its host or the network to it may be down"
    return (
        f"rank {rank} does not answer: {why}; it stands at: {_position(plan, rank, state)}\n"
        "Nothing is lost if it comes back (kill -CONT); `session.recover()` ends it and starts it again."
    )


def _told(error: Failed, rank: int, config: Config) -> str:
    message = error.message
    named = message if message.startswith(f"rank {rank} ") else f"rank {rank}: {message}"
    if error.log_trouble:
        return f"{named}\n{error.log_trouble}. So the whole traceback is here:\n{error.traceback}"
    if not config.log_dir:
        return f"{named}\n`session.log` has the whole traceback."
    return f"{named}\nThe whole traceback is in {config.log_dir}/rank{rank}.log."


def _death(plan: Plan, rank: int, state: RankState, code: int | None, config: Config) -> str:
    stood = f"rank {rank} {ending(code, config)}; it stood at: {_position(plan, rank, state)}"
    if not config.log_dir:
        return stood
    if code in (LOST, SILENT):
        return f"{stood}\nIts log is {config.log_dir}/rank{rank}.log on its host; its launcher may know more."
    printed = f"{stood}\nWhat it printed last is in {config.log_dir}/rank{rank}.err."
    return f"{printed}\n{UNASKED}" if code == -signal.SIGKILL else printed


def _cut_off(plan: Plan, ranks: Sequence[RankState], config: Config) -> str:
    where = "\n".join(f"rank {rank}: {_position(plan, rank, state)}" for rank, state in enumerate(ranks))
    return (
        f"nothing was heard of any other rank for {silence_limit(config.timeout):g} s: "
        f"rank 0's host may be cut off; where they stood:\n{where}"
    )


def ending(code: int | None, config: Config) -> str:
    """How a process has ended, by its exit status, as it is said after `rank N`."""
    if code == SILENT:
        limit = silence_limit(config.timeout)
        return f"has not been heard of for {limit:g} s: its host or the network to it may be down"
    if code == LOST:
        return "is gone: its process ended without a word"
    if code and code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit status {code}"


def _is_paused(ranks: Sequence[RankState]) -> bool:
    """Whether every lane stands where it was told to stop, so that it is the user who takes their time."""
    return all(
        state.phase == "prefill" and state.stand and state.stand.at_limits and not any(state.stand.started)
        for state in ranks
    )


def standstill(plan: Plan, ranks: Sequence[RankState], config: Config, now: float) -> str | None:
    """Where all stand, if nothing has moved for so long that the run is over."""
    if _is_paused(ranks):
        return None
    quiet = now - max(state.progressed for state in ranks)
    running = any(state.phase in ("prefill", "decode") for state in ranks)
    if quiet < (config.timeout if running else config.start_timeout):
        return None
    where = "\n".join(
        f"rank {rank}: {_position(plan, rank, state)}{' (its process is stopped)' if state.process == 'T' else ''}"
        for rank, state in enumerate(ranks)
    )
    limit = "timeout" if running else "start_timeout"
    told = f"no rank has made progress for {quiet:.0f} s ({limit}); where they stand:\n{where}"
    return f"{told}\n{advice(plan, ranks, config)}"


def _position(plan: Plan, rank: int, state: RankState) -> str:
    """The ops at which a rank stands in prefill; else what it was doing."""
    lanes = plan.lanes[rank]
    if state.phase == "prefill" and state.stand and len(state.stand.positions) == len(lanes):
        return rank_text(lanes, state.stand)
    return f"decode, token {state.decoded}" if state.phase == "decode" else state.phase
