"""Which of several failures came first, and what the ranks did before all were killed."""

from collections.abc import Mapping
from dataclasses import replace

from dinfer.verdict.signs import Raised, Signs
from dinfer.watch.probe.records import WatchedProcess
from dinfer.watching.events import trace_of
from dinfer.watching.evidence import Evidence
from dinfer.watching.signs import last_sign

FAILED_TOGETHER_NS = 200_000_000
"""of two ranks that fail, one that does so later than this has lost the other, or the launcher has ended it"""

INTERRUPT = "KeyboardInterrupt"

UNSEEN_NS = 1_000_000_000
"""for so long a process may have lived after its heart was last seen to beat, and said nothing"""


def only_first_failures(
    signs: Mapping[int, Signs],
    ranks: Mapping[int, WatchedProcess],
    gone: Mapping[int, float],
    seen_ns: Mapping[int, int] | None = None,
) -> dict[int, Signs]:
    """The signs, in which only the first failure is one: ranks that fail later have lost the first, or its launcher has
    ended them. `gone`: when each was seen to have vanished; `seen_ns`: when it was last seen to live, nanoseconds since
    the epoch: on a busy machine a heart may beat late."""
    seen = seen_ns or {}
    times: dict[int, float] = {}
    for rank, its in signs.items():
        if rank not in ranks:
            continue  # nothing of it could be read
        error = ranks[rank].exception
        if its.raised and its.raised.handled:
            error = None
        if its.raised and not its.raised.secondary and error:
            times[rank] = error.at_ns
        elif its.ended:
            times[rank] = error.at_ns if error else max(_unseen_ns(ranks[rank]), seen.get(rank, 0))
    own = {
        rank: at
        for rank, at in times.items()
        if not (raised := signs[rank].raised) or raised.handled or not raised.secondary
    }
    first = min(own.values(), default=0.0)  # without any, some rank ended well, and the others lost it
    # Of ranks that said nothing, it was seen when they vanished; their last signs of life are less exact.
    silent = {
        rank for rank in own if rank in gone and (not (its := signs[rank]).raised or its.raised.handled)
    }
    early = min((at for rank, at in gone.items() if rank in times), default=0.0)
    found = {}
    for rank, its in signs.items():
        is_later = silent != own.keys() and rank in times and times[rank] > first + FAILED_TOGETHER_NS
        is_later = is_later or (rank in silent and gone[rank] > early)
        if is_later and rank in own and len(own) > 1:
            what = its.raised.message if its.raised else its.ended
            found[rank] = replace(
                its, ended="", raised=Raised(f"{what}, after another rank failed", secondary=True)
            )
        elif its.raised and its.raised.secondary and not its.raised.handled:
            found[rank] = replace(its, ended="")
        else:
            found[rank] = its
    return found


def _unseen_ns(process: WatchedProcess) -> int:
    """Until when it may have lived, by its record."""
    return last_sign(process) + UNSEEN_NS


def before_they_were_killed(found: Evidence) -> Evidence:
    """The evidence of when all ranks were killed, or interrupted by Ctrl-C, together, if they hung by then: somebody
    has ended the hang."""
    beats = [last_sign(process) for process in found.processes.values()]
    is_killed = all(
        _is_interrupted(one) or (one.ended is None and one.exception is None)
        for one in found.processes.values()
    )
    is_all = all(its.ended or (its.raised and not its.raised.handled) for its in found.signs.values())
    if not (beats and is_all and is_killed) or max(beats) - min(beats) > UNSEEN_NS:
        return found
    signs = {rank: replace(its, ended="", raised=None) for rank, its in found.signs.items()}
    ranks = {rank: _before_its_interrupt(process) for rank, process in found.processes.items()}
    trace = found.trace if ranks == found.processes else trace_of(ranks, found.trace.about["command"])
    earlier = Evidence(trace, signs, max(beats), ranks, job=found.job, key=found.key, notes=found.notes)
    return earlier if earlier.problem and not earlier.problem.kind.startswith("stuck") else found


def _is_interrupted(process: WatchedProcess) -> bool:
    return bool(process.exception and process.exception.type == INTERRUPT)


def _before_its_interrupt(process: WatchedProcess) -> WatchedProcess:
    """The process, with the ops open that only its interrupt has ended."""
    if not (process.exception and _is_interrupted(process)):
        return process
    at = process.exception.at_ns
    ops = (one._replace(done_ns=0, state="waiting") if one.done_ns >= at else one for one in process.ops)
    return replace(process, ops=type(process.ops)(ops), exception=None, ended=None)
