"""App: a server of one panel, for browsers of whoever has its token; on this machine alone, unless told otherwise.

Who may see it: every address carries the token, a random one for each start. Pages of other names cannot reach it: a
request must name an address, this machine, or the host that was asked for (so no name of somebody else's that leads
here: DNS rebinding), and a websocket must come from a page of its own.
"""

import asyncio
import hmac
import logging
import secrets
import socket
from collections.abc import Sequence
from html import escape
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from tornado.escape import json_decode
from tornado.httpserver import HTTPServer
from tornado.ioloop import IOLoop
from tornado.web import Application, HTTPError, RequestHandler
from tornado.websocket import WebSocketClosedError, WebSocketHandler

from dinfer.errors import DinferError
from dinfer.views.panel.panel import SCRIPTS, Panel
from dinfer.views.panel.slotted import texts_of
from dinfer.views.protocol import InspectableRun
from dinfer.views.served.model import Buffer, SocketComm

LOOPBACK = "127.0.0.1"

MOST_MESSAGE = 1 << 16
"""bytes of a browser's message; the longest say which picture to show"""

POLICY = (
    # plotly's script is made into a function: see communication.js
    "default-src 'none'; script-src 'self' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; img-src data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def _read(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


class ServeError(DinferError, ValueError):
    """The desk cannot be served there; the message says what to do."""


class DeskServer:
    """Serves the panel of a run at `address`, until `close()`. `port`: 0 for a free one. Raises ServeError where it
    cannot listen."""

    def __init__(self, run: InspectableRun, title: str, host: str = LOOPBACK, port: int = 0) -> None:
        self.host, self.token = host, secrets.token_urlsafe(24)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listening = socket.create_server((host, port), family=family)
        except (OSError, UnicodeError) as error:
            raise ServeError(
                f"{host} port {port} cannot be listened at ({error}): give another --port, or none for a free one."
            ) from None
        listening.setblocking(False)
        self.port: int = listening.getsockname()[1]
        self.panel = Panel(run)
        self.comm = SocketComm(self.panel)
        page = _read("page.html")
        texts = {
            "/": ("text/html", page.format(title=escape(title), token=self.token)),
            "/desk.js": ("text/javascript", f"{texts_of(SCRIPTS)}\n{_read('page.js')}"),
            "/desk.css": (
                "text/css",
                f"{self.panel._css}\n{_read('page.css')}",
            ),
        }
        handlers = [(path, TextHandler, {"server": self, "text": text}) for path, text in texts.items()]
        app = Application(
            [*handlers, ("/socket", SocketHandler, {"server": self})],
            log_function=lambda _: None, websocket_max_message_size=MOST_MESSAGE,
        )  # fmt: skip
        # Wrong requests are answered with their status; a line of log for each would only hide the address.
        logging.getLogger("tornado.general").setLevel(logging.ERROR)
        self._http = HTTPServer(app, max_buffer_size=1 << 20, max_body_size=MOST_MESSAGE)
        self._http.add_socket(listening)

    @property
    def address(self) -> str:
        """What to open in a browser; whoever has it may look."""
        name = self.host or socket.gethostname()
        if is_anywhere(name):
            name = socket.gethostname()
        name = f"[{name}]" if ":" in name else name
        return f"http://{name}:{self.port}/?token={self.token}"

    def allows(self, host_header: str) -> bool:
        """Whether a request may name this host."""
        try:
            name = (urlsplit(f"//{host_header}").hostname or "").rstrip(".")
        except ValueError:  # brackets that are not closed
            return False
        return name in ("localhost", self.host.lower(), socket.gethostname().lower()) or _is_address(name)

    async def close(self) -> None:
        """End all connections."""
        self._http.stop()
        await self._http.close_all_connections()
        self.panel.close()


def is_anywhere(host: str) -> bool:
    """Whether that address is of all of this machine's networks."""
    return host == "" or (_is_address(host) and ip_address(host).is_unspecified)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches that host."""
    return host == "localhost" or (_is_address(host) and ip_address(host).is_loopback)


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


class GuardedHandler(RequestHandler):
    """Refuses, with status 403, a request without the token or of another host's name."""

    def initialize(self, server: DeskServer, text: tuple[str, str] = ("", "")) -> None:
        self.server, self.text = server, text

    def prepare(self) -> None:
        given = self.get_query_argument("token", "")
        if not self.server.allows(self.request.host):
            raise HTTPError(403, reason="Forbidden: this host name is not the server's")
        if not hmac.compare_digest(given.encode(), self.server.token.encode()):
            raise HTTPError(403, reason="Forbidden: the address that dinfer desk printed has the token")

    def set_default_headers(self) -> None:
        self.clear_header("Server")
        for name, value in {
            "Content-Security-Policy": POLICY,
            "Referrer-Policy": "no-referrer",  # the address has the token
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-store",
        }.items():
            self.set_header(name, value)

    def write_error(self, status_code: int, **_: object) -> None:
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.finish(f"{status_code} {self._reason}\n")


class TextHandler(GuardedHandler):
    """The page, its script, its style."""

    def get(self) -> None:
        kind, text = self.text
        self.set_header("Content-Type", f"{kind}; charset=utf-8")
        self.write(text)


class SocketHandler(GuardedHandler, WebSocketHandler):
    """One browser's connection with the panel. tornado refuses pages of another origin."""

    def open(self, *_: str, **__: str) -> None:
        self._loop = IOLoop.current()
        self.server.comm.join(self)

    def on_message(self, message: str | bytes) -> None:
        try:
            content = json_decode(message)
        except (ValueError, RecursionError):
            content = None
        if isinstance(content, dict):
            self.server.comm.receive(content)
        else:
            self.close(1003, "messages are JSON objects")

    def on_close(self) -> None:
        self.server.comm.leave(self)

    def hear(self, text: str, buffers: Sequence[Buffer]) -> None:
        self._loop.add_callback(self._write, text, [bytes(buffer) for buffer in buffers])

    def _write(self, text: str, buffers: Sequence[bytes]) -> None:
        try:
            self.write_message(text)
            for buffer in buffers:
                self.write_message(buffer, binary=True)
        except WebSocketClosedError:  # `on_close` follows
            pass


async def serve_forever() -> None:
    """Until the task is cancelled, as asyncio.run does at Ctrl-C."""
    await asyncio.Event().wait()
