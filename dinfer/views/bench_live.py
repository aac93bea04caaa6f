"""The live part of `dinfer bench views`: what an update of map, inspector and latency plot takes.

The kernel's part is timed as it is. The browser's is the panel's own script with a kernel that answers at once: how
many updates a second it draws.
"""

import base64
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from plotly.offline import get_plotlyjs

from dinfer.plan.cut import Cuts
from dinfer.plan.partition import partition
from dinfer.plan.plan import Plan
from dinfer.plan.schedule import build
from dinfer.session.kv.source import Subject
from dinfer.session.runs.standing import Standing
from dinfer.trace.trace import Trace
from dinfer.views.cells import CellMap
from dinfer.views.communication import EVENTS, FIGURES
from dinfer.views.inspector import Fetched, Want, picture
from dinfer.views.panel import Panel
from dinfer.views.status import layout, moment

MAPS = ((36, 32, 3), (80, 64, 8))
"""layers, chunks, ranks"""
HEADS, TOKENS, DIMS = 8, 2048, 128
SECONDS = 2.0
Timed = Callable[[Callable[[], object]], float]
"""milliseconds that a call takes"""


class Stands(NamedTuple):
    """A rank that stands at a cut."""

    positions: tuple[int, ...]
    started: tuple[bool, ...]
    limits: tuple[int, ...]


def kernel_costs(trace: Trace, timed: Timed) -> dict[str, dict[str, float]]:
    """Milliseconds and bytes of one update."""
    found = {}
    for size in MAPS:
        plan, standing = half_way(*size)
        cells = CellMap(plan)
        shown, drawn, _ = moment(plan, cells, standing)
        found["map " + " × ".join(map(str, size))] = {
            "ms": timed(lambda plan=plan, cells=cells, at=standing: json.dumps(moment(plan, cells, at)[0])),  # type: ignore[misc]
            "bytes": len(drawn) + len(json.dumps(shown)),
        }
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


def browser_rates(browser: Any, trace: Trace) -> dict[str, float]:
    """Updates a second that a page draws."""
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
    """A run of that size that stands in its middle."""
    shape = partition(layers=layers, tokens=chunks * 128, world_size=ranks, chunk_size=128)
    plan = build(shape, "pipelined", "pairwise")
    cut = Cuts(plan).after_block(chunks // 2, layers // 2)
    stands = tuple(Stands(lanes, (False,) * len(lanes), lanes) for lanes in cut)
    return plan, Standing(stands, "paused", "", 0, "", ("cpu",) * ranks, (True,) * ranks, "run.resume()")  # type: ignore[arg-type]


def inspected() -> tuple[Want, Fetched]:
    """K of a layer of that many heads, tokens and dims."""
    shape = partition(layers=1, tokens=TOKENS, world_size=1, chunk_size=128)
    plan = build(shape, "pipelined", "pairwise")
    subject = Subject("this run", ("",), plan, tuple(range(TOKENS)), (), HEADS, DIMS, torch.float32, "")
    values = np.random.default_rng(0).standard_normal((HEADS, TOKENS, DIMS), np.float32)
    return Want("page", 0, 0, None, 0, 0, "a", "robust", ""), Fetched(subject, values, values)


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
      fire("msg:custom", { figure: { view, name, seen: counts["latency plot"], said: "", json: given.figure } }, []);
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
