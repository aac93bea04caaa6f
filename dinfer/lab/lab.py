"""The fault lab: runs cells on a cluster, with clean runs in between, and keeps the score.

A cell is one run, armed with a fault, which is watched until a verdict is given or the run is done.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, NamedTuple

from dinfer.cluster.ipyparallel.errors import ClusterError
from dinfer.cluster.ipyparallel.start import HERE, ClusterPlace
from dinfer.cluster.ranks import Ranks
from dinfer.config import ConfigError
from dinfer.lab.cells import CHUNK_SIZE, SCHEDULES, STRATEGIES, TOKENS, N, graph_of
from dinfer.lab.expected import RULES, Cell, expected
from dinfer.lab.hosts import LabNetwork, hosts, why_not
from dinfer.lab.orders import orders, slowed
from dinfer.lab.score import Result, Score, result_line
from dinfer.messages import Message
from dinfer.plan.graph import Graph
from dinfer.plan.plan import Plan
from dinfer.run.run import Run
from dinfer.session.connect import connect
from dinfer.session.session import Session

CLEAN_EVERY = 5
"""cells between two clean runs"""

LINKS = ("auto", "namespaces", "transport")
"""where links are broken; auto: in network namespaces if the machine allows"""

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

    `join`: use the running cluster; `links`: one of LINKS. Raises ConfigError for options that cannot be met,
    ClusterError, and what a session raises if ranks do not come back.
    """
    with _network(links, join, score, say) as network, lab_session(join=join, network=network) as session:
        say(session.ranks.describe())
        run_cells(session, cells, score, say, network)
        run_slowly(session, slow_runs, score, say)


def run_cells(
    session: Session, cells: Sequence[Cell], score: Score, say: Say, network: LabNetwork | None = None
) -> None:
    """Run these cells in a session that has loaded the demo model. `network`: the network of its ranks; None breaks
    links in the transport."""
    began = time.monotonic()
    for number, cell in enumerate(cells):
        if number % CLEAN_EVERY == 0:
            _clean(session, number // CLEAN_EVERY, score, say)
        found = try_cell(session, cell, network)
        score.results.append(found)
        mark = "ok   " if found.correct else "WRONG"
        minutes = (time.monotonic() - began) / 60
        recovered = f"recovered in {found.recovered_s:.1f} s; {minutes:.1f} min"
        say(f"{number + 1}/{len(cells)} {mark} {result_line(found)}; {recovered}")


def run_slowly(session: Session, count: int, score: Score, say: Say) -> None:
    """Run `count` runs whose layers are slow, each in another way; a verdict on one is a false alarm."""
    for number in range(count):
        _clean(session, number, score, say, slowed(score.seed + number, N))
        say(f"slow run {number + 1}/{count}; false alarms so far: {len(score.alarms)}")


def _clean(
    session: Session, number: int, score: Score, say: Say, given: dict[int, list[Message]] | None = None
) -> None:
    """One run without a fault; `number` selects the plan, each in turn."""
    strategy, schedule = STRATEGIES[number % 2], SCHEDULES[number // 2 % 2]
    alarm = try_clean(session, strategy, schedule, given or orders(graph_of(strategy, schedule), None))
    score.clean_runs += 1
    if alarm:
        score.alarms.append(alarm)
        say(f"FALSE ALARM in a clean run: {alarm}")


@contextmanager
def _network(links: str, join: bool, score: Score, say: Say) -> Iterator[LabNetwork | None]:
    """Hosts for the engines of the lab's own cluster, with breakable wires; None: links break in the transport."""
    if links not in LINKS:
        raise ConfigError(f"links is {links!r}; it must be one of {', '.join(LINKS)}.")
    why = "the cluster was joined" if join else why_not() if links != "transport" else "as requested"
    if links == "namespaces" and why:
        raise ConfigError(f"links cannot be broken in network namespaces: {why}.")
    score.links = "transport" if why else "namespaces"
    say(f"links: in the transport ({why})" if why else "links: network namespaces")
    with nullcontext() if why else hosts(N) as network:
        yield network


@contextmanager
def lab_session(*, join: bool = False, network: LabNetwork | None = None) -> Iterator[Session]:
    """A session with the demo model. `network`: runs each engine of the new cluster on a host of its own."""
    place = ClusterPlace(network.address, [host.inside() for host in network.hosts]) if network else HERE
    session = connect("ipyparallel", N, start=not join, place=place)
    try:
        session.load("demo", threads=1)
        yield session
    finally:
        with suppress(ClusterError):
            session.close()


# -- one trial

ANSWER_S = 10.0

VERDICT_S = 40.0
"""how long to wait for a verdict"""

POLL_S = 0.01

ASK_S = 0.25

IDS = tuple(range(5, 5 + TOKENS))


class LabVerdict(NamedTuple):
    """The verdict on a run, and when it came (monotonic seconds); `kind` "" for none, with the end of the wait."""

    kind: str
    rank: int | None
    sentence: str
    at: float


def try_cell(session: Session, cell: Cell, network: LabNetwork | None = None) -> Result:
    """Run one cell and leave the ranks able to run the next. `network`: where links are broken, and mended
    afterwards."""
    graph = graph_of(cell.strategy, cell.schedule)
    run = begin(session, cell.strategy, cell.schedule)
    arm(session.ranks, orders(graph, cell, network))
    resumed = time.monotonic()
    run.resume()
    try:
        verdict = ask(run, graph) if RULES[cell.fault].is_slow else wait_for_verdict(run)
    finally:
        if network:
            network.mend()
    since = _since(session.ranks, cell, resumed, verdict.at)
    seconds = verdict.at - since if verdict.kind else None
    recovered = clear(session, run)
    wanted = expected(graph, cell, in_network=network is not None)
    return Result(cell, wanted, verdict.kind, verdict.rank, verdict.sentence, seconds, recovered)


def try_clean(session: Session, strategy: str, schedule: str, given: Mapping[int, Sequence[Message]]) -> str:
    """Run to the end, slowed as `given`; returns the verdict, which is a false alarm, or "" for none."""
    run = begin(session, strategy, schedule)
    arm(session.ranks, given)
    run.resume()
    verdict = wait_for_verdict(run)
    clear(session, run)
    if verdict.kind:
        return verdict.sentence
    return "" if run.standing().state == "done" else f"not done: {run.where()}"


def begin(session: Session, strategy: str, schedule: str) -> Run:
    parameters: dict[str, Any] = {"sync_strategy": strategy, "schedule": schedule, "chunk_size": CHUNK_SIZE}
    return session.prefill(IDS, paused=True, max_new_tokens=1, **parameters)


def arm(ranks: Ranks, given: Mapping[int, Sequence[Message]]) -> None:
    """Send each rank its orders."""
    for rank, messages in given.items():
        ranks.ranks[rank].reports.pop("struck", None)
        for message in messages:
            ranks.ask({rank: message}, ANSWER_S)


def wait_for_verdict(run: Run) -> LabVerdict:
    """The verdict that the monitor gives, or none once the run is done."""
    deadline = time.monotonic() + VERDICT_S
    while time.monotonic() < deadline:
        if run.hang or run.failure or run.silence:
            at, found = time.monotonic(), run.told or run.verdict()
            return LabVerdict(found.kind, found.rank, found.sentence, at)
        if run.standing().state == "done":
            break
        time.sleep(POLL_S)
    return LabVerdict("", None, "", time.monotonic())


def ask(run: Run, graph: Graph) -> LabVerdict:
    """The first verdict on request, once a third of the ops are done; one that the monitor gives takes precedence."""
    answer, asked = LabVerdict("", None, "", time.monotonic()), 0.0
    while run.standing().state == "running" and not (run.hang or run.failure or run.silence):
        time.sleep(POLL_S)
        if _share_done(run, graph.plan) < 1 / 3 or time.monotonic() - asked < ASK_S:
            continue
        asked, found = time.monotonic(), run.verdict()
        if found.kind not in ("moving", "done") and not answer.kind:
            answer = LabVerdict(found.kind, found.rank, found.sentence, time.monotonic())
    unasked = wait_for_verdict(run)
    return unasked if unasked.kind else answer


def clear(session: Session, run: Run) -> float:
    """Stop all misbehaviour and recover lost ranks; returns the seconds that it took."""
    began = time.monotonic()
    if run.failure or run.silence or run.told or run.standing().state != "done":
        session.recover()
    ranks = session.ranks
    ranks.ask({rank: {"do": "behave"} for rank in range(ranks.world_size)}, ANSWER_S)
    return time.monotonic() - began


def _share_done(run: Run, plan: Plan) -> float:
    stands = run.standing().stands
    total = sum(len(lane.ops) for lanes in plan.lanes for lane in lanes)
    return sum(sum(stand.positions) for stand in stands) / total


def _since(ranks: Ranks, cell: Cell, resumed: float, verdict_at: float) -> float:
    """When the ranks stopped moving; for a death and a slow rank or link, when the fault struck."""
    struck = [state.reports["struck"]["at"] for state in ranks.ranks if "struck" in state.reports]
    if RULES[cell.fault].is_slow:
        return resumed
    progressed = [state.progressed for state in ranks.ranks]
    if RULES[cell.fault].kind == "dead":
        return min(max(struck, default=resumed), verdict_at)
    return min(max(progressed), verdict_at)
