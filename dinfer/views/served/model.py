"""Model: the state and messages of one widget, for any number of browsers, as ipywidgets' own protocol has them.

ipywidgets sends through a `comm`; this is one whose other end is a websocket. A message is a JSON text that says how
many binary ones follow it.
"""

import json
from collections.abc import Callable, Sequence
from typing import Protocol

from ipywidgets import Widget

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

    def __init__(self, widget: Widget) -> None:
        self.comm_id: str = widget.model_id
        self._widget, self._on_message = widget, list[OnMessage]()
        self._browsers: tuple[WidgetBrowser, ...] = ()
        leads_elsewhere, widget.comm = widget.comm, self  # to a notebook, or nowhere without a kernel
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
        """A browser has come: it gets the whole state, and from then on what changes."""
        self._browsers = (*self._browsers, browser)
        self._widget.send_state([name for name in self._widget.keys if name not in STYLE])

    def leave(self, browser: WidgetBrowser) -> None:
        self._browsers = tuple(one for one in self._browsers if one is not browser)

    def receive(self, content: Json) -> None:
        """A message of a browser for the widget, which must not wait."""
        for callback in self._on_message:
            callback({"content": {"data": {"method": "custom", "content": content}}, "buffers": []})
