"""Where a rank stands comes with the time of its last op that computed, once that is known."""

from __future__ import annotations

from dinfer.engine.board import Stand
from dinfer.plan.partition import partition
from dinfer.plan.schedule import build
from dinfer.run.state import last_op_text
from dinfer.session.session import Session
from dinfer.trace.events import Event
from tests.support.runs import wait_for
from tests.support.twin import prompt

PLAN = build(partition(layers=4, tokens=8, world_size=2, chunk_size=4), "pipelined", "pairwise")
LANES = PLAN.lanes[0]
COMPUTE = next(n for n, lane in enumerate(LANES) if any(op.kind == "layer" for op in lane.ops))


def stand(position: int, *, started: bool = False) -> Stand:
    """The lane of layers has ended so many ops, and no other any."""
    positions = tuple(position if n == COMPUTE else 0 for n in range(len(LANES)))
    flags = tuple(started and n == COMPUTE for n in range(len(LANES)))
    return Stand(positions, flags, positions)


def ended(number: int, ms: float = 2.0, kind: str = "") -> Event:
    op = LANES[COMPUTE].ops[number]
    end = 1000 + round(ms * 1e6)
    return Event(
        0, LANES[COMPUTE].name, kind or op.kind, 0, 0, 1000, end, "", op.chunk, op.layer, index=number
    )


LAYERS = [number for number, op in enumerate(LANES[COMPUTE].ops) if op.kind == "layer"]


def test_the_last_op_that_computed_is_told_with_its_time() -> None:
    first, second = LAYERS[:2]
    events = [ended(first, 7.0), ended(second, 0.125)]
    assert last_op_text(LANES, stand(second + 1), events) == "`layer c0 l1` took 0.125 ms"
    # it has gone back by one
    assert last_op_text(LANES, stand(first + 1), events) == "`layer c0 l0` took 7 ms"


def test_nothing_is_told_of_what_is_not_known() -> None:
    first, second = LAYERS[:2]
    assert last_op_text(LANES, stand(0), []) == ""
    assert last_op_text(LANES, stand(second + 1), [ended(first)]) == ""  # its event has not come yet
    assert last_op_text(LANES, stand(second + 1, started=True), [ended(second)]) == ""  # it moves
    decoded = Event(0, "decode", "decode", 0, 0, 0, 5)
    assert last_op_text(LANES, stand(first + 1), [ended(first, 3.0), decoded]) == "`layer c0 l0` took 3 ms"


def test_a_step_by_hand_shows_what_it_cost(session: Session) -> None:
    run = session.prefill(prompt(8), paused=True, chunk_size=4, max_new_tokens=1)
    run.step("layer")
    wait_for(lambda: "` took " in str(run.where()), "the event of the op")
    line = next(line for line in str(run.where()).splitlines() if "took" in line)
    assert "`layer c0 l0` took " in line
    assert line.endswith(" ms")
