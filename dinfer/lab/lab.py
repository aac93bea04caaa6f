"""The fault lab: runs cells on a cluster, with clean runs in between, and keeps the score.

A cell is one run, armed with a fault, which is watched until a verdict is given or the run is done.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

from dinfer.cluster.ipyparallel.attach import ClusterPlace
from dinfer.cluster.ipyparallel.errors import ClusterError
from dinfer.config import ConfigError
from dinfer.lab.cells import CHUNK_SIZE, SCHEDULES, STRATEGIES, TOKENS, N, graph_of
from dinfer.lab.faults import RULES, Cell, expected, orders, slowed
from dinfer.lab.hosts import LabNetwork, hosts, why_not
from dinfer.lab.score import Result, Score, result_line
from dinfer.messages import Behave, Misbehave
from dinfer.plan.graph import Graph
from dinfer.run.run import Run
from dinfer.session.connect import connect
from dinfer.session.session import Session
from dinfer.verdict.verdict import Verdict

CLEAN_EVERY = 5
"""cells between two clean runs"""

Say = Callable[[str], None]


def run_lab(
    cells: Sequence[Cell],
    score: Score,
    say: Say,
    *,
    slow_runs: int = 0,
    join: bool = False,
    links: str = "auto",
) -> None:
    """Run these cells, then `slow_runs` runs that are slow but not hung. Each result goes into `score` at once, so that
    it survives an interrupt.

    `join`: use the running cluster; `links`: where links are broken: in network "namespaces", in the "transport", or
    "auto": in namespaces if the machine allows. Raises ConfigError for options that cannot be met, ClusterError, and
    what a session raises if ranks do not come back.
    """
    if links not in (every := ("auto", "namespaces", "transport")):
        raise ConfigError(f"links is {links!r}; it must be one of {', '.join(every)}.")
    why = "the cluster was joined" if join else why_not() if links != "transport" else "as requested"
    if links == "namespaces" and why:
        raise ConfigError(f"links cannot be broken in network namespaces: {why}.")
    score.links = "transport" if why else "namespaces"
    say(f"links: in the transport ({why})" if why else "links: network namespaces")
    with nullcontext() if why else hosts(N) as network, lab_session(join=join, network=network) as session:
        say(session.ranks.describe())
        run_cells(session, cells, score, say, network)
        run_slowly(session, slow_runs, score, say)


@contextmanager
def lab_session(*, join: bool = False, network: LabNetwork | None = None) -> Iterator[Session]:
    """A session with the demo model. `network`: runs each engine of the new cluster on a host of its own."""
    place = ClusterPlace(network.address, [host.inside() for host in network.hosts]) if network else None
    session = connect("ipyparallel", N, start=not join, place=place)
    try:
        session.load("demo", threads=1)
        yield session
    finally:
        with suppress(ClusterError):
            session.close()


def run_cells(
    session: Session, cells: Sequence[Cell], score: Score, say: Say, network: LabNetwork | None = None
) -> None:
    """Run these cells in a session that has loaded the demo model. `network`: the network of its ranks; None breaks
    links in the transport."""
    began = time.monotonic()
    for number, cell in enumerate(cells):
        if number % CLEAN_EVERY == 0:
            _run_clean(session, number // CLEAN_EVERY, score, say)
        found = _run_cell(session, cell, network)
        score.results.append(found)
        mark = "ok   " if found.correct else "WRONG"
        minutes = (time.monotonic() - began) / 60
        recovered = f"recovered in {found.recovered_s:.1f} s; {minutes:.1f} min"
        say(f"{number + 1}/{len(cells)} {mark} {result_line(found)}; {recovered}")


def run_slowly(session: Session, count: int, score: Score, say: Say) -> None:
    """Run `count` runs whose layers are slow, each in another way; a verdict on one is a false alarm."""
    for number in range(count):
        _run_clean(session, number, score, say, slowed(score.seed + number, N))
        say(f"slow run {number + 1}/{count}; false alarms so far: {len(score.alarms)}")


# -- one trial

ANSWER_S = 10.0

VERDICT_S = 40.0
"""how long to wait for a verdict"""

POLL_S = 0.01

ASK_S = 0.25

IDS = tuple(range(5, 5 + TOKENS))


def _run_clean(
    session: Session, number: int, score: Score, say: Say, given: dict[int, list[Misbehave]] | None = None
) -> None:
    """One run without a fault, slowed as `given`; `number` selects the plan, each in turn."""
    strategy, schedule = STRATEGIES[number % 2], SCHEDULES[number // 2 % 2]
    run = _begin(session, strategy, schedule, given or orders(graph_of(strategy, schedule), None))
    run.resume()
    verdict, _ = _await_verdict(run)
    _clear(session, run)
    score.clean_runs += 1
    alarm = verdict.sentence if verdict else ""
    if not verdict and run.standing().state != "done":
        alarm = f"not done: {run.where()}"
    if alarm:
        score.alarms.append(alarm)
        say(f"FALSE ALARM in a clean run: {alarm}")


def _run_cell(session: Session, cell: Cell, network: LabNetwork | None) -> Result:
    """Run one cell and leave the ranks able to run the next."""
    rule, graph = RULES[cell.fault], graph_of(cell.strategy, cell.schedule)
    run = _begin(session, cell.strategy, cell.schedule, orders(graph, cell, network))
    resumed = time.monotonic()
    run.resume()
    try:
        verdict, at = _ask(run, graph) if rule.is_slow else _await_verdict(run)
    finally:
        if network:
            network.mend()
    states = session.ranks.ranks
    if rule.is_slow:
        since = resumed
    elif rule.kind == "dead":
        since = max((state.struck.at for state in states if state.struck), default=resumed)
    else:
        since = max(state.progressed for state in states)
    recovered = _clear(session, run)
    wanted = expected(graph, cell, in_network=network is not None)
    if verdict is None:
        return Result(cell, wanted, "", None, "", None, recovered)
    seconds = at - min(since, at)
    return Result(cell, wanted, verdict.kind, verdict.rank, verdict.sentence, seconds, recovered)


def _begin(session: Session, strategy: str, schedule: str, given: Mapping[int, Sequence[Misbehave]]) -> Run:
    """A paused run, of which each rank has been sent its orders."""
    parameters: dict[str, Any] = {"sync_strategy": strategy, "schedule": schedule, "chunk_size": CHUNK_SIZE}
    run = session.prefill(IDS, paused=True, max_new_tokens=1, **parameters)
    for rank, messages in given.items():
        session.ranks.ranks[rank].struck = None
        for message in messages:
            session.ranks.ask({rank: message}, ANSWER_S)
    return run


def _await_verdict(run: Run) -> tuple[Verdict | None, float]:
    """The verdict that the monitor gives, None once the run is done; and when that was, in monotonic seconds."""
    deadline = time.monotonic() + VERDICT_S
    while time.monotonic() < deadline:
        if run.hang or run.failure or run.silence:
            at = time.monotonic()
            return run.told or run.verdict(), at
        if run.standing().state == "done":
            break
        time.sleep(POLL_S)
    return None, time.monotonic()


def _ask(run: Run, graph: Graph) -> tuple[Verdict | None, float]:
    """The first verdict on request, once a third of the ops are done; one that the monitor gives takes precedence."""
    answer: tuple[Verdict | None, float] = None, time.monotonic()
    asked = 0.0
    while run.standing().state == "running" and not (run.hang or run.failure or run.silence):
        time.sleep(POLL_S)
        done = sum(sum(stand.positions) for stand in run.standing().stands)
        if done < len(graph.ops) / 3 or time.monotonic() - asked < ASK_S:
            continue
        asked, found = time.monotonic(), run.verdict()
        if found.kind not in ("moving", "done") and answer[0] is None:
            answer = found, time.monotonic()
    unasked = _await_verdict(run)
    return answer if unasked[0] is None else unasked


def _clear(session: Session, run: Run) -> float:
    """Stop all misbehaviour and recover lost ranks; returns the seconds that it took."""
    began = time.monotonic()
    if run.failure or run.silence or run.told or run.standing().state != "done":
        session.recover()
    ranks = session.ranks
    ranks.ask(dict.fromkeys(range(ranks.world_size), Behave()), ANSWER_S)
    return time.monotonic() - began
