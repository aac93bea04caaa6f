"""Model: the state and messages of one widget, for any number of browsers, as ipywidgets' own protocol has them.

ipywidgets sends through a `comm`; this is one whose other end is a websocket. A message is a JSON text that says how
many binary ones follow it.
"""

import json
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from dinfer.views.panel.panel import Panel
from dinfer.views.protocol import Json

OnMessage = Callable[[Json], object]

Buffer = bytes | bytearray | memoryview

STYLE = ("_esm", "_css", "_anywidget_id")
"""traits that a page gets as its script and style"""


class WidgetBrowser(Protocol):
    """A browser. `hear` may be called on any thread."""

    def hear(self, text: str, buffers: Sequence[Buffer]) -> None: ...


class SocketComm:
    """See `comm.base_comm.BaseComm`, of which this is what a widget uses."""

    def __init__(self, panel: Panel) -> None:
        self.comm_id: str = panel.model_id
        self._panel, self._on_message = panel, list[OnMessage]()
        self._lock = threading.Lock()
        self._coming: tuple[WidgetBrowser, ...] = ()
        """browsers without a state yet"""
        self._browsers: tuple[WidgetBrowser, ...] = ()
        leads_elsewhere, panel.comm = panel.comm, self  # to a notebook, or nowhere without a kernel
        leads_elsewhere.close()

    # -- the widget's end

    def on_msg(self, callback: OnMessage) -> None:
        self._on_message.append(callback)

    def send(self, data: Json, metadata: object = None, buffers: Sequence[Buffer] | None = None) -> None:  # noqa: ARG002
        """To all browsers, from any thread."""
        text = json.dumps({**data, "buffers": len(buffers or ())})
        for browser in self._browsers:
            browser.hear(text, buffers or ())

    def close(self, *_: object, **__: object) -> None:
        """The widget was closed; browsers see that when the server ends."""
        self._browsers = ()

    # -- the browsers' end

    def join(self, browser: WidgetBrowser) -> None:
        """A browser has come: it gets the whole state soon, and from then on what changes, all from one thread, so that
        nothing old arrives last."""
        with self._lock:
            self._coming = (*self._coming, browser)
        self._panel.before_paint(partial(self._welcome, browser))

    def leave(self, browser: WidgetBrowser) -> None:
        with self._lock:
            self._coming = _without(browser, self._coming)
            self._browsers = _without(browser, self._browsers)

    def receive(self, content: Json) -> None:
        """A message of a browser for the widget, which must not wait."""
        for callback in self._on_message:
            callback({"content": {"data": {"method": "custom", "content": content}}, "buffers": []})

    def _welcome(self, browser: WidgetBrowser) -> None:
        with self._lock:
            if browser not in self._coming:  # it has left again
                return
            self._coming = _without(browser, self._coming)
            self._browsers = (*self._browsers, browser)
        self._panel.send_state([name for name in self._panel.keys if name not in STYLE])


def _without(browser: WidgetBrowser, browsers: tuple[WidgetBrowser, ...]) -> tuple[WidgetBrowser, ...]:
    return tuple(one for one in browsers if one is not browser)
