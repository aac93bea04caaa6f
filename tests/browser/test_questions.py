"""The inspector in a page without a kernel: an answer that comes late is not taken for that of a newer question."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from playwright.sync_api import Page

from dinfer.bench.views import half_way, inspected
from dinfer.views.cells import CellMap
from dinfer.views.panel.communication import FIGURES
from dinfer.views.panel.inspector import Fetched, picture
from dinfer.views.panel.panel import Panel
from dinfer.views.status import layout, moment

pytestmark = pytest.mark.browser

PAGE = """async (given) => {
  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const values = { board: given.board, shown: given.shown, cells: new DataView(bytes(given.cells).buffer), marks: {} };
  const handlers = {}, asked = [];
  const model = {
    get: (name) => values[name], set: () => {}, off: () => {},
    on: (name, handler) => (handlers[name] ??= []).push(handler),
    send: (message) => message.do === "inspect" && asked.push(message),
  };
  const answer = ({ view, question, show }, stamp) => {
    const kv = { ...given.head, view, question, show, stamp };
    handlers["msg:custom"].forEach((handler) => handler({ kv }, [new DataView(bytes(given.codes).buffer)]));
  };
  const frame = () => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  const module = await import(URL.createObjectURL(new Blob([given.script], { type: "text/javascript" })));
  const place = document.getElementById("place");
  const close = module.default.render({ model, el: place });
  place.querySelector('[data-tab="KV"]').click();
  place.querySelector('[data-show="a-b"]').click();
  answer(asked[0], "1");
  await frame();
  const late = asked.length;
  answer(asked[1], "1");
  await frame();
  close();
  return { late, asked, scale: place.querySelector(".dinfer-scale").textContent };
}"""


def test_the_answer_to_an_older_question_leaves_the_newer_one_open(page: Page) -> None:
    plan, standing = half_way(4, 3, 2)
    shown, drawn, _ = moment(plan, CellMap(plan), standing)
    want, whole = inspected()
    head, codes = picture(want, Fetched(whole.subject, whole.a[:, :8], whole.b[:, :8]))
    beside = {"breakpoints": [], "working": [], "waiting": "", "error": "", "answer": "", "done": 0}
    beside |= {"error_severity": "note", "answer_severity": "note"}
    page.set_content("<div id=place></div>")
    found: dict[str, Any] = page.evaluate(
        PAGE,
        {
            "script": Panel._esm,
            "board": {**layout(plan, [""] * 3), "figures": list(FIGURES)},
            "shown": {**shown, **beside},
            "cells": base64.b64encode(drawn).decode(),
            "head": head,
            "codes": base64.b64encode(codes).decode(),
        },
    )
    first, second, third = found["asked"]
    assert found["late"] == 2  # as long as the newer question is open, nothing else is asked
    assert (first["show"], second["show"], second["have"]) == ("a", "a-b", "")
    assert first["question"] != second["question"] == third["question"]
    assert third["have"] == "1"
    assert "rank 0 − rank 0" in found["scale"]
