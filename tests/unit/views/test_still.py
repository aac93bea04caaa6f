"""The still picture: what it shows, that text stays text, that colours can be told apart and are the live ones."""

from __future__ import annotations

import re
from html import unescape
from itertools import combinations
from typing import Literal
from xml.etree import ElementTree

import pytest

from dinfer.engine.board import DeviceMemory
from dinfer.run.state import Mark
from dinfer.trace.transfers import by_link, transfers
from dinfer.views.bins import fitting
from dinfer.views.cells import STATES, CellMap, marked
from dinfer.views.figures.latency import latency
from dinfer.views.figures.svg import svg
from dinfer.views.panel.panel import Panel
from dinfer.views.panel.slotted import texts_of
from dinfer.views.still import COLOURS, EVENTS, HIGH, LEAST_MARK, WIDE, map_svg, still_html
from tests.support.converted import converted
from tests.support.doubles import PaperRun, busy_run, paper_plan
from tests.support.maps import half_done
from tests.support.traces import on_paper
from tests.unit.views.test_shown import luminance

CSS = texts_of(["panel.css"])
NASTY = "</svg><script>alert(1)</script>"


def css_colours(theme: str) -> list[str]:
    """The states' colours in panel.css."""
    rule = CSS.split(".dinfer-panel.dinfer-dark {" if theme == "dark" else ".dinfer-panel {")[1].split("}")[0]
    return re.findall(r"--dinfer-\d: (#\w{6});", rule)


def lightness(colour: str) -> float:
    """CIE L* of an sRGB colour: 0 is black, 100 white."""
    y = luminance(colour)
    return 116 * y ** (1 / 3) - 16 if y > 0.008856 else 903.3 * y


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_states_differ_in_lightness(theme: str) -> None:
    colours = css_colours(theme)
    assert len(colours) == len(STATES)
    assert all(abs(lightness(a) - lightness(b)) >= 10 for a, b in combinations(colours, 2))


def test_the_still_picture_has_the_colours_of_the_live_one() -> None:
    assert css_colours("light") == list(COLOURS)


def drawn_area(svg: str) -> dict[str, int]:
    """How many square pixels the map has in each colour, read back from its paths."""
    found = dict.fromkeys(COLOURS, 0)
    for path in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}path"):
        if (fill := path.get("fill", "")) in found:
            boxes = re.findall(r"M\d+ \d+h(\d+)v(\d+)h-\d+z", path.get("d", ""))
            found[fill] += sum(int(wide) * int(high) for wide, high in boxes)
    return found


def test_the_map_has_as_much_of_each_colour_as_the_run_of_each_state() -> None:
    run = busy_run(layers=6, chunks=5, ranks=3, waves=4)
    states = CellMap(run.plan).states(run.standing().stands)
    area = drawn_area(map_svg(states, run.plan.shape.owners, run.labels))
    cells = {COLOURS[state]: int((states == state).sum()) for state in range(len(STATES))}
    each = sum(area.values()) / states.size
    assert area == {colour: count * each for colour, count in cells.items()}
    assert all(cells.values())


def test_text_of_the_run_stays_text() -> None:
    run = PaperRun(paper_plan(), labels=[NASTY] * 3)
    run.message, run.devices = NASTY, [NASTY] * 2
    html = still_html(run.plan, run.standing(), run.labels)
    assert "<script" not in html
    assert html.count("&lt;script&gt;") == 3 + 1 + 2


def test_a_converted_notebook_shows_the_still_picture() -> None:
    run = PaperRun(paper_plan())
    run.step("wave")
    panel = Panel(run)
    data, metadata = panel._repr_mimebundle_()
    panel.close()
    page = converted(data, metadata)
    assert "Run the cell again for a live panel" in page
    assert "<title>blocks by layer and chunk, each split by rank</title>" in page
    assert 'run.step("wave")' in unescape(page)


def test_ranks_are_a_table_with_what_they_hold_in_memory() -> None:
    run = PaperRun(paper_plan())
    assert "<th>memory</th>" not in still_html(run.plan, run.standing(), run.labels)
    run.memory, run.device_memory = [1 << 30, 1 << 30], [None, DeviceMemory(1 << 29, 1 << 30, 80 << 30)]
    still = still_html(run.plan, run.standing(), run.labels)
    assert "<th>memory</th><th>state</th><th>blocks held</th><th>new tokens</th>" in still
    assert "<tr><td>0</td><td>cpu</td><td>1.00 GiB</td><td>paused</td><td>0 of 12</td><td>0</td>" in still
    assert "<td>0.50 of 80 GiB · host 1.00 GiB</td>" in still


def test_what_went_over_each_link_is_a_table_and_a_picture() -> None:
    run = PaperRun(paper_plan())
    run.events = list(on_paper(4, 3, 2).events)
    still = Panel(run)._repr_mimebundle_()[0]["text/html"]
    found = by_link(transfers(on_paper(4, 3, 2)))
    assert list(found) == [(0, 1), (1, 0)]
    for (source, target), some in found.items():
        megabytes = sum(one.bytes for one in some) / 1e6
        assert f"<tr><td>{source}→{target}</td><td>{len(some)}</td><td>{megabytes:.3g}</td>" in still
    assert svg(latency(on_paper(4, 3, 2))) in still
    assert "99th" not in still_html(run.plan, run.standing(), run.labels)


def boxes(picture: str, name: str) -> list[tuple[int, int, int, int]]:
    """The boxes of a path of the map: x, y, width, height."""
    paths = ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}path")
    drawn = [path.get("d", "") for path in paths if path.get("class") == name]
    found = [re.findall(r"M(\d+) (\d+)h(\d+)v(\d+)h-\d+z", path) for path in drawn]
    return [tuple(map(int, box)) for path in found for box in path]  # type: ignore[misc]


@pytest.mark.parametrize("size", [(1, 1, 1), (36, 170, 3), (80, 1000, 8), (200, 40, 64)])
def test_a_map_of_any_size_fits_a_page_and_shows_its_marks(size: tuple[int, int, int]) -> None:
    layers, chunks, ranks = size
    fault, armed = (0, chunks * 109 // 170, 0), (layers - 1, chunks - 1, ranks - 1)
    kinds: list[tuple[tuple[int, int, int], Literal["differs", "armed"]]] = [
        (fault, "differs"),
        (armed, "armed"),
    ]
    marks = [Mark(rank, chunk, layer, kind, "") for (layer, chunk, rank), kind in kinds]
    picture = map_svg(marked(half_done(*size), marks), [0] * layers, ["some words"] * chunks)
    wide, high = (int(ElementTree.fromstring(picture).attrib[name]) for name in ("width", "height"))
    assert wide <= 900
    assert high <= 500
    assert len(picture) < 200_000
    for kind in ("differs", "armed"):
        [(x, y, across, down)] = boxes(picture, kind)
        assert min(across, down) >= LEAST_MARK
        assert x + across <= wide
        assert y + down <= high
    said = fitting(size, WIDE, HIGH).text
    assert said in picture
    assert bool(said) == (chunks > 100 or ranks > 8)


def test_notes_and_events_that_are_not_listed_are_counted() -> None:
    run = PaperRun(paper_plan())
    run.marks = [Mark(0, 0, 0, "differs", f"note {n}") for n in range(30)]
    still = still_html(run.plan, run.standing(), run.labels)
    assert "note 19" in still
    assert "note 20" not in still
    assert "<li>and 10 more</li>" in still
    events = on_paper(4, 3, 2).events
    many = [*events] * (EVENTS // len(events) + 1)
    assert f"the newest 50,000 of {len(many):,} events" in still_html(
        run.plan, run.standing(), run.labels, many
    )
