"""A plan that can hang: refused with a drawing, repaired by hand, or run with unsafe."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from dinfer.config import Config
from dinfer.job import PlanRefused
from dinfer.plan.ops import PlanError
from dinfer.plan.partition import Shape
from dinfer.plan.schedule import build
from dinfer.plan.verify import Counterexample, verify
from dinfer.run.fleet import RankFailed
from dinfer.verdict.drawing import counterexample_svg, cycle_text
from tests.support.threads import session_on_threads
from tests.support.twin import prompt

IDS = prompt(10)


def swapped(config: Config, shape: Shape) -> list[dict[str, list[str]]]:
    """Lockstep, but for rank 0, which would have its first block's receipt before it sends."""
    built = build(shape, "lockstep", config.sync_strategy)
    lanes = [{lane.name: [str(op) for op in lane.ops] for lane in rank} for rank in built.lanes]
    ops = lanes[0]["main"]
    first = next(n for n, op in enumerate(ops) if op.startswith("send"))
    recv = next(n for n, op in enumerate(ops) if op.startswith("recv"))
    ops.insert(first, ops.pop(recv))
    return lanes


def lockstep(config: Config, shape: Shape) -> list[dict[str, list[str]]]:
    """A schedule of one's own that is good."""
    built = build(shape, "lockstep", config.sync_strategy)
    return [{lane.name: [str(op) for op in lane.ops] for lane in rank} for rank in built.lanes]


def test_a_schedule_of_ones_own_runs_once_it_cannot_hang(model: Path) -> None:
    with session_on_threads(3, model) as session:
        with pytest.raises(PlanRefused) as caught:
            session.prefill(IDS, chunk_size=4, plan=swapped, paused=True)
        refused = caught.value
        assert isinstance(refused, PlanError)
        assert "sends: rank 0 waits to receive" in str(refused)
        assert "\n┌▶ rank 0 waits to receive block" in str(refused)
        run = session.prefill(IDS, chunk_size=4, plan=lockstep, paused=True)
        assert run.plan.schedule == "lockstep"
        run.step("layer")
        run.resume()
        run.wait(60)
        mine = run.sha256()
        session.prefill(IDS, chunk_size=4, schedule="pipelined").wait(60)
        assert session.run.sha256() == mine


def test_unsafe_runs_it_all_the_same(model: Path) -> None:
    with session_on_threads(3, model) as session:
        run = session.prefill(IDS, chunk_size=4, plan=swapped, unsafe=True, paused=True)
        with pytest.raises(PlanError, match="refuted, so it has no cuts"):
            run.step()
        session.ranks.free()
        with pytest.raises((RankFailed, RuntimeError)):
            run.resume() or run.wait(60)


def refused(schedule: str = "batched") -> PlanRefused:
    plan = build(Shape(6, 8, 4, (0, 2, 4)), schedule, "pairwise")  # type: ignore[arg-type]
    found = verify(plan)
    assert isinstance(found, Counterexample)
    return PlanRefused(plan, found)


def test_the_drawing_has_a_box_for_each_op_and_an_arrow_for_what_it_waits_for() -> None:
    error = refused()
    count = len(error.counterexample.places)
    svg = ElementTree.fromstring(error._repr_svg_())
    name = "{http://www.w3.org/2000/svg}"
    assert len(list(svg.iter(f"{name}rect"))) == count == 3
    assert len([path for path in svg.iter(f"{name}path") if path.get("marker-end")]) == count
    texts = [element.text for element in svg.iter(f"{name}text")]
    assert "block c0 l0" in texts
    assert error.svg() in error._repr_html_()


def test_without_a_shell_it_is_shown_as_its_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("IPython.get_ipython", lambda: None)
    error = refused()
    assert error._render_traceback_() == [f"PlanRefused: {error}"]


def test_what_is_no_circle_has_no_drawing_in_the_terminal() -> None:
    plan = build(Shape(2, 4, 4, (0, 1)), "lockstep", "pairwise")
    found = Counterexample("size", ("wrong size",), ())
    assert (cycle_text(found), counterexample_svg(plan, found)) == ("", "")
    alone = Counterexample("cycle", ("rank 0 cannot start",), ())
    assert cycle_text(alone) == "↻ rank 0 cannot start"
