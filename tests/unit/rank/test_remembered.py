"""What a rank repeats to the session that comes next, and what becomes of reports that no session hears."""

from __future__ import annotations

from dinfer.cluster.threads import LocalRanks
from dinfer.engine.board import Stand
from dinfer.messages import (
    BlockCorrupt,
    BreakpointHit,
    EndPrompt,
    FaultStruck,
    FirstNonFinite,
    Lanes,
    RankReport,
)
from dinfer.rank.remembered import Remembered
from dinfer.run.run import Run
from dinfer.session.session import Session
from tests.support.twin import prompt

RANKS = 2
MODEL = {"layers": 3}


class NextSession:
    """Hears what a rank repeats."""

    def __init__(self) -> None:
        self.heard: list[RankReport] = []

    def report(self, report: RankReport) -> None:
        self.heard.append(report)

    def ask_stands(self, timeout: float) -> list[Stand | None]:  # noqa: ARG002 - as the interface has it
        return []


class Gone(NextSession):
    """A line that has been closed."""

    def report(self, report: RankReport) -> None:  # noqa: ARG002 - as the interface has it
        raise BrokenPipeError


def spoilt(session: Session) -> Run:
    """A run with a NaN that rank 0 has computed."""
    run = session.prefill(prompt(12), paused=True, chunk_size=4, max_new_tokens=3)
    run.inject("nan", where="compute", layer=0, chunk=0, token=1)
    run.step("layer")
    return run


def repeated(session: Session, rank: int = 0) -> list[RankReport]:
    assert isinstance(session.ranks, LocalRanks)
    host, there = session.ranks.hosts[rank], NextSession()
    before = host.session
    host.go_on(there)
    host.session = before
    return there.heard


def test_the_next_session_hears_of_a_nan(session: Session) -> None:
    spoilt(session)
    kinds = [type(report) for report in repeated(session)]
    assert kinds[0] is Lanes
    assert kinds.count(FirstNonFinite) == kinds.count(FaultStruck) == 1


def test_a_nan_that_has_been_undone_is_not_repeated(session: Session) -> None:
    run = spoilt(session)
    run.step_back("layer")
    assert not any(isinstance(report, FirstNonFinite) for report in repeated(session))
    run.step("layer")
    assert sum(isinstance(report, FirstNonFinite) for report in repeated(session)) == 1


def test_orders_of_a_session_are_not_repeated_to_the_next() -> None:
    remembered = Remembered()
    remembered.heard(Lanes(("compute", "decode"), ()))
    remembered.heard(BreakpointHit({"number": 1}, "layer c0 l0", "NaN", 1))
    remembered.heard(BlockCorrupt({}, 1))
    assert list(remembered.repeated())[1:] == [BlockCorrupt({}, None)]


def test_a_line_that_ends_meanwhile_fails_no_token(session: Session) -> None:
    """As while another session takes the engine: the line to the first is closed before that to the next is there."""
    run = session.prefill(prompt(12), paused=True, chunk_size=4, max_new_tokens=3)
    assert isinstance(session.ranks, LocalRanks)
    session.ranks.hosts[0].session = Gone()
    assert len(run.decode(2).tokens) == 2
    assert run.standing().state == "done"


def test_a_prompt_that_has_ended_is_nowhere_any_more(session: Session) -> None:
    spoilt(session)
    assert isinstance(session.ranks, LocalRanks)
    host = session.ranks.hosts[0]
    seen, host._on_change = [], lambda host: seen.append(host.engine)
    session.ranks.ask({0: EndPrompt()}, 30)
    assert seen == [None]
