"""`dinfer desk` as a person opens it: a saved run and a trace in a real Chromium, without Jupyter; and how it ends."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import Browser, Page, expect

from dinfer.views.served.detached import DetachedDesk
from tests.support.axe import violations
from tests.support.runs import DEADLINE_S
from tests.support.saved_runs import LAYERS, PROMPT
from tests.support.threads import session_on_threads
from tests.support.tiny import tiny_checkpoint

pytestmark = pytest.mark.browser


class Command:
    """`dinfer desk` of a path, until `end()`."""

    def __init__(self, path: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dinfer", "desk", str(path), "--no-browser"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout
        found = re.search(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{32}", self.process.stdout.readline())
        assert found, self.process.communicate()
        self.address = found[0]

    def end(self) -> tuple[int, str]:
        """Ctrl-C; the status, and what it said of that."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        said = self.process.communicate(timeout=DEADLINE_S)[1]
        return self.process.returncode, said


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `saved`, a run of three ranks whose rank 2 differs in a block, and its `trace.jsonl`."""
    folder = tmp_path_factory.mktemp("kept")
    model = tiny_checkpoint(folder / "model", layers=LAYERS, tokenizer=True)
    with session_on_threads(3, model) as session:
        run = session.prefill(PROMPT, chunk_size=8, paused=True)
        run.inject("bitflip", rank=2, layer=1, chunk=1, where="memory")
        run.resume()
        run.wait(60)
        run.decode(4)
        run.save(folder / "saved", prompt=True)
        run.trace.export("jsonl", folder / "trace.jsonl")
    return folder


@pytest.fixture(scope="module")
def saved(kept: Path) -> Iterator[Command]:
    made = Command(kept / "saved")
    yield made
    made.end()


Open = Callable[..., Page]


@pytest.fixture
def opened(browser: Browser) -> Iterator[Open]:
    """Opens an address in a page of a width and scheme of colours; an error in its scripts fails the test."""
    pages: list[Page] = []
    errors: list[str] = []

    def open_page(address: str, wide: int = 900, scheme: Literal["light", "dark"] = "light") -> Page:
        page = browser.new_page(viewport={"width": wide, "height": 800}, color_scheme=scheme)
        page.set_default_timeout(DEADLINE_S * 1000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
        pages.append(page)
        page.goto(address)
        page.wait_for_selector(".dinfer-map canvas[data-geometry]")
        return page

    yield open_page
    for page in pages:
        page.close()
    assert not [error for error in errors if "ERR_CONNECTION" not in error], errors


def is_within(page: Page) -> bool:
    """Whether nothing is wider than the page."""
    found: bool = page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_saved_run_is_read_from_the_map_to_the_value(
    saved: Command, opened: Open, scheme: Literal["light", "dark"], screenshots: Path
) -> None:
    page = opened(saved.address, scheme=scheme)
    panel = page.locator(".dinfer-panel")
    expect(panel.locator(".dinfer-banner")).to_contain_text("a saved run: read-only")
    expect(panel.locator(".dinfer-state")).to_contain_text("done · 4 tokens")
    assert panel.locator(".dinfer-bar button:visible").all_inner_texts() == ["compare ranks", "why?"]
    panel.get_by_role("button", name="compare ranks").click()
    expect(panel.locator(".dinfer-banner")).to_contain_text("rank 2 differs")
    page.screenshot(path=screenshots / f"served-map-{scheme}.png", full_page=True)
    panel.get_by_role("tab", name="KV").click()
    panel.locator("[data-field=layer]").select_option("1")
    panel.locator("[data-show=a-b]").click()
    expect(panel.locator(".dinfer-scale")).to_contain_text("1 value differs")
    assert is_within(page)
    page.screenshot(path=screenshots / f"served-kv-{scheme}.png", full_page=True)
    panel.get_by_role("tab", name="communication").click()
    page.wait_for_selector(".dinfer-figure .main-svg")
    page.screenshot(path=screenshots / f"served-communication-{scheme}.png", full_page=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_wrong(saved: Command, opened: Open, scheme: Literal["light", "dark"]) -> None:
    page = opened(saved.address, scheme=scheme)
    found = [f"map: {one}" for one in violations(page)]
    page.get_by_role("tab", name="KV").click()
    page.get_by_role("button", name="difference ▶").click()
    expect(page.locator(".dinfer-said-tool")).to_contain_text("1 of ")
    page.get_by_role("button", name="heads × layers").click()
    page.wait_for_selector(".dinfer-grid canvas[data-drawn]")
    found += [f"KV: {one}" for one in violations(page)]
    page.get_by_role("tab", name="communication").click()
    page.wait_for_selector(".dinfer-figure .main-svg")
    found += [f"communication: {one}" for one in violations(page)]
    assert not found, "\n".join(found)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a desk of a run of this process: planned, and a bit of block c1 l1 changed on rank 2."""
    model = tiny_checkpoint(tmp_path_factory.mktemp("live") / "model", layers=LAYERS, tokenizer=True)
    with session_on_threads(3, model) as session:
        session.measure()
        run = session.prefill(PROMPT, chunk_size=8, schedule="auto", paused=True)
        run.inject("bitflip", rank=2, layer=1, chunk=1, where="memory")
        run.resume()
        run.wait(60)
        run.decode(2)
        desk = DetachedDesk(run, "a run")
        yield desk.address
        desk.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_wrong_with_forms_the_drift_and_what_was_predicted(
    live: str, opened: Open, scheme: Literal["light", "dark"], screenshots: Path
) -> None:
    page = opened(live, scheme=scheme)
    page.locator(".dinfer-stops summary").click()
    page.locator(".dinfer-log summary").click()
    forms = page.locator("[data-form]")
    expect(forms).to_have_count(5)
    found = []
    for form in forms.all():
        form.click()
        expect(page.locator(".dinfer-verb .dinfer-call code")).to_contain_text("run.")
        found += [f"{form.inner_text()}: {one}" for one in violations(page)]
    when = page.locator(".dinfer-stops input[name=when]").bounding_box()
    assert when
    assert when["width"] >= 100, "its placeholder is read whole"
    page.get_by_role("button", name="time", exact=True).click()
    page.wait_for_selector("section.dinfer-notable button")
    found += [f"time: {one}" for one in violations(page)]
    page.get_by_role("button", name="time", exact=True).click()
    page.get_by_role("tab", name="KV").click()
    page.get_by_role("button", name="drift").click()
    page.wait_for_selector(f".dinfer-grid canvas[data-drawn^='{LAYERS} ']")
    largest = page.locator(".dinfer-grid button[title='show it above']").first
    expect(largest).to_contain_text("layer 1, chunk 1: ")
    red, other = page.locator(".dinfer-grid canvas").evaluate(COLOURS)
    assert red != other, "the block that differs has a colour of its own"
    largest.click()
    expect(page.locator("[data-field=layer]")).to_have_value("1")
    found += [f"drift: {one}" for one in violations(page)]
    page.screenshot(path=screenshots / f"live-drift-{scheme}.png", full_page=True)
    page.get_by_role("tab", name="communication").click()
    page.locator("[data-figure=predicted]").click()
    page.wait_for_selector(".dinfer-figure[data-name=predicted] .main-svg")
    found += [f"predicted: {one}" for one in violations(page)]
    page.get_by_role("tab", name="runs").click()
    page.wait_for_selector(".dinfer-runs td")
    found += [f"runs: {one}" for one in violations(page)]
    assert not found, "\n".join(found)


COLOURS = """(canvas) => {
    const [layers, columns] = canvas.dataset.drawn.split(" ").map(Number), scale = window.devicePixelRatio;
    const left = 34, top = 16;
    const wide = (canvas.clientWidth - left - 2) / columns, high = (canvas.clientHeight - top - 2) / layers;
    const at = (layer, chunk) => [...canvas.getContext("2d").getImageData(
        (left + (chunk + 0.5) * wide) * scale, (top + (layer + 0.5) * high) * scale, 1, 1).data].join();
    return [at(1, 1), at(0, 1)];
}"""
"""on the map of the drift, of block c1 l1 and of the one above it"""


def test_from_difference_to_watched_value_and_file(saved: Command, opened: Open, screenshots: Path) -> None:
    page = opened(saved.address)
    page.get_by_role("tab", name="KV").click()
    page.get_by_role("button", name="difference ▶").click()
    said, spot = page.locator(".dinfer-said-tool"), page.locator(".dinfer-spot")
    expect(said).to_contain_text("1 of ")
    expect(said).to_contain_text("rank 2 differs at layer 1, K, head 0, token 8")
    expect(spot).to_contain_text("head 0 · token 8 · dim 0")
    assert page.locator("[data-field=layer]").input_value() == "1"
    heatmap = page.locator(".dinfer-heatmap")
    texts = json.loads(heatmap.get_attribute("data-texts") or "[]")
    assert texts[:4] == ["L", "i", "m", "a"]
    heatmap.focus()  # by key alone: to a value, watch it
    page.keyboard.press("ArrowRight")
    expect(spot).to_contain_text("token 9")
    page.keyboard.press("ArrowLeft")
    expect(spot).to_contain_text("token 8")
    page.keyboard.press("Enter")
    watched = page.locator(".dinfer-pin")
    expect(watched).to_contain_text("K layer 1 head 0 token 8 dim 0")
    values = watched.locator("td").all_inner_texts()[1:]
    assert values[0] == values[1] != values[2], values
    assert "histogram of" in (page.locator(".dinfer-bars").get_attribute("aria-label") or "")
    page.screenshot(path=screenshots / "served-difference.png", full_page=True)
    watched.get_by_role("button", name="stop watching").click()
    expect(watched).to_have_count(0)
    with page.expect_download() as kept:
        page.get_by_role("button", name="CSV").click()
    assert kept.value.suggested_filename == "kv-l1-rank0.csv"
    assert Path(kept.value.path()).read_text(encoding="utf-8").startswith("tensor,head,token,text,0,1,")
    page.get_by_role("button", name="heads × layers").click()
    page.locator(f".dinfer-grid canvas[data-drawn='{LAYERS} 2']").wait_for()
    page.locator(".dinfer-grid button[title='show it above']").first.click()
    page.screenshot(path=screenshots / "served-heads.png", full_page=True)
    page.get_by_role("button", name="drift").click()
    expect(said).to_contain_text("a saved run cannot be compared with 'reference' here")


def test_keys_do_not_move_it(saved: Command, opened: Open) -> None:
    page = opened(saved.address)
    page.locator(".dinfer-map canvas").first.focus()
    for key in ("l", "b", "p", "r", "u", "Enter", "y"):
        page.keyboard.press(key)
    expect(page.locator(".dinfer-call code").last).to_have_text("run.verdict()")
    expect(page.locator(".dinfer-state")).to_contain_text("done")


def test_two_browsers_see_one_desk(saved: Command, opened: Open) -> None:
    first, second = opened(saved.address), opened(saved.address, wide=1400)
    first.get_by_role("button", name="why?").click()
    expect(second.locator(".dinfer-call code").last).to_have_text("run.verdict()")


def test_of_a_trace_all_but_the_kv_is_there(kept: Path, opened: Open) -> None:
    command = Command(kept / "trace.jsonl")
    try:
        page = opened(command.address)
        panel = page.locator(".dinfer-panel")
        expect(panel.locator(".dinfer-banner")).to_contain_text("a trace, without KV: read-only")
        expect(panel.locator(".dinfer-state")).to_contain_text("done")
        panel.get_by_role("tab", name="KV").click()
        expect(panel.locator(".dinfer-verdict")).to_contain_text("a trace and findings, but no KV")
        panel.get_by_role("tab", name="communication").click()
        page.wait_for_selector(".dinfer-figure .main-svg")
    finally:
        command.end()


def test_ctrl_c_ends_it_quietly_and_the_page_says_so(kept: Path, opened: Open) -> None:
    command = Command(kept / "saved")
    page = opened(command.address)
    status, said = command.end()
    assert (status, said.strip()) == (0, "")
    expect(page.locator(".dinfer-banner")).to_contain_text("`dinfer desk` was ended")


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "dinfer", "desk", str(tmp_path / "none"), "--no-browser"],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert ran.returncode == 2
    assert "there is no" in ran.stderr
    assert "Traceback" not in ran.stderr
