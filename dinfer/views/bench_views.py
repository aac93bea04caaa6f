"""`dinfer bench views`: what views take: figures to make, the report to write, its size, and how long it takes to open;
and what an update of the live ones takes.

The run is one on paper, 36 layers × 32 chunks × 3 ranks. What a browser does is timed in a Chromium that playwright
drives, where both are there, offline; else it is said that it was not.
"""

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from dinfer.plan.partition import partition
from dinfer.plan.schedule import build
from dinfer.session.machine import machine
from dinfer.trace.paper import paper_trace
from dinfer.trace.trace import Trace
from dinfer.views.bench_fetch import fetch_costs, line
from dinfer.views.bench_live import MAPS, browser_rates, kernel_costs
from dinfer.views.report.page import FIGURES, write_report

LAYERS, CHUNKS, RANKS = 36, 32, 3
LARGE_MAP = "map " + " × ".join(map(str, MAPS[-1]))
MARKS = "performance.getEntriesByName('{name}').at(-1).startTime"
NEEDED = "not timed: that needs playwright (pip install playwright) and a Chromium"


def bench_views(repeats: int, say: Callable[[str], None], *, engines: bool = False) -> dict[str, Any]:
    """All figures: milliseconds as medians of so many rounds, bytes. `engines`: also what three engines take to
    give the inspector a layer."""
    shape = partition(layers=LAYERS, tokens=CHUNKS * 128, world_size=RANKS, chunk_size=128)
    trace = paper_trace(build(shape, "pipelined", "pairwise"))
    figures = {name: _figure(trace, draw, repeats) for name, draw in FIGURES.items()}
    say("figures are timed")
    with tempfile.TemporaryDirectory(prefix="dinfer-bench-") as folder:
        path = Path(folder) / "report.html"
        written = _milliseconds(lambda: write_report([trace], path), repeats)
        say("the report is written")
        live = kernel_costs(trace, lambda call: _milliseconds(call, repeats))
        say("live views are timed")
        opened, rates = _in_browser(path, trace, repeats) or (None, None)
        fetch = fetch_costs(repeats, say) if engines else None
        return {
            "machine": machine(),
            "events": len(trace.events),
            "repeats": repeats,
            "figures": figures,
            "report": {"write_ms": written, "bytes": path.stat().st_size, "open": opened},
            "live": {"kernel": live, "browser": rates},
            "fetch": fetch,
        }


def table(result: dict[str, Any]) -> str:
    """What was measured, for people."""
    report, host = result["report"], result["machine"]
    lines = [
        f"{host['processor']}, {host['cores']} cores; {LAYERS} layers × {CHUNKS} chunks × {RANKS} ranks, "
        f"{result['events']:,} events; medians of {result['repeats']}",
        *(
            f"{name:<14}{one['ms']:>8.0f} ms  {one['bytes'] / 1e6:>6.2f} MB"
            for name, one in result["figures"].items()
        ),
        f"report: written in {report['write_ms']:.0f} ms, {report['bytes'] / 1e6:.2f} MB (target: at most 10 MB)",
    ]
    opened, after = report["open"], _live(result["live"])
    after += [line(result["fetch"])] if result.get("fetch") else []
    if opened is None:
        return "\n".join([*lines, f"opening: {NEEDED}", *after])
    return "\n".join(
        [
            *lines,
            f"opening: first sentence on the page after {opened['seen_ms']:.0f} ms, all that is in the window after "
            f"{opened['drawn_ms']:.0f} ms (target: at most 2,000 ms), every figure after {opened['all_ms']:.0f} ms",
            *after,
        ]
    )


def _live(live: dict[str, Any]) -> list[str]:
    """A line for each live view: an update in the kernel, and how often a browser can draw one."""
    rates = live["browser"] or {}
    found = []
    for name, one in live["kernel"].items():
        drawn = [rate for view, rate in rates.items() if name.startswith(view)]
        rate = f", drawn {drawn[0]:.0f} times a second" if drawn and name != LARGE_MAP else ""
        found.append(f"live: {name}: {one['ms']:.1f} ms in the kernel, {one['bytes'] / 1e6:.2f} MB{rate}")
    return found if rates else [*found, f"drawing: {NEEDED}"]


def _figure(trace: Trace, draw: Callable[..., Any], repeats: int) -> dict[str, float]:
    return {"ms": _milliseconds(lambda: draw(trace).to_json(), repeats), "bytes": len(draw(trace).to_json())}


def _milliseconds(call: Callable[[], object], repeats: int) -> float:
    """The median, after one call to warm up."""
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append((time.perf_counter() - began) * 1e3)
    return median(times)


def _in_browser(path: Path, trace: Trace, repeats: int) -> tuple[dict[str, float], dict[str, float]] | None:
    """How long the report takes to open, medians over fresh contexts, and how often live views can be drawn; None where
    there is no browser."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        chromium = shutil.which("chromium") or (own if Path(own).exists() else None)
        if chromium is None:
            return None
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        rounds = [_open_once(browser, path) for _ in range(repeats + 1)][1:]
        rates = browser_rates(browser, trace)
        browser.close()
    return {name: median(one[name] for one in rounds) for name in rounds[0]}, rates


def _open_once(browser: Any, path: Path) -> dict[str, float]:
    """Milliseconds since the browser began to load it, as the page itself has them."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, offline=True)
    page = context.new_page()
    page.goto(path.as_uri())
    page.wait_for_selector("body[data-busy=false]")
    seen = page.evaluate(MARKS.format(name="first-contentful-paint"))
    drawn = page.evaluate(MARKS.format(name="drawn"))
    figures = page.locator(".drawn")
    for number in range(figures.count()):
        figures.nth(number).scroll_into_view_if_needed()
        page.wait_for_selector(f".drawn >> nth={number} >> .main-svg >> nth=0")
    page.wait_for_selector("body[data-busy=false]")
    everything = page.evaluate(MARKS.format(name="drawn"))
    context.close()
    return {"seen_ms": seen, "drawn_ms": drawn, "all_ms": everything}
