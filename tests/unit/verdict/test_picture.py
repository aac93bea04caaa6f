"""The picture of who waits for whom: well-formed, complete, and safe to put on a page."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

from dinfer.trace.read import read_jsonl
from dinfer.verdict.drawing import Arrow, Box, drawing
from dinfer.verdict.judge import explain
from dinfer.verdict.recorded import explain_events
from dinfer.verdict.signs import Raised
from tests.support.stuck_states import FaultyGame, changed, pipelined, signs_of

NAME = "{http://www.w3.org/2000/svg}"
RECORDED = Path(__file__).parent / "recorded"
EVIL = """<script>alert("1")</script> & ']]>"""


def test_whatever_is_in_it_is_escaped() -> None:
    boxes = [Box(0, EVIL, EVIL), Box(1, "rank 1", EVIL, True)]
    svg = drawing(EVIL, boxes, [Arrow(0, 1, EVIL), Arrow(1, 0, EVIL)])
    assert "<script" not in svg
    texts = [element.text for element in ElementTree.fromstring(svg).iter(f"{NAME}title")]
    assert EVIL in texts


def test_a_verdict_draws_each_rank_and_whom_it_waits_for() -> None:
    plan = pipelined()
    game = FaultyGame(plan, seed=0)
    game.play(30)
    game.dead = 1
    game.play()
    verdict = explain(plan, changed(signs_of(game), 1, raised=Raised(f"RuntimeError: {EVIL}")))
    page = verdict._repr_html_()
    assert "<script" not in page
    svg = ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    assert len(list(svg.iter(f"{NAME}rect"))) == 3
    told = [element.text or "" for element in svg.iter(f"{NAME}title")]
    assert any(re.match(r"rank 1: ", text) for text in told)
    assert any("hidden c" in text for text in told)
    assert len([path for path in svg.iter(f"{NAME}path") if path.get("marker-end")]) >= 2


def test_ranks_that_meet_in_other_collectives_are_all_drawn_with_their_whole_ops() -> None:
    verdict = explain_events(read_jsonl(RECORDED / "different-collectives.jsonl").events)
    assert verdict.ranks == (2,)
    svg = ElementTree.fromstring(verdict.svg())
    shown = [element.text or "" for element in svg.iter(f"{NAME}text")]
    boxes = {"rank 0", "rank 1", "rank 2", "all_reduce", "all_gather"}
    assert boxes <= set(shown)
    assert not any("…" in text for text in shown)
    arrows = [path for path in svg.iter(f"{NAME}path") if path.get("marker-end")]
    assert len(arrows) == verdict.svg().count("all_reduce</title>") == len(verdict.blocked)


def test_two_that_wait_for_one_another_have_texts_apart() -> None:
    boxes = [Box(n, f"rank {n}", "send") for n in range(2)]
    svg = ElementTree.fromstring(
        drawing("", boxes, [Arrow(0, 1, "send c0 l0 -> 1"), Arrow(1, 0, "send c0 l0 -> 0")])
    )
    first, second = (
        float(text.get("y") or 0) for text in svg.iter(f"{NAME}text") if "->" in (text.text or "")
    )
    assert abs(first - second) > 12


def test_one_box_and_many() -> None:
    for count in (0, 1, 2, 12):
        boxes = [Box(n, f"rank {n}", "layer c0 l0") for n in range(count)]
        arrows = [Arrow(n, (n + 1) % count, "block") for n in range(count) if count > 1]
        svg = ElementTree.fromstring(drawing("", boxes, arrows))
        width, height = float(svg.get("width") or 0), float(svg.get("height") or 0)
        for rect in svg.iter(f"{NAME}rect"):
            assert 0 <= float(rect.get("x") or -1) <= width - 150
            assert 0 <= float(rect.get("y") or -1) <= height - 40
