"""The panel on a bare page: no kernel, no notebook; what it shows is made here, at any size. Not a test."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from playwright.sync_api import Locator, Page

from dinfer.run.state import Mark
from dinfer.severity import Severity
from dinfer.views.bins import packed
from dinfer.views.cells import MARKS, STATES, CellStates, cut_line, marked
from dinfer.views.panel.communication import FIGURES
from dinfer.views.panel.panel import Panel

SHOW = """async (given) => {
  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const style = document.createElement("style");
  style.textContent = given.css;
  document.head.append(style);
  const values = { ...given.traits, cells: new DataView(bytes(given.traits.cells).buffer) }, handlers = {};
  const fire = (name, ...parts) => (handlers[name] ?? []).forEach((handler) => handler(...parts));
  window.sent = [];
  const view = (text) => new DataView(bytes(text).buffer);
  window.hear = (content, ...texts) => fire("msg:custom", content, texts.filter(Boolean).map(view));
  window.lose = () => fire("comm_live_update");
  window.model = {
    get: (name) => values[name],
    set: (name, value) => { values[name] = value; fire(`change:${name}`); },
    on: (name, handler) => (handlers[name] ??= []).push(handler),
    off: () => {},
    send: (message) => { window.sent.push(message); fire("msg:custom", { heard: message.id }, []); },
  };
  const module = await import(URL.createObjectURL(new Blob([given.script], { type: "text/javascript" })));
  module.default.render({ model: window.model, el: document.getElementById("place") });
}"""


class BarePanel:
    """The panel of `states` with these marks and breakpoints, [(layer or None, chunk or None), …]."""

    def __init__(
        self,
        page: Page,
        states: CellStates,
        marks: Sequence[Mark] = (),
        stops: Sequence[tuple[int | None, int | None]] = (),
        labels: str = "",
    ) -> None:
        layers, chunks, ranks = states.shape
        self.page, self.states = page, marked(states, marks)
        notes: dict[str, list[str]] = {}
        for mark in marks:
            notes.setdefault(f"{mark.layer} {mark.chunk}", []).append(mark.text)
        rank: dict[str, Any] = {
            **{"device": "cpu", "memory": "1.00 GiB", "about_memory": "", "tokens": 0, "state": "paused"},
            **{"done": 3, "total": 4, "where": "3 of 4 ops done; stands at c1 l2, next `layer c1 l3`"},
        }
        shown = {
            **dict.fromkeys(
                [
                    "message",
                    "nonfinite",
                    "text",
                    "verdict",
                    "over",
                    "playing",
                    "waiting",
                    "error",
                    "answer",
                    "remedy",
                    "mend",
                ],
                "",
            ),
            **dict.fromkeys(("severity", "state_severity", "error_severity", "answer_severity"), "note"),
            **{
                "state": "paused",
                "decoded": 0,
                "faults": [],
                "working": [],
                "done": 0,
                "call": "run.pause()",
            },
            **{"ranks": [rank] * ranks, "cut": cut_line(states)},
            "breakpoints": [
                {
                    "number": n,
                    "text": f"#{n}: after layer {layer}, chunk {chunk}",
                    "layer": layer,
                    "chunk": chunk,
                }
                | {"rank": None, "when": "", "plain": True}
                for n, (layer, chunk) in enumerate(stops, 1)
            ],
        }
        board = {
            **{"layers": layers, "ranks": ranks, "owners": [n * ranks // layers for n in range(layers)]},
            **{"chunks": [[16 * n, 16 * n + 16] for n in range(chunks)], "labels": [labels] * chunks},
            **{
                "severities": {level.word: level.icon for level in Severity},
                "states": list(STATES),
                "marks": list(MARKS),
                "figures": list(FIGURES),
            },
        }
        cells = base64.b64encode(packed(self.states)).decode()
        traits = {"board": board, "shown": shown, "cells": cells, "marks": notes, "selected": None}
        page.set_content("<!doctype html><div id=place></div>")
        page.evaluate(SHOW, {"script": Panel._esm, "css": Panel._css, "traits": traits})
        self.root = page.locator(".dinfer-panel")
        self.canvas = self.root.get_by_label("map of blocks")
        self.scope = self.root.locator(".dinfer-scope")
        self.block = self.root.locator(".dinfer-block")

    def geometry(self) -> dict[str, int]:
        """Where cells are, once they are drawn."""
        self.page.wait_for_selector(".dinfer-map canvas[data-geometry]")
        found: dict[str, int] = json.loads(self.canvas.get_attribute("data-geometry") or "")
        return found

    def drawn(self) -> CellStates:
        """The bytes of the cells on the canvas, [rows, columns, parts]."""
        shape = self.geometry()
        digits = self.canvas.get_attribute("data-cells") or ""
        found = np.frombuffer(bytes.fromhex(digits), np.uint8)
        return found.reshape(shape["rows"], shape["columns"], -1)

    def spot(self, layer: int, chunk: int, rank: int = 0) -> tuple[float, float]:
        """The middle of a rank's part of a block's cell."""
        at, (*_, ranks) = self.geometry(), self.states.shape
        part = (rank // at["perRank"] + 0.5) / -(-ranks // at["perRank"])
        column, row = (chunk - at["chunk"]) // at["perChunk"], (layer - at["layer"]) // at["perLayer"]
        return at["left"] + (column + part) * at["across"], at["top"] + (row + 0.5) * at["down"]

    def click(self, layer: int, chunk: int) -> None:
        x, y = self.spot(layer, chunk)
        self.canvas.click(position={"x": x, "y": y})

    def colours(self, layer: int, chunk: int, rank: int = 0) -> set[tuple[int, ...]]:
        """The colours on the canvas within four pixels of the middle of a part of a cell."""
        found: list[list[int]] = self.canvas.evaluate(
            """(canvas, [x, y]) => {
                const scale = window.devicePixelRatio, size = 9 * scale;
                const { data } = canvas.getContext("2d").getImageData((x - 4) * scale, (y - 4) * scale, size, size);
                return Array.from({ length: size * size }, (_, n) => [...data.slice(4 * n, 4 * n + 3)]);
            }""",
            self.spot(layer, chunk, rank),
        )
        return set(map(tuple, found))

    def of(self, name: str) -> tuple[int, ...]:
        """A colour of the panel's style."""
        text: str = self.root.evaluate(
            "(root, name) => getComputedStyle(root).getPropertyValue(`--dinfer-${name}`).trim()", name
        )
        return tuple(int(text[n : n + 2], 16) for n in (1, 3, 5))

    def sent(self, do: str) -> dict[str, Any]:
        """The newest message of that kind to the kernel, once there is one; it is forgotten then."""
        self.page.wait_for_function("(kind) => window.sent.some((one) => one.do === kind)", arg=do)
        found: dict[str, Any] = self.page.evaluate(
            """(kind) => {
                const found = window.sent.filter((one) => one.do === kind).at(-1);
                window.sent = window.sent.filter((one) => one.do !== kind);
                return found;
            }""",
            do,
        )
        return found

    def hear(self, content: dict[str, Any], codes: bytes = b"") -> None:
        """What the kernel answers."""
        given = [content, base64.b64encode(codes).decode()]
        self.page.evaluate("([content, codes]) => window.hear(content, codes)", given)

    @property
    def buttons(self) -> Locator:
        return self.scope.locator("button")
