"""Slow links and slow ranks on purpose: what takes longer, where that is seen, and what is refused."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import pytest

import dinfer
from dinfer.config import Config
from dinfer.plan.faults import SLOW
from dinfer.plan.ops import PlanError
from dinfer.plan.slowness import slow_fault
from dinfer.run.run import Run
from dinfer.session.session import Session
from dinfer.trace.events import Event
from dinfer.views.status import status
from tests.support.twin import prompt

MODEL = {"layers": 6}
IDS = tuple(prompt(22))
DEADLINE_S = 120.0
MS = 20.0


@pytest.fixture
def run(session: Session) -> Run:
    return session.prefill(IDS, chunk_size=8, max_new_tokens=4, paused=True)


def finish(run: Run) -> Run:
    run.resume()
    assert run.wait(DEADLINE_S).state == "done"
    return run


def wires(run: Run, source: int, target: int) -> list[float]:
    """The milliseconds on the wire of each message of a link."""
    return [
        (event.end - event.met) / 1e6
        for event in run.trace.prefill(target)
        if event.kind == "recv" and event.peer == source
    ]


def layers(run: Run, rank: int) -> list[float]:
    """The milliseconds of each layer op of a rank."""
    found: list[Event] = [event for event in run.trace.prefill(rank) if event.kind == "layer"]
    return [event.busy / 1e6 for event in found]


def test_each_message_of_a_slow_link_takes_longer_and_no_other(run: Run) -> None:
    run.inject("slow link", source=0, target=2, ms=MS)
    finish(run)
    assert min(wires(run, 0, 2)) >= MS
    for source, target in ((0, 1), (1, 2), (2, 0), (1, 0), (2, 1)):
        assert median(wires(run, source, target)) < MS / 2
    assert not run.edited
    assert not run.corrupt


def test_it_is_shown_wherever_the_run_is(session: Session, run: Run, tmp_path: Path) -> None:
    injected = run.inject("slow link", source=0, target=2, ms=MS)
    line = "#1 slow link 0→2, 20 ms more for each message"
    assert str(injected) == f"armed: {line}"
    assert run.last_call == 'run.inject("slow link", source=0, target=2, ms=20.0)'
    assert injected.fault.call == 'run.inject("slow link", source=0, target=2, ms=20)'
    finish(run)
    assert str(injected) == f"hit: {line}"
    assert len(injected.strikes) == 1
    for shown in (str(run.where()), str(run.faults), *status(run.plan, run.standing())["faults"]):
        assert line in shown
    assert f"hit: {line}" in run.findings().faults
    saved = dinfer.open(run.save(tmp_path / "saved"))
    assert line in str(saved)
    assert line in str(session.log) or any(line in said for said in run.story)
    with saved.replay(2) as replay:
        replay.resume()
        assert not replay.notes


@pytest.mark.parametrize(("given", "least"), [({"ms": MS}, MS), ({"factor": 50}, 0.0)])
def test_each_layer_of_a_slow_rank_takes_longer(run: Run, given: dict[str, Any], least: float) -> None:
    run.inject("slow rank", rank=1, **given)
    finish(run)
    assert min(layers(run, 1)) >= least
    assert median(layers(run, 1)) > 5 * max(median(layers(run, 0)), median(layers(run, 2)))


def test_clear_ends_it_and_undo_brings_it_back(run: Run) -> None:
    run.inject("slow link", source=0, target=2, ms=MS)
    finish(run)
    run.faults.clear()
    assert "stays changed" not in str(run.where())
    run.restart()
    finish(run)
    assert median(wires(run, 0, 2)) < MS / 2
    assert run.sha256() == finish(run).sha256()
    for _ in range(4):
        if "slow link" in run.undo():
            break
    assert [one.fault.kind for one in run.faults] == ["slow link"]


def test_the_same_bytes_come_of_it(session: Session, run: Run) -> None:
    run.inject("slow rank", rank=0, ms=1)
    run.inject("slow link", source=0, target=1, ms=1)
    run.step("layer", 2)
    run.step_back("layer")
    slow = finish(run).sha256()
    assert finish(session.prefill(IDS, chunk_size=8, max_new_tokens=4, paused=True)).sha256() == slow


def test_the_call_of_a_fault_arms_it_again(run: Run) -> None:
    injected = run.inject("slow rank", rank=2, factor=3)
    again = eval(injected.fault.call, {"run": run})  # what a report says to type
    assert again.fault.factor == 3
    assert len(run.faults) == 2


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        ("slow link", {"source": 0, "ms": 5}, "slow link needs a target: give target=0 to 2"),
        ("slow link", {"target": 0, "ms": 5}, "slow link needs a source"),
        ("slow link", {"source": 0, "target": 2}, "slow link needs ms: give a number"),
        (
            "slow link",
            {"source": 0, "target": 0, "ms": 5},
            "rank 0 sends nothing to rank 0 in this plan; it sends to ranks",
        ),
        ("slow link", {"source": 0, "target": 3, "ms": 5}, "target"),
        ("slow link", {"source": 0, "target": 2, "ms": 0}, "ms is 0; it must be more than 0"),
        ("slow link", {"source": 0, "target": 2, "ms": 1e6}, "10000 at most"),
        ("slow link", {"source": 0, "target": 2, "ms": float("nan")}, "ms is nan"),
        ("slow link", {"source": 0, "target": 2, "ms": 5, "layer": 1}, "slow link takes no layer"),
        ("slow rank", {"rank": 1}, r"slow rank needs ms=….*or factor=…, how many times as long\.$"),
        ("slow rank", {"rank": 1, "ms": 1, "factor": 2}, r"or factor=…, how many times as long, not both\."),
        ("slow rank", {"rank": 1, "ms": 1, "factor": 2}, "slow rank needs ms"),
        ("slow rank", {"rank": 1, "factor": 1}, "factor is 1; it must be more than 1"),
        ("slow rank", {"ms": 1}, "slow rank needs a rank"),
        ("slow rank", {"rank": 1, "ms": 1, "source": 0}, "slow rank takes no source"),
        ("slow lnk", {}, "Did you mean slow link"),
        ("bitflip", {"layer": 0, "chunk": 0, "ms": 3}, "bitflip takes no ms"),
    ],
)
def test_what_is_not_possible_is_refused(run: Run, kind: str, given: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        run.inject(kind, **given)
    assert not run.faults


def test_a_link_that_a_ring_does_not_use(session: Session) -> None:
    run = session.prefill(IDS, chunk_size=8, sync_strategy="ring", paused=True)
    unused = [
        (source, target)
        for source in range(3)
        for target in range(3)
        if source != target
        and all(op.peer != target for lane in run.plan.lanes[source] for op in lane.ops if op.kind == "send")
    ]
    for source, target in unused:
        with pytest.raises(PlanError, match=f"rank {source} sends nothing to rank {target} in this plan"):
            run.inject("slow link", source=source, target=target, ms=1)
    assert unused


def test_the_last_bytes_are_those_of_every_kind(run: Run) -> None:
    """Each kind of SLOW can be made of a plan."""
    given = {"slow link": {"source": 0, "target": 1, "ms": 2}, "slow rank": {"rank": 0, "ms": 2}}
    assert set(given) == set(SLOW)
    for kind, values in given.items():
        fault = slow_fault(1, kind, run.plan, **values)
        assert fault.as_dict() == type(fault)(**fault.as_dict()).as_dict()


def test_ranks_that_issue_to_streams_are_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Config, "uses_streams", property(lambda _: True))
    with pytest.raises(PlanError, match="issued to streams"):
        run.inject("slow link", source=0, target=2, ms=5)
