"""`dinfer desk`: the panel of a saved run or a trace in a browser, read-only."""

import asyncio
import threading
import webbrowser
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from dinfer.cli.root import BAD_INPUT, app, log, stop
from dinfer.errors import DinferError
from dinfer.severity import Severity


@app.command()
def desk(
    path: Annotated[
        str,
        Argument(help="a folder of run.save(…) or of `dinfer run`, a report, or a trace of dinfer"),
    ],
    port: Annotated[int, Option(help="the port to listen at; 0: a free one", min=0, max=65535)] = 0,
    host: Annotated[
        str, Option(help="the address to listen at; 0.0.0.0: every network, for whoever has the token")
    ] = "127.0.0.1",
    browser: Annotated[bool, Option(help="open a browser")] = True,
) -> None:
    """Show a saved run or a trace in a browser: map, KV and communication as session.debugger() shows them, read-only.

    The printed address carries a token, without which nothing is shown. Ctrl-C ends it. Status 2: not a saved run or a
    trace, or no place to listen at.
    """
    from dinfer.saved.saved import open_saved
    from dinfer.views.read_only import ReadOnlyRun
    from dinfer.views.served.app import DeskServer, is_loopback, serve_forever

    async def serve() -> None:
        server = DeskServer(ReadOnlyRun(open_saved(path)), path, host, port)
        if not is_loopback(host):
            log(f"dinfer: {Severity.WARNING.marked(NOT_ENCRYPTED)}")
        print(f"dinfer desk: {server.address}  (Ctrl-C ends it)", flush=True)
        if browser:
            threading.Thread(target=open_page, args=(server.address,), daemon=True).start()
        try:
            await serve_forever()
        finally:
            await server.close()

    try:
        asyncio.run(serve())
    except KeyboardInterrupt:
        log("")
    except DinferError as error:
        stop(error, BAD_INPUT)


IN_TERMINALS = ("www-browser", "links", "elinks", "lynx", "w3m")
"""browsers that take the terminal, in which the desk says its address"""


def open_page(address: str) -> None:
    """Open a page in the user's browser, if it has a window. May wait for the browser."""
    with suppress(webbrowser.Error):  # there is none
        browser = webbrowser.get()
        if Path(getattr(browser, "name", "")).name not in IN_TERMINALS:
            browser.open(address)


NOT_ENCRYPTED = (
    "other machines reach this desk, and what it sends is not encrypted: whoever reads the network sees the run. "
    "Without --host only this machine does; `ssh -L` brings it to another."
)
