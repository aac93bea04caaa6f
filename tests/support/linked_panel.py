"""The panel of a run of this process on a bare page: what the page asks the panel answers, without a notebook between
them. Not a test."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Callable
from typing import Any

from playwright.sync_api import Locator, Page

from dinfer.run.run import Run
from dinfer.views.panel.panel import Panel
from tests.support.panel_pages import SHOW

DEADLINE_S = 60.0
SET_CELLS = """(text) => {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  window.model.set("cells", new DataView(bytes.buffer));
}"""
TRAITS = ("shown", "marks", "log")


class HeardPanel(Panel):
    """A panel whose messages to browsers go to `outbox`."""

    def __init__(self, run: Run, outbox: Callable[[Any, Any], None]) -> None:
        self._outbox = outbox
        super().__init__(run)

    def send(self, content: Any, buffers: Any = None) -> None:
        self._outbox(content, buffers)


class LinkedPanel:
    """`pump` carries messages both ways; `wait` does so until something holds."""

    def __init__(self, page: Page, run: Run) -> None:
        self._lock, self._out, self._answered = threading.Lock(), list[Any](), 0
        self.page, self.run, self.panel = page, run, HeardPanel(run, self._send)
        self._seen = {name: getattr(self.panel, name) for name in TRAITS}
        self._cells = self.panel.cells
        traits = {**self._seen, "board": self.panel.board, "cells": encoded(self._cells), "selected": None}
        page.set_content('<div id="place"></div>')
        page.evaluate(SHOW, {"css": Panel._css, "script": Panel._esm, "traits": traits})
        self.root: Locator = page.locator(".dinfer-panel")

    def close(self) -> None:
        self.panel.close()

    def pump(self) -> None:
        """Carry what has been asked and answered since the last time."""
        messages = self.page.evaluate(f"window.sent.slice({self._answered})")
        self._answered += len(messages)
        for message in messages:
            self.panel._handle_custom_msg(message, [])
        with self._lock:
            out, self._out = self._out, []
        for content, buffers in out:
            self.page.evaluate("([content, texts]) => window.hear(content, ...texts)", [content, buffers])
        for name in TRAITS:
            now = getattr(self.panel, name)
            if now != self._seen[name]:
                self._seen[name] = now
                self.page.evaluate("([name, value]) => window.model.set(name, value)", [name, now])
        if self.panel.cells != self._cells:
            self._cells = self.panel.cells
            self.page.evaluate(SET_CELLS, encoded(self._cells))

    def wait(self, holds: Callable[[], object], what: str) -> None:
        """Carry messages until that holds."""
        deadline = time.monotonic() + DEADLINE_S
        while not holds():
            assert time.monotonic() < deadline, f"waited for: {what}"
            self.pump()
            self.page.wait_for_timeout(20)
        self.pump()

    def called(self, call: str) -> None:
        """Wait until that is shown as the last call, and nothing is at work."""

        def holds() -> bool:
            shown = self.panel.shown
            return shown["call"] == call and not shown["working"]

        self.wait(holds, f"{call} is done, not {self.panel.shown['call']}: {self.panel.shown['error']}")
        assert self.root.locator(".dinfer-last code").text_content() == call

    def says(self, place: Locator, text: str) -> None:
        """Wait until there is such a text."""
        self.wait(lambda: text in " ".join(place.all_text_contents()), f"{text!r} is shown")

    def _send(self, content: Any, buffers: Any = None) -> None:
        with self._lock:
            self._out.append((content, [encoded(bytes(one)) for one in buffers or ()]))


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()
