"""Figures as SVG: all that is in the figure is in the picture, inside its edges, and text stays text."""

from __future__ import annotations

import re
from collections.abc import Callable
from math import log10
from xml.etree import ElementTree

import plotly.graph_objects as go
import pytest

from dinfer.trace.events import Event
from dinfer.trace.trace import Trace
from dinfer.views.figures.exposure import exposure
from dinfer.views.figures.gantt import gantt
from dinfer.views.figures.latency import distribution, latency, layers
from dinfer.views.figures.matrix import matrix
from dinfer.views.figures.svg import BAR, WIDTH, svg
from tests.support.traces import on_paper
from tests.unit.views.test_figures import FIGURES, TRACES

NUMBER = r"-?\d+(?:\.\d+)?"
NAME = "{http://www.w3.org/2000/svg}"


def parsed(figure: go.Figure) -> ElementTree.Element:
    return ElementTree.fromstring(svg(figure))


def places(picture: ElementTree.Element) -> list[tuple[float, float]]:
    """Where paths begin, where boxes begin and end, and where words stand."""
    found = []
    for path in picture.iter(f"{NAME}path"):
        found += [(float(x), float(y)) for x, y in re.findall(rf"M({NUMBER}) ({NUMBER})", path.get("d", ""))]
    for box in picture.iter(f"{NAME}rect"):
        x, y = float(box.get("x", 0)), float(box.get("y", 0))
        found += [(x, y), (x + float(box.get("width", 0)), y + float(box.get("height", 0)))]
    for text in picture.iter(f"{NAME}text"):
        if "x" in text.attrib:
            found.append((float(text.attrib["x"]), float(text.attrib["y"])))
    return found


@pytest.mark.parametrize("draw", FIGURES, ids=lambda draw: str(draw.__name__))
@pytest.mark.parametrize("trace", TRACES)
def test_a_picture_of_any_trace_is_small_and_lies_inside_its_edges(
    draw: Callable[..., go.Figure], trace: str
) -> None:
    figure = draw(TRACES[trace]())
    assert len(svg(figure)) < 200_000
    picture = parsed(figure)
    height = int(picture.attrib["height"])
    assert picture.attrib["width"] == str(WIDTH)
    assert height >= figure.layout.height
    assert "nan" not in svg(figure)
    for x, y in places(picture):
        assert -10 <= x <= WIDTH + 1
        assert -1 <= y <= height + 1


def test_each_transfer_is_a_point_at_its_height() -> None:
    figure = latency(on_paper(4, 3, 2))
    picture = svg(figure)
    drawn = re.findall(rf"M{NUMBER} ({NUMBER})(?:h0|m-2.5)", picture)
    assert len(drawn) == sum(len(trace.x) for trace in figure.data) + len({t.name for t in figure.data})
    [low, high] = figure.layout.yaxis.range
    top, bottom = 50, 50 + (figure.layout.height - 95) * (1 - figure.layout.yaxis.domain[0])
    slow = max(figure.data[0].y)
    share = (log10(slow) - low) / (high - low)
    assert f"{bottom - share * (bottom - top):.1f}" in drawn


def test_a_distribution_is_steps_from_its_first_transfer_to_all() -> None:
    figure = distribution(on_paper(4, 3, 2))
    lines = [path.get("d", "") for path in parsed(figure).iter(f"{NAME}path") if path.get("fill") == "none"]
    assert [line.count("H") for line in lines] == [len(trace.x) - 1 for trace in figure.data]


def test_bars_of_a_rank_fill_its_row() -> None:
    figure = exposure(on_paper(6, 4, 3))
    boxes = [box for box in parsed(figure).iter(f"{NAME}rect") if box.get("class") == "bar"]
    by_row: dict[str, float] = {}
    for box in boxes:
        by_row[box.attrib["y"]] = by_row.get(box.attrib["y"], 0) + float(box.attrib["width"])
    assert len(by_row) == 3
    assert max(by_row.values()) - min(by_row.values()) < 1
    [high] = {box.attrib["height"] for box in boxes}
    assert float(high) == pytest.approx((figure.layout.height - 95) / 3 * BAR, abs=0.1)


@pytest.mark.parametrize("draw", [matrix, layers])
def test_every_cell_that_has_a_number_is_drawn(draw: Callable[..., go.Figure]) -> None:
    figure = draw(on_paper(6, 4, 3))
    numbers = [value for trace in figure.data for row in trace.z for value in row if value is not None]
    cells = [box for box in parsed(figure).iter(f"{NAME}rect") if box.get("class") == "cell"]
    assert len(cells) == len(numbers) > 0
    texts = [text for trace in figure.data for row in trace.text for text in row if text]
    titles = [title.text for cell in cells for title in cell]
    assert [title for title in titles if title not in texts] == []


def test_lanes_named_as_markup_are_words() -> None:
    nasty = "</svg><script>alert(1)</script>"
    events = [Event(0, nasty, "layer", 0, 0, 0, 10**9, chunk=0, layer=0)]
    picture = svg(gantt(Trace.merge([events])))
    assert "<script" not in picture
    assert "&lt;script&gt;" in picture
