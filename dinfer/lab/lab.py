"""The lab: starts a cluster, or joins one, runs cells with clean runs mixed in, and keeps the score."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress

from dinfer.cluster.ipyparallel.errors import ClusterError
from dinfer.cluster.ipyparallel.start import HERE, ClusterPlace
from dinfer.config import ConfigError
from dinfer.lab.cells import SCHEDULES, STRATEGIES, N, graph_of
from dinfer.lab.expected import Cell
from dinfer.lab.hosts import LabNetwork, hosts, why_not
from dinfer.lab.orders import orders, slowed
from dinfer.lab.score import Score, told
from dinfer.lab.trial import try_cell, try_clean
from dinfer.messages import Misbehave
from dinfer.session.connect import connect
from dinfer.session.session import Session

CLEAN_EVERY = 5
"""cells between two runs in which nothing is wrong"""

LINKS = ("auto", "namespaces", "transport")
"""what links are broken in; auto: network namespaces where the machine allows"""

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
    """Run these cells and note each in `score` as soon as it is known, so that it can be kept whatever ends this; then
    so many runs that are slow, and move.

    `join`: use the cluster that runs; `links`: one of LINKS. Raises ConfigError for what cannot be had, ClusterError,
    and what a session raises where ranks do not come back.
    """
    with _network(links, join, score, say) as network, lab_session(join=join, network=network) as session:
        say(session.ranks.describe())
        run_cells(session, cells, score, say, network)
        run_slowly(session, slow_runs, score, say)


def run_cells(
    session: Session, cells: Sequence[Cell], score: Score, say: Say, network: LabNetwork | None = None
) -> None:
    """The same in a session that holds the demo model; `network` is that of its ranks, None to break links in the
    transport."""
    began = time.monotonic()
    for number, cell in enumerate(cells):
        if number % CLEAN_EVERY == 0:
            _clean(session, number // CLEAN_EVERY, score, say)
        found = try_cell(session, cell, network)
        score.results.append(found)
        mark = "ok   " if found.correct else "WRONG"
        minutes = (time.monotonic() - began) / 60
        say(
            f"{number + 1}/{len(cells)} {mark} {told(found)}; recovered in {found.recovered_s:.1f} s; {minutes:.1f} min"
        )


def run_slowly(session: Session, count: int, score: Score, say: Say) -> None:
    """So many runs whose layers are slow, each otherwise; each counts as one in which nothing is wrong."""
    for number in range(count):
        _clean(session, number, score, say, slowed(score.seed + number, N))
        say(f"slow run {number + 1}/{count}; false alarms so far: {len(score.alarms)}")


def _clean(
    session: Session, number: int, score: Score, say: Say, given: dict[int, list[Misbehave]] | None = None
) -> None:
    """Every plan in turn."""
    strategy, schedule = STRATEGIES[number % 2], SCHEDULES[number // 2 % 2]
    alarm = try_clean(session, strategy, schedule, given or orders(graph_of(strategy, schedule), None))
    score.clean_runs += 1
    if alarm:
        score.alarms.append(alarm)
        say(f"FALSE ALARM of a clean run: {alarm}")


@contextmanager
def _network(links: str, join: bool, score: Score, say: Say) -> Iterator[LabNetwork | None]:
    """Hosts for the engines of the lab's own cluster, with wires that break; None: links break in the transport."""
    if links not in LINKS:
        raise ConfigError(f"links is {links!r}; it must be one of {', '.join(LINKS)}.")
    why = "the cluster was joined" if join else why_not() if links != "transport" else "as asked"
    if links == "namespaces" and why:
        raise ConfigError(f"links cannot be broken in network namespaces: {why}.")
    score.links = "transport" if why else "namespaces"
    say(f"links: in the transport ({why})" if why else "links: network namespaces")
    with nullcontext() if why else hosts(N) as network:
        yield network


@contextmanager
def lab_session(*, join: bool = False, network: LabNetwork | None = None) -> Iterator[Session]:
    """`network`: where the engines of the cluster that is started are to be, each on a host of its own."""
    place = ClusterPlace(network.address, [host.inside() for host in network.hosts]) if network else HERE
    session = connect("ipyparallel", N, start=not join, place=place)
    try:
        session.load("demo", threads=1)
        yield session
    finally:
        with suppress(ClusterError):
            session.close()
