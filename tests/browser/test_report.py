"""The report as a person opens it: from disk, in a real Chromium without any network."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import Browser, BrowserContext, Page

from dinfer.trace.trace import Trace
from dinfer.views.report.page import REPORT_FIGURES, write_report
from tests.support.offline import Opened, open_offline
from tests.support.reports import HOSTILE, told
from tests.support.runs import wait_for
from tests.support.traces import on_paper, recorded

pytestmark = pytest.mark.browser

SCHEMES = ("light", "dark")


Open = Callable[..., Opened]


@pytest.fixture
def open_report(browser: Browser, tmp_path: Path) -> Iterator[Open]:
    """Writes a report and opens it in a context of its own that is offline and refuses every request but the file."""
    contexts: list[BrowserContext] = []

    def opened(*traces: Trace, scheme: Literal["light", "dark"] = "light") -> Opened:
        path = write_report(traces, tmp_path / f"report-{len(contexts)}.html")
        found = open_offline(browser, path, scheme)
        contexts.append(found.page.context)
        return found

    yield opened
    for context in contexts:
        context.close()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["recorded", "36x32x3"])
def test_it_opens_from_disk_with_all_figures_and_nothing_from_outside(
    open_report: Open, name: str, scheme: Literal["light", "dark"], screenshots: Path
) -> None:
    report = open_report(told(recorded() if name == "recorded" else on_paper()), scheme=scheme)
    verdict = report.page.locator("#verdict")
    assert verdict.inner_text().startswith("Rank 1 differs at layer 1")
    assert "Greedy tokens agree" in report.page.locator("header li").first.inner_text()
    assert verdict.bounding_box()["y"] < 100  # type: ignore[index]
    report.read_through()
    assert report.page.locator(".drawn svg.main-svg").count() >= len(REPORT_FIGURES)
    assert report.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    report.is_clean()
    keep(report.page, screenshots, f"report-{name}-{scheme}")


def keep(page: Page, folder: Path, name: str) -> None:
    """Pictures of a whole page, a window's height each."""
    height = page.evaluate("document.documentElement.scrollHeight")
    for number, top in enumerate(range(0, height, 780)):
        page.evaluate("(top) => window.scrollTo(0, top)", top)
        page.screenshot(path=folder / f"{name}-{number}.png")


def test_figures_follow_light_and_dark(open_report: Open) -> None:
    report = open_report(told(on_paper(4, 2, 2)))
    colour = "getComputedStyle(document.querySelector('#run0-exposure .xtick text')).fill"
    light = report.page.evaluate(colour)
    report.page.emulate_media(color_scheme="dark")
    report.until(f"{colour} !== {light!r}")
    report.settle()
    assert report.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 27)"
    report.is_clean()


def test_a_long_box_ends_with_a_whole_line(open_report: Open) -> None:
    report = open_report(told(on_paper(4, 2, 2), "\n".join(f"line {n}" for n in range(60))))
    box = report.page.locator("h3:text-is('Rank 0') + pre")
    box.scroll_into_view_if_needed()
    shown, line = box.evaluate(
        """(pre) => {
            const style = getComputedStyle(pre);
            return [pre.clientHeight - parseFloat(style.paddingTop), parseFloat(style.lineHeight)];
        }"""
    )
    assert (shown, line) == (24 * 17, 17)
    log = report.page.locator("pre.whole").first
    assert log.evaluate(
        "(pre) => { pre.parentElement.open = true; return pre.scrollHeight === pre.clientHeight; }"
    )
    report.is_clean()


def test_what_a_run_said_does_not_run(open_report: Open) -> None:
    report = open_report(told(on_paper(4, 2, 2), HOSTILE), told(on_paper(4, 2, 2, "ring"), HOSTILE))
    report.read_through()
    assert report.page.title() != "pwned"
    assert report.page.locator("img").count() == 0
    assert HOSTILE in report.page.locator(".run0 pre").first.inner_text()
    report.is_clean()


def test_a_script_that_came_in_would_be_stopped(open_report: Open) -> None:
    """The policy alone holds: an element put into the page by hand runs nothing and fetches nothing."""
    report = open_report(told(on_paper(4, 2, 2)))
    report.page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "document.title = 'pwned'";
            const image = document.createElement("img");
            image.src = "https://example.org/x.png";
            document.body.append(script, image);
        }"""
    )
    report.until("document.querySelector('img').complete")
    assert report.page.title() != "pwned"
    assert report.asked == [report.path.as_uri()]
    assert any("Content Security Policy" in said for said in report.said)


def test_a_gantt_can_be_zoomed_and_told_by_hovering(open_report: Open) -> None:
    report = open_report(told(recorded()))
    report.read_through()
    plot = report.page.locator("#run0-gantt .nsewdrag").first
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    assert box
    shown = "document.querySelector('#run0-gantt').layout.xaxis.range[1]"
    before = report.page.evaluate(shown)
    mouse = report.page.mouse
    mouse.move(box["x"] + 100, box["y"] + 20)
    mouse.down()
    mouse.move(box["x"] + 300, box["y"] + 24, steps=5)
    mouse.up()
    report.until(f"{shown} < {before} / 2")

    def clicked_twice() -> bool:
        mouse.dblclick(box["x"] + 200, box["y"] + 20)
        return bool(report.page.evaluate(f"Math.abs({shown} - {before}) < 1e-9"))

    wait_for(clicked_twice, "the whole Gantt again")  # a busy page may take two clicks for two that are apart
    report.is_clean()


PAPER = 703
"""pixels between the margins of A4"""


def on_paper_page(report: Opened, width: int) -> None:
    """The page as it is printed: as wide as the paper's text, with what the browser tells it before."""
    report.page.set_viewport_size({"width": width, "height": 1000})
    report.page.emulate_media(media="print", color_scheme="dark")
    report.page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    report.until(f"document.body.dataset.drawn === '{report.page.locator('.drawn').count()}'")


CLIPPED = """() => [...document.querySelectorAll('main *')].filter((one) =>
    getComputedStyle(one).overflowX !== 'visible' && one.scrollWidth > one.clientWidth + 1 && !one.closest('.drawn')
).map((one) => one.outerHTML.slice(0, 80))"""


@pytest.mark.parametrize("ranks", [3, pytest.param(16, marks=pytest.mark.slow)])
def test_on_paper_nothing_is_cut_off_and_all_is_light(
    open_report: Open, screenshots: Path, ranks: int
) -> None:
    report = open_report(told(on_paper(32, 4, ranks)), scheme="dark")
    on_paper_page(report, PAPER)
    assert report.page.evaluate("document.documentElement.scrollWidth") <= PAPER
    assert report.page.evaluate(CLIPPED) == []
    for box in report.page.locator(".drawn .main-svg").evaluate_all(
        "(all) => all.map((one) => one.getBoundingClientRect())"
    ):
        assert box["right"] <= PAPER + 1
        assert box["height"] <= 940 + 1  # so that it fits a page
    assert report.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert (
        report.page.evaluate("getComputedStyle(document.querySelector('#run0-gantt .xtick text')).fill")
        == "rgb(33, 33, 33)"
    )
    report.page.emulate_media(media=None)
    pdf = report.page.pdf(path=screenshots / f"report-{ranks}.pdf", prefer_css_page_size=True)
    assert re.search(rb"/MediaBox \[0 0 59[45][.\d]* 84[12]", pdf)
    report.page.emulate_media(media="screen", color_scheme="dark")
    report.page.set_viewport_size({"width": 1280, "height": 800})
    report.page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    report.until("document.querySelector('#run0-gantt .main-svg').clientWidth > 1000")
    report.settle()
    report.is_clean()


def test_two_runs_are_side_by_side_on_the_screen_and_on_paper(open_report: Open, screenshots: Path) -> None:
    report = open_report(told(on_paper(4, 4, 3)), told(on_paper(4, 4, 3, "ring", "lockstep")))
    report.read_through()

    def boxes(name: str) -> list[dict[str, float]]:
        return [report.page.locator(f"#run{run}-{name}").bounding_box() for run in (0, 1)]  # type: ignore[misc]

    for name in REPORT_FIGURES:
        one, other = boxes(name)
        assert one["y"] == other["y"]
        assert one["x"] + one["width"] < other["x"]
    assert report.page.locator("tr.differs").count() >= 3
    cells = report.page.locator("table.facts thead th").all()
    _, one_width, other_width, ratio_width = (cell.bounding_box()["width"] for cell in cells)  # type: ignore[index]
    assert one_width == pytest.approx(other_width, abs=1), (
        "a long text of one run does not squeeze the other's column"
    )
    assert ratio_width > one_width / 3
    assert report.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    keep(report.page, screenshots, "report-two-light")
    on_paper_page(report, 1032)  # A4 across
    assert report.page.evaluate("document.documentElement.scrollWidth") <= 1032
    assert report.page.evaluate(CLIPPED) == []
    for name in REPORT_FIGURES:
        one, other = boxes(name)
        assert one["x"] + one["width"] < other["x"]
    report.is_clean()
