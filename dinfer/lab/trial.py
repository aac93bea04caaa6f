"""One trial: a run, armed with a fault or with none, watched until something is said of it or it is done."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dinfer.cluster.ranks import Ranks
from dinfer.lab.cells import CHUNK_SIZE, TOKENS, graph_of
from dinfer.lab.expected import RULES, Cell, expected
from dinfer.lab.hosts import LabNetwork
from dinfer.lab.orders import orders
from dinfer.lab.score import Result
from dinfer.messages import Behave, Misbehave
from dinfer.plan.graph import Graph
from dinfer.plan.plan import Plan
from dinfer.run.run import Run
from dinfer.session.session import Session

ANSWER_S = 10.0

TOLD_S = 40.0
"""What has not been told by then is told by nobody."""

POLL_S = 0.01

ASK_S = 0.25

IDS = tuple(range(5, 5 + TOKENS))


class Told(NamedTuple):
    """What was said of a run, and when (monotonic seconds); `kind` "" and the time of giving up: nothing was."""

    kind: str
    rank: int | None
    sentence: str
    at: float


def try_cell(session: Session, cell: Cell, network: LabNetwork | None = None) -> Result:
    """Run one cell, leave the ranks able to run the next. `network`: what links are broken in, and then whole again."""
    graph = graph_of(cell.strategy, cell.schedule)
    run = begin(session, cell.strategy, cell.schedule)
    arm(session.ranks, orders(graph, cell, network))
    resumed = time.monotonic()
    run.resume()
    try:
        told = ask(run, graph) if RULES[cell.fault].is_slow else hear(run)
    finally:
        if network:
            network.mend()
    seconds = told.at - _since(session.ranks, cell, resumed, told.at) if told.kind else None
    recovered = clear(session, run)
    wanted = expected(graph, cell, in_network=network is not None)
    return Result(cell, wanted, told.kind, told.rank, told.sentence, seconds, recovered)


def try_clean(
    session: Session, strategy: str, schedule: str, given: Mapping[int, Sequence[Misbehave]]
) -> str:
    """A run that is to end by itself, slowed as `given`; what was said of it all the same, "" for nothing."""
    run = begin(session, strategy, schedule)
    arm(session.ranks, given)
    run.resume()
    told = hear(run)
    clear(session, run)
    return (
        told.sentence if told.kind else "" if run.standing().state == "done" else f"not done: {run.where()}"
    )


def begin(session: Session, strategy: str, schedule: str) -> Run:
    parameters: dict[str, Any] = {"sync_strategy": strategy, "schedule": schedule, "chunk_size": CHUNK_SIZE}
    return session.prefill(IDS, paused=True, max_new_tokens=1, **parameters)


def arm(ranks: Ranks, given: Mapping[int, Sequence[Misbehave]]) -> None:
    """Tell ranks what to do wrong, each its orders in their order."""
    for rank, messages in given.items():
        ranks.ranks[rank].struck = None
        for message in messages:
            ranks.ask({rank: message}, ANSWER_S)


def hear(run: Run) -> Told:
    """What is said unasked, once it is, or nothing once the run is done."""
    deadline = time.monotonic() + TOLD_S
    while time.monotonic() < deadline:
        if run.hang or run.failure or run.silence:
            at, found = time.monotonic(), run.told or run.verdict()
            return Told(found.kind, found.rank, found.sentence, at)
        if run.standing().state == "done":
            break
        time.sleep(POLL_S)
    return Told("", None, "", time.monotonic())


def ask(run: Run, graph: Graph) -> Told:
    """What is said when asked, from when a third of the ops are done; what is said unasked comes before that."""
    told, asked = Told("", None, "", time.monotonic()), 0.0
    while run.standing().state == "running" and not (run.hang or run.failure or run.silence):
        time.sleep(POLL_S)
        if _share_done(run, graph.plan) < 1 / 3 or time.monotonic() - asked < ASK_S:
            continue
        asked, found = time.monotonic(), run.verdict()
        if found.kind not in ("moving", "done"):
            told = told if told.kind else Told(found.kind, found.rank, found.sentence, time.monotonic())
    unasked = hear(run)
    return unasked if unasked.kind else told


def clear(session: Session, run: Run) -> float:
    """Have no rank misbehave any more, and bring back what was lost; in how many seconds."""
    began = time.monotonic()
    if run.failure or run.silence or run.told or run.standing().state != "done":
        session.recover()
    ranks = session.ranks
    ranks.ask(dict.fromkeys(range(ranks.world_size), Behave()), ANSWER_S)
    return time.monotonic() - began


def _share_done(run: Run, plan: Plan) -> float:
    stands = run.standing().stands
    total = sum(len(lane.ops) for lanes in plan.lanes for lane in lanes)
    return sum(sum(stand.positions) for stand in stands) / total


def _since(ranks: Ranks, cell: Cell, resumed: float, told_at: float) -> float:
    """When nothing moved any more, or, where that is not the question, when the fault struck."""
    struck = [state.struck.at for state in ranks.ranks if state.struck]
    if RULES[cell.fault].is_slow:
        return resumed
    progressed = [state.progressed for state in ranks.ranks]
    if RULES[cell.fault].kind == "dead":
        return min(max(struck, default=resumed), told_at)
    return min(max(progressed), told_at)
