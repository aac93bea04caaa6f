"""Why a run cannot go on, and which rank is the cause, in one message. Pure: states in, text out.

A rank that raised an error is named before one that died, and both before ranks that only lost their peer.
"""

import signal
from collections.abc import Sequence
from typing import Literal, NamedTuple

from dinfer.cluster.ranks import LOST, RankState, taken_over
from dinfer.config import Config
from dinfer.display import few
from dinfer.errors import DinferError
from dinfer.messages import Failed
from dinfer.model.mapped import WeightsChanged
from dinfer.plan.ops import Op
from dinfer.plan.plan import Plan
from dinfer.verdict.verdict import Verdict
from dinfer.verdict.where import rank_spans_text, stood_text


class RankFailed(DinferError, RuntimeError):
    """A rank raised or died. The message names rank, op, layer, chunk and the original error."""


MEASURE_S = 600.0
"""seconds that ranks may take to measure layers and links"""

SILENT = 257
"""Stands for the exit status of a rank whose watcher has been silent for `silence_limit` seconds."""


Breakage = Literal["failed", "lost", "taken over"]
"""a rank has raised; a rank is gone; another session has joined the engines"""


class Broken(NamedTuple):
    """Why a run cannot go on: of what kind that is, and the message. `is_outdated`: the weights that ranks compute with
    were overwritten, so that no run can go on before they are loaded again."""

    kind: Breakage
    why: str
    is_outdated: bool = False


def silence_limit(timeout: float) -> float:
    """Seconds without news of a watcher, which reports ten times a second, after which its rank counts as lost; less
    than the run's `timeout`."""
    return min(10.0, max(timeout / 2, 3.0))


# -- errors and dead ranks


def broken(
    plan: Plan, ranks: Sequence[RankState], exits: Sequence[int | None], config: Config
) -> Broken | None:
    """What errors and dead ranks mean for the run; None if there are none. `exits[rank]` is set for ranks that ended
    without a result."""
    if taken := taken_over(ranks):
        return Broken("taken over", taken)
    errors = [(rank, state.error) for rank, state in enumerate(ranks) if state.error]
    primary = [(rank, error) for rank, error in errors if not error.secondary]
    dead = [rank for rank, code in enumerate(exits) if code is not None and not ranks[rank].error]
    is_outdated = any(error.error == WeightsChanged.__name__ for _, error in primary)
    if len(primary) > 1 and len({error.message for _, error in primary}) == 1:
        # All ranks have found it together: it is not about one.
        return Broken("failed", primary[0][1].message, is_outdated)
    if primary or (errors and not dead):
        return Broken("failed", _told(*(primary or errors)[0], config), is_outdated)
    if not dead:
        return None
    if len(dead) > 1 and all(exits[rank] == SILENT for rank in dead) and len(dead) == len(ranks) - 1:
        stood = [f"rank {rank}: {_position(plan, rank, state)}" for rank, state in enumerate(ranks)]
        where = "\n".join(few(stood))
        return Broken(
            "lost",
            f"nothing was heard of any other rank for {silence_limit(config.timeout):g} s: "
            f"rank 0's host may be cut off; where they stood:\n{where}",
        )
    told = [_death(plan, rank, ranks[rank], exits[rank], config) for rank in dead]
    return Broken("lost", told[0] if config.log_dir else "\n".join(few(told)))


def is_final(ranks: Sequence[RankState], exits: Sequence[int | None]) -> bool:
    """Whether nothing more will be heard of a failure: its cause is known, and dead ranks have reported their last
    position. Errors of ranks that lost their peer often arrive before; and where a rank has received a wrong message,
    it shows who is to blame where its sender comes to a stand."""
    dead = [rank for rank, code in enumerate(exits) if code is not None]
    errors = [state.error for state in ranks if state.error]
    is_known = bool(dead) or any(not error.secondary for error in errors)
    return is_known and all(ranks[rank].gone for rank in dead) and not any(error.came for error in errors)


def silent_text(plan: Plan, rank: int, state: RankState) -> str:
    """The message about a rank that does not answer, though its process seems to exist."""
    why = "its process is stopped" if state.stopped else "its host or the network to it may be down"
    return (
        f"rank {rank} does not answer: {why}; it stands at: {_position(plan, rank, state)}\n"
        "Nothing is lost if it comes back (kill -CONT); session.recover() ends it and starts it again."
    )


def ending(code: int | None, config: Config) -> str:
    """How a process has ended, by its exit status; a phrase that follows `rank N`."""
    if code == SILENT:
        limit = silence_limit(config.timeout)
        return f"has not been heard of for {limit:g} s: its host or the network to it may be down"
    if code == LOST:
        return "is gone: its process ended without a word"
    if code == -signal.SIGBUS:
        return "was killed by SIGBUS, as happens where a file of weights is shortened while a rank uses it"
    if code and code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit status {code}"


def _told(rank: int, error: Failed, config: Config) -> str:
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
    if code != -signal.SIGKILL:
        return printed
    return (
        f"{printed}\nIf nobody killed it, the kernel did, because memory ran out (see dmesg): lower chunk_size or the "
        "length, take dtype bfloat16, or fewer ranks on this machine."
    )


# -- a standstill


def standstill(
    plan: Plan, ranks: Sequence[RankState], config: Config, now: float, verdict: Verdict | None = None
) -> str | None:
    """The message about a run in which nothing has moved for `timeout` seconds; None if it is not so. `verdict`: why
    it does not move, if that is known."""
    if all(
        state.phase == "prefill" and state.stand and state.stand.at_limits and not any(state.stand.started)
        for state in ranks
    ):
        return None  # every lane stands at its limit: the user takes their time
    quiet = now - max(state.progressed for state in ranks)
    running = any(state.phase in ("prefill", "decode") for state in ranks)
    if quiet < (config.timeout if running else _patience(ranks, config)):
        return None
    stand = [
        f"rank {rank}: {_position(plan, rank, state)}{' (its process is stopped)' * (state.process == 'T')}"
        for rank, state in enumerate(ranks)
    ]
    where = "\n".join(few(stand))
    limit = "timeout" if running else "start_timeout"
    told = f"no rank has made progress for {quiet:.0f} s ({limit}); where they stand:\n{where}"
    return f"{told}\n{advice_on(verdict, config) if verdict else advice(plan, ranks, config)}"


def _patience(ranks: Sequence[RankState], config: Config) -> float:
    """Seconds that a rank may take before its first op. One that measures layers and links says nothing meanwhile."""
    measures = any(state.phase == "measuring" for state in ranks)
    return max(config.start_timeout, MEASURE_S) if measures else config.start_timeout


def advice_on(verdict: Verdict, config: Config) -> str:
    """A verdict, and what to do about it."""
    match verdict.kind:
        case "computing" | "slow rank" | "slow link":
            what = f"If that is only slow, raise timeout ({config.timeout:g}) or lower chunk_size."
        case "stuck in Python" | "stuck in C" | "stuck":
            what = "A debugger shows more (DINFER_DEBUGPY=1); a longer timeout will not help."
        case "stopped":
            what = "Let it go on (kill -CONT, or the debugger's continue) and run again."
        case "stalled link" | "lost peer":
            what = "Check the links with dinfer doctor; a longer timeout will not help."
        case _:
            what = "Prove the plan with dinfer verify; a longer timeout will not help."
    return f"{verdict.sentence.rstrip('.')}. {what}"


def advice(plan: Plan, ranks: Sequence[RankState], config: Config) -> str:
    """What to look at first: a stopped rank, one that has not loaded, one that computes, else the network."""
    if stopped := [rank for rank, state in enumerate(ranks) if state.process in ("T", "t")]:
        return (
            f"{_ranks_are(stopped)} stopped by a signal or a debugger: let it go on (kill -CONT, or the debugger's "
            "continue) and run again."
        )
    if measuring := [n for n, state in enumerate(ranks) if state.phase == "measuring"]:
        return (
            f"{_ranks_are(measuring)} still measuring layers and links: give values in place of auto, or raise "
            f"start_timeout ({config.start_timeout:g})."
        )
    if loading := [n for n, state in enumerate(ranks) if state.phase not in ("prefill", "decode", "done")]:
        return (
            f"{_ranks_are(loading)} still starting or loading: raise start_timeout ({config.start_timeout:g}) if the "
            f"checkpoint is large or its disk slow; else see {config.log_dir}/rank{loading[0]}.log."
        )
    started = [_started(plan, rank, state) for rank, state in enumerate(ranks)]
    busy = [
        rank
        for rank, state in enumerate(ranks)
        if (
            state.process == "R"
            if state.phase == "decode"
            else any(not op.is_transfer for op in started[rank])
        )
    ]
    if len(busy) == len(ranks):
        return f"All ranks are computing: if that is only slow, raise timeout ({config.timeout:g}) or lower chunk_size."
    if busy:
        return (
            f"{_ranks_are(busy)} computing, and the others wait for what comes of it: if that is only slow, raise "
            f"timeout ({config.timeout:g}) or lower chunk_size; if it hangs, a debugger shows where (DINFER_DEBUGPY=1)."
        )
    waits = [
        f"rank {rank} for rank {ops[0].peer}"
        for rank, ops in enumerate(started)
        if ops and ops[0].is_transfer
    ]
    who = f" ({', '.join(few(waits))})" if waits else ""
    return (
        f"Every rank waits for a peer{who}: prove the plan with dinfer verify, and the links with dinfer doctor; "
        "a longer timeout will not help."
    )


def _started(plan: Plan, rank: int, state: RankState) -> list[Op]:
    """The ops that a rank has started and not finished."""
    lanes, stand = plan.lanes[rank], state.stand
    if state.phase != "prefill" or stand is None or len(stand.positions) != len(lanes):
        return []
    places = zip(lanes, stand.positions, stand.started, strict=True)
    return [lane.ops[position] for lane, position, started in places if started and position < len(lane.ops)]


def _ranks_are(ranks: Sequence[int]) -> str:
    return f"{rank_spans_text(ranks).capitalize()} {'are' if len(ranks) > 1 else 'is'}"


def _position(plan: Plan, rank: int, state: RankState) -> str:
    """The op at which a rank stands in prefill; else its phase."""
    lanes = plan.lanes[rank]
    if state.phase == "prefill" and state.stand and len(state.stand.positions) == len(lanes):
        return stood_text(lanes, state.stand)
    return f"decode, token {state.decoded}" if state.phase == "decode" else state.phase
