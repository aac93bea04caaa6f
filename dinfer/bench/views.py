"""`dinfer bench views`: times and sizes of figures, of the report (to write and to open), and of updates of live views.

The run is simulated: 36 layers × 32 chunks × 3 ranks. Browser times are measured offline in a Chromium that playwright
drives; without these two, the result says that they were not measured.
"""

import base64
import json
import queue
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from plotly.offline import get_plotlyjs

from dinfer.bench.prefill import BenchModel, random_checkpoint
from dinfer.bench.session import session_on_engines
from dinfer.display import Table
from dinfer.kv.source import Subject
from dinfer.plan.cut import Cuts
from dinfer.plan.partition import partition
from dinfer.plan.plan import Plan
from dinfer.plan.schedule import build
from dinfer.run.report import machine
from dinfer.run.run import Run
from dinfer.run.state import Standing, State
from dinfer.trace.simulated import paper_trace
from dinfer.trace.trace import Trace
from dinfer.views.cells import CellMap
from dinfer.views.find import Searched, find
from dinfer.views.panel.communication import EVENTS, FIGURES
from dinfer.views.panel.inspector import Fetched, Inspector, InspectRequest, picture
from dinfer.views.panel.panel import Panel
from dinfer.views.panel.scrubber import TimeQuestion, answer
from dinfer.views.recorded import Recorded
from dinfer.views.report.page import REPORT_FIGURES, write_report
from dinfer.views.status import layout, moment
from dinfer.views.timeline import Timeline

MAPS = ((36, 32, 3), (80, 64, 8))
"""layers, chunks, ranks"""

BINS = 1000
"""of a strip, as wide as a page"""

HEADS, TOKENS, DIMS = 8, 2048, 128

SECONDS = 2.0

Timer = Callable[[Callable[[], object]], float]
"""times a call, in milliseconds"""


class CutStand(NamedTuple):
    """Where a rank stands, at a cut."""

    positions: tuple[int, ...]
    started: tuple[bool, ...]
    limits: tuple[int, ...]


def kernel_costs(trace: Trace, timed: Timer) -> dict[str, dict[str, float]]:
    """Milliseconds and bytes of one update of each live view, in the kernel."""
    found = {}
    for size in MAPS:
        plan, standing = half_way(*size)
        cells = CellMap(plan)
        shown, drawn, _ = moment(plan, cells, standing)
        found["map " + " × ".join(map(str, size))] = {
            "ms": timed(lambda plan=plan, cells=cells, at=standing: json.dumps(moment(plan, cells, at)[0])),  # type: ignore[misc]
            "bytes": len(drawn) + len(json.dumps(shown)),
        }
        found |= time_costs(size, plan, standing, timed)
    want, fetched = inspected()
    found[f"inspector {HEADS} × {TOKENS} × {DIMS}"] = {
        "ms": timed(lambda: picture(want, fetched)),
        "bytes": len(picture(want, fetched)[1]),
    }
    newest = Trace.merge([trace.events[-EVENTS:]])
    found[f"latency plot, {len(newest.events):,} events"] = {
        "ms": timed(lambda: FIGURES["latency"](newest).to_json()),
        "bytes": len(FIGURES["latency"](newest).to_json()),
    }
    return found


def time_costs(
    size: tuple[int, int, int], plan: Plan, standing: Standing, timed: Timer
) -> dict[str, dict[str, float]]:
    """The same of the scrubber and the search box: the page *time* for events that it has not seen before, another
    moment with the totals of a stretch, another strip, and searches: one that every op is compared with, and the
    first that is about messages."""
    trace = paper_trace(plan)
    timeline = Timeline(trace, size)
    recorded = Recorded(timeline, standing, "")
    half, third = timeline.span // 2, timeline.span // 3
    asked = TimeQuestion.of({"at": half, "bins": BINS, "rank": 0, "stretch": [third, half]})
    first, buffers = answer(asked, recorded, plan)
    again = asked._replace(have=first["key"])

    def anew() -> Timeline:
        return Timeline(Trace.merge([trace.events]), size)

    searched = Searched(plan, [""] * len(plan.shape.chunks), standing, timeline)
    name = " × ".join(map(str, size))
    return {
        f"opening *time* {name}": {
            "ms": timed(lambda: json.dumps(answer(asked, recorded._replace(timeline=anew()), plan)[0])),
            "bytes": len(json.dumps(first)) + sum(map(len, buffers)),
        },
        f"moment and stretch {name}": {
            "ms": timed(lambda: json.dumps(answer(again, recorded, plan)[0])),
            "bytes": len(json.dumps(answer(again, recorded, plan)[0])) + len(buffers[-1]),
        },
        f"strip of {BINS} bins {name}": {
            "ms": timed(lambda: json.dumps(answer(asked, recorded, plan)[0])),
            "bytes": len(json.dumps(first)) + sum(map(len, buffers)),
        },
        f"search {name}": {
            "ms": timed(lambda: find("slowest", searched)),
            "bytes": len(json.dumps([hit.as_dict() for hit in find("slowest", searched).hits])),
        },
        f"first search {name}": {
            "ms": timed(lambda: find("late", searched._replace(timeline=anew()))),
            "bytes": len(json.dumps([hit.as_dict() for hit in find("late", searched).hits])),
        },
    }


def browser_rates(browser: Any, trace: Trace) -> dict[str, float]:
    """Updates per second that a page draws, by view."""
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.set_content("<div id=place></div>")
    page.add_script_tag(content=get_plotlyjs())
    plan, standing = half_way(*MAPS[0])
    shown, drawn, _ = moment(plan, CellMap(plan), standing)
    head, codes = picture(*inspected())
    rates: dict[str, float] = page.evaluate(
        PAGE,
        {
            "script": Panel._esm,
            "css": Panel._css,
            "board": {**layout(plan, [""] * len(plan.shape.chunks)), "figures": list(FIGURES)},
            "shown": {
                **shown,
                "breakpoints": [],
                "working": [],
                "waiting": "",
                "error": "",
                "answer": "",
                "done": 0,
            },
            "cells": base64.b64encode(drawn).decode(),
            "head": head,
            "codes": base64.b64encode(codes).decode(),
            "figure": FIGURES["latency"](Trace.merge([trace.events[-EVENTS:]])).to_json(),
            "milliseconds": SECONDS * 1e3,
        },
    )
    page.close()
    return rates


def half_way(layers: int, chunks: int, ranks: int) -> tuple[Plan, Standing]:
    """A run of that size, halfway through prefill."""
    shape = partition(layers=layers, tokens=chunks * 128, world_size=ranks, chunk_size=128)
    plan = build(shape, "pipelined", "pairwise")
    cut = Cuts(plan).after_block(chunks // 2, layers // 2)
    stands = tuple(CutStand(lanes, (False,) * len(lanes), lanes) for lanes in cut)
    return plan, Standing(stands, State.PAUSED, "", 0, "", ("cpu",) * ranks, (True,) * ranks, "run.resume()")  # type: ignore[arg-type]


def inspected() -> tuple[InspectRequest, Fetched]:
    """K of a layer of that many heads, tokens and dims."""
    shape = partition(layers=1, tokens=TOKENS, world_size=1, chunk_size=128)
    plan = build(shape, "pipelined", "pairwise")
    subject = Subject("this run", ("",), plan, tuple(range(TOKENS)), (), HEADS, DIMS, torch.float32, "")
    values = np.random.default_rng(0).standard_normal((HEADS, TOKENS, DIMS), np.float32)
    return InspectRequest("page", 0, 0, None, 0, 0, "a", "robust", ""), Fetched(subject, values, values)


PAGE = """async (given) => {
  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const style = document.createElement("style");
  style.textContent = given.css;
  document.head.append(style);
  globalThis.dinferPlotly = Plotly;
  const values = { board: given.board, shown: given.shown, cells: new DataView(bytes(given.cells).buffer), marks: {} };
  const handlers = {}, counts = { map: 0, inspector: 0, "latency plot": 0 };
  const fire = (name, ...parts) => (handlers[name] ?? []).forEach((handler) => handler(...parts));
  const codes = new DataView(bytes(given.codes).buffer);
  const answers = {
    inspect: ({ view, question }) => {
      const kv = { ...given.head, view, question, stamp: String(counts.inspector++) };
      fire("msg:custom", { kv }, [codes]);
    },
    figure: ({ view, name }) => {
      counts["latency plot"]++;
      fire("msg:custom", { figure: { view, name, seen: counts["latency plot"], caption: "", json: given.figure } }, []);
    },
  };
  const model = {
    get: (name) => values[name],
    set: (name, value) => { values[name] = value; },
    on: (name, handler) => (handlers[name] ??= []).push(handler),
    off: () => {},
    send: (message) => {
      setTimeout(() => fire("msg:custom", { heard: message.id }, []));
      setTimeout(() => answers[message.do]?.(message));
    },
  };
  const module = await import(URL.createObjectURL(new Blob([given.script], { type: "text/javascript" })));
  const place = document.getElementById("place");
  const close = module.default.render({ model, el: place });
  const rates = {};
  const measure = async (name, tab, step) => {
    place.querySelector(`[data-tab="${tab}"]`).click();
    const first = counts[name] + (name === "map" ? 0 : 2); // the first ones also set everything up
    while (counts[name] < first) await new Promise(requestAnimationFrame);
    const before = counts[name], began = performance.now();
    while (performance.now() - began < given.milliseconds) {
      await new Promise(requestAnimationFrame);
      step();
    }
    rates[name] = (counts[name] - before) * 1e3 / (performance.now() - began);
  };
  await measure("map", "map", () => { counts.map++; fire("change:cells"); });
  await measure("inspector", "KV", () => {});
  await measure("latency plot", "communication", () => {});
  close();
  return rates;
}"""

SHAPE = BenchModel(layers=3, kv_heads=HEADS, head_dim=DIMS)
"""a layer for each engine, of which one is inspected"""

ANSWER_S = 60.0


def fetch_costs(repeats: int, say: Callable[[str], None]) -> dict[str, float]:
    """Times of the inspector on three engines, started for it. Raises ClusterError, ConfigError or RuntimeError."""
    with session_on_engines() as (session, _), random_checkpoint(SHAPE) as folder:
        session.load(str(folder), threads=1)
        run = session.prefill([5 + n % 1000 for n in range(TOKENS)], chunk_size=128)
        run.wait()
        costs = fetched(run, repeats)
        say("the inspector's fetch from engines is timed")
        return costs


def fetched(run: Run, repeats: int) -> dict[str, float]:
    """Median milliseconds to the picture of the first layer, and the bytes of its values. `first`: nothing is cached;
    `difference`: minus the KV of a rank that holds the same; `again`: nothing has changed."""
    times: dict[str, list[float]] = {"first": [], "difference": [], "again": []}
    last = run.world_size - 1
    for _ in range(repeats + 1):
        asked = _Asked(run)
        for name, show in (("first", "a"), ("difference", "a-b"), ("again", "a")):
            times[name].append(asked.seconds(last, show) * 1e3)
        asked.inspector.close()
    heads, tokens, dims = run.kv(layer=0, rank=last).k.shape
    size = heads * tokens * dims * run.source().subject.dtype.itemsize
    return {"bytes": size, **{name: median(some[1:]) for name, some in times.items()}}  # the first warms up


class _Asked:
    """An inspector with one browser, which asks for pictures."""

    def __init__(self, run: Run) -> None:
        self._heard: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.inspector = Inspector(run, lambda content, _=None: self._heard.put(content))

    def seconds(self, rank: int, show: str) -> float:
        """Seconds until the picture is sent. Returns after the comparison that follows."""
        began = time.perf_counter()
        self.inspector.ask({"view": "bench", "layer": 0, "tensor": "K", "a": rank, "b": 0, "show": show})
        head = self._heard.get(timeout=ANSWER_S)["kv"]
        took = time.perf_counter() - began
        if "error" in head:
            raise RuntimeError(head["error"])
        self._heard.get(timeout=ANSWER_S)
        return took


def fetch_line(costs: dict[str, float]) -> str:
    """The times of the inspector as a sentence."""
    return (
        f"inspector, K of a layer ({HEADS} × {TOKENS} × {DIMS}) from one of three engines: {costs['first']:.0f} ms "
        f"from request to picture, {costs['bytes'] / 1e6:.1f} MB; A − B with a rank that holds the same "
        f"{costs['difference']:.0f} ms; again, unchanged, {costs['again']:.0f} ms"
    )


LAYERS, CHUNKS, RANKS = 36, 32, 3

LARGE_MAP = "map " + " × ".join(map(str, MAPS[-1]))

MARKS = "performance.getEntriesByName('{name}').at(-1).startTime"

NEEDED = "not timed: this needs playwright (pip install playwright) and Chromium"


def bench_views(repeats: int, say: Callable[[str], None], *, engines: bool = False) -> dict[str, Any]:
    """All figures: milliseconds as medians of `repeats` rounds, and bytes. `engines`: also time the inspector on three
    engines."""
    shape = partition(layers=LAYERS, tokens=CHUNKS * 128, world_size=RANKS, chunk_size=128)
    trace = paper_trace(build(shape, "pipelined", "pairwise"))
    figures = {name: _figure(trace, draw, repeats) for name, draw in REPORT_FIGURES.items()}
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
    """The result as text."""
    report, host = result["report"], result["machine"]
    lines = [
        f"{host['processor']}, {host['cores']} cores; {LAYERS} layers × {CHUNKS} chunks × {RANKS} ranks, "
        f"{result['events']:,} events; medians of {result['repeats']}",
        str(
            Table(
                ("figure", "ms", "MB"),
                [
                    [name, f"{it['ms']:.0f}", f"{it['bytes'] / 1e6:.2f}"]
                    for name, it in result["figures"].items()
                ],
            )
        ),
        f"report: written in {report['write_ms']:.0f} ms, {report['bytes'] / 1e6:.2f} MB (target: at most 10 MB)",
    ]
    opened, after = report["open"], _live(result["live"])
    after += [fetch_line(result["fetch"])] if result.get("fetch") else []
    if opened is None:
        return "\n".join([*lines, f"opening: {NEEDED}", *after])
    return "\n".join(
        [
            *lines,
            f"opening: first sentence after {opened['seen_ms']:.0f} ms, everything in the window after "
            f"{opened['drawn_ms']:.0f} ms (target: at most 2,000 ms), every figure after {opened['all_ms']:.0f} ms",
            *after,
        ]
    )


def _live(live: dict[str, Any]) -> list[str]:
    """A line for each live view: one update in the kernel, and updates per second in a browser."""
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
    """The median of `repeats` calls, after a warm-up."""
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append((time.perf_counter() - began) * 1e3)
    return median(times)


def _in_browser(path: Path, trace: Trace, repeats: int) -> tuple[dict[str, float], dict[str, float]] | None:
    """Median milliseconds to open the report in a new browser context, and updates per second of live views; None
    without a browser."""
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
    """Milliseconds since the browser began to load the page, by the page's own marks."""
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
