"""The server of one panel: who may see it, what a browser is sent, and what it may say."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import quote

import pytest
from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest, HTTPResponse
from tornado.websocket import WebSocketClientConnection, websocket_connect

from dinfer.views.panel.panel import Panel
from dinfer.views.served.app import DeskServer, ServeError, is_anywhere, is_loopback
from dinfer.views.served.detached import DetachedDesk
from dinfer.views.served.model import Buffer, SocketComm
from tests.support.doubles import PaperRun, paper_plan
from tests.support.runs import wait_for


class Served:
    """A server in a loop of its own; `ask` and `talk` are what browsers do."""

    def __init__(self) -> None:
        self.run = PaperRun(paper_plan())
        self.browsers: list[WebSocketClientConnection] = []

    def within(self, looks: Callable[[], Awaitable[None]]) -> None:
        """Run this in a loop, and end what it began."""

        async def all_of_it() -> None:
            try:
                await looks()
            finally:
                for browser in self.browsers:
                    browser.close()
                    while await browser.read_message() is not None:
                        pass
                await self.server.close()

        asyncio.run(all_of_it())

    async def started(self) -> DeskServer:
        self.server = DeskServer(self.run, "<b>a run</b>")
        return self.server

    async def ask(self, path: str = "/", token: str | None = None, **headers: str) -> HTTPResponse:
        server = self.server
        given = server.token if token is None else token
        request = HTTPRequest(f"http://127.0.0.1:{server.port}{path}?token={given}", headers=headers)
        return await AsyncHTTPClient().fetch(request, raise_error=False)

    async def talk(self, token: str | None = None, **headers: str) -> WebSocketClientConnection:
        given = self.server.token if token is None else token
        address = f"ws://127.0.0.1:{self.server.port}/socket?token={given}"
        self.browsers.append(await websocket_connect(HTTPRequest(address, headers=headers)))
        return self.browsers[-1]


async def heard(browser: WebSocketClientConnection) -> tuple[dict[str, Any], list[bytes]]:
    """The next message, with what is binary of it."""
    text = await browser.read_message()
    assert isinstance(text, str)
    message = json.loads(text)
    parts = [await browser.read_message() for _ in range(message["buffers"])]
    assert all(isinstance(part, bytes) for part in parts)
    return message, parts  # type: ignore[return-value]


@pytest.fixture
def served() -> Served:
    return Served()


def test_without_the_token_there_is_nothing(served: Served) -> None:
    async def looks() -> None:
        await served.started()
        for path in ("/", "/desk.js", "/desk.css", "/socket"):
            for token in ("", "wrong", "é", served.server.token[:-1]):
                assert (await served.ask(path, token=quote(token))).code == 403
        for token in ("", "wrong"):
            with pytest.raises(HTTPClientError, match="403"):
                await served.talk(token=token)
        assert (await served.ask("/other")).code == 404

    served.within(looks)


def test_each_start_has_a_token_of_its_own(served: Served) -> None:
    async def looks() -> None:
        first = (await served.started()).token
        await served.server.close()
        assert (await served.started()).token != first

    served.within(looks)


def test_names_that_others_may_have_led_here_are_refused(served: Served) -> None:
    async def looks() -> None:
        port = (await served.started()).port
        for host in (
            "evil.example",
            f"evil.example:{port}",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "[::1",
        ):
            assert (await served.ask(Host=host)).code in (400, 403), host
        for host in (f"localhost:{port}", "127.0.0.1", "[::1]:80", f"LOCALHOST:{port}"):
            assert (await served.ask(Host=host)).code == 200, host
        with pytest.raises(HTTPClientError, match="403"):
            await served.talk(Origin="http://evil.example")

    served.within(looks)


def test_the_page_loads_nothing_from_elsewhere_and_tells_nobody_its_address(served: Served) -> None:
    async def looks() -> None:
        await served.started()
        page = await served.ask()
        text = page.body.decode()
        assert "&lt;b&gt;a run&lt;/b&gt;" in text
        assert "<b>" not in text
        assert "http" not in text
        assert page.headers["Referrer-Policy"] == "no-referrer"
        assert "default-src 'none'" in page.headers["Content-Security-Policy"]
        assert "Server" not in page.headers
        script = (await served.ask("/desk.js")).body.decode()
        assert "class SocketModel" in script
        assert ".dinfer-panel" in (await served.ask("/desk.css")).body.decode()

    served.within(looks)


def test_a_browser_gets_the_whole_state_and_then_what_changes(served: Served) -> None:
    async def looks() -> None:
        server = await served.started()
        browser = await served.talk()
        message, parts = await heard(browser)
        assert message["method"] == "update"
        assert message["buffer_paths"] == [["cells"]]
        assert parts == [server.panel.cells]
        assert message["state"]["board"] == server.panel.board
        assert "_esm" not in message["state"]
        served.run.step("layer")
        while message["state"].get("shown", {}).get("call") != 'run.step("layer")':
            message, _ = await heard(browser)

    served.within(looks)


def test_all_state_is_sent_by_one_thread_so_that_nothing_old_arrives_last() -> None:
    panel = Panel(PaperRun(paper_plan()))
    comm = SocketComm(panel)

    class Browser:
        def __init__(self) -> None:
            self.heard: list[dict[str, Any]] = []
            self.on = set[str]()

        def hear(self, text: str, buffers: Sequence[Buffer]) -> None:  # noqa: ARG002
            self.on.add(threading.current_thread().name)
            self.heard.append(json.loads(text)["state"])

    gone, stays, may_paint = Browser(), Browser(), threading.Event()
    panel.before_paint(lambda: wait_for(may_paint.is_set, "both have come"))
    comm.join(gone)
    comm.leave(gone)
    comm.join(stays)
    may_paint.set()
    wait_for(lambda: stays.heard, "a browser hears the state")
    panel.close()
    assert stays.heard[0].keys() >= {"board", "shown", "marks", "log"}
    assert stays.on == {"dinfer panel painter"}
    assert gone.heard == []


def test_a_browser_is_answered_and_what_is_no_message_ends_its_connection(served: Served) -> None:
    async def looks() -> None:
        await served.started()
        browser = await served.talk()
        await heard(browser)
        await browser.write_message(json.dumps({"id": "7", "do": "dismiss"}))
        message, _ = await heard(browser)
        while message["method"] != "custom":
            message, _ = await heard(browser)
        assert message["content"] == {"heard": "7"}
        for wrong in ("[1]", "{", "[" * 10_000, b"\xff"):
            other = await served.talk()
            await other.write_message(wrong, binary=isinstance(wrong, bytes))
            while await other.read_message() is not None:
                pass
            assert other.close_code == 1003
            served.browsers.remove(other)
            other.close()
        await browser.write_message(json.dumps({"id": "8", "do": "dismiss"}))
        while message["content"] != {"heard": "8"}:
            message, _ = await heard(browser)
            message.setdefault("content", {})

    served.within(looks)


def test_a_port_that_is_taken_is_named(served: Served) -> None:
    async def looks() -> None:
        port = (await served.started()).port
        with pytest.raises(
            ServeError, match=rf"127\.0\.0\.1 port {port} cannot be listened at .*another --port"
        ):
            DeskServer(served.run, "again", port=port)
        with pytest.raises(ServeError, match=r"no\.such\.host"):
            DeskServer(served.run, "again", host="no.such.host.invalid")

    served.within(looks)


@pytest.mark.parametrize(("host", "anywhere", "loopback"), [
    ("", True, False), ("0.0.0.0", True, False), ("::", True, False), ("127.0.0.1", False, True),
    ("::1", False, True), ("localhost", False, True), ("10.0.0.1", False, False), ("node7", False, False),
])  # fmt: skip
def test_where_it_listens(host: str, anywhere: bool, loopback: bool) -> None:
    assert (is_anywhere(host), is_loopback(host)) == (anywhere, loopback)


def test_a_live_run_is_moved_from_a_tab_of_its_own() -> None:
    run = PaperRun(paper_plan())

    async def moves(address: str) -> None:
        page, token = address.split("?")
        browser = await websocket_connect(f"{page.replace('http', 'ws')}socket?{token}")
        await browser.write_message(json.dumps({"id": "1", "do": "step", "unit": "layer"}))
        message: dict[str, Any] = {}
        while message.get("state", {}).get("shown", {}).get("call") != 'run.step("layer")':
            message, _ = await heard(browser)
        browser.close()
        while await browser.read_message() is not None:
            pass

    with DetachedDesk(run, "run") as desk:
        assert desk.address in str(desk)
        assert f'href="{desk.address}"' in desk._repr_html_()
        asyncio.run(moves(desk.address))
    assert run.calls == ['run.step("layer")']
    with pytest.raises(OSError):  # noqa: PT011 - refused: nobody listens any more
        asyncio.run(moves(desk.address))
    desk.close()
