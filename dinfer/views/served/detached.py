"""DetachedDesk: the panel of a run of this process in a browser's tab of its own, as large as its window."""

import asyncio
import threading
from concurrent.futures import Future
from html import escape

from dinfer.display import Closing, Displayable
from dinfer.views.protocol import InspectableRun
from dinfer.views.served.app import DeskServer


class DetachedDesk(Closing, Displayable):
    """What `session.debugger(detached=True)` returns: an `address` for browsers of this machine, which answers, also
    while cells run, until `close()` or the end of the kernel. Whoever has the address may move the run."""

    def __init__(self, run: InspectableRun, title: str) -> None:
        begun: Future[str] = Future()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._serve(run, title, begun)),
            name="dinfer detached desk",
            daemon=True,
        )
        self._thread.start()
        self.address = begun.result()

    def close(self) -> None:
        """End it; the run goes on."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._ended.set)
            self._thread.join()

    def __str__(self) -> str:
        return f"the panel in a tab of its own: {self.address}"

    def _repr_html_(self) -> str:
        address = escape(self.address)
        return f'the panel in a tab of its own: <a href="{address}" target="_blank" rel="noreferrer">open</a>'

    async def _serve(self, run: InspectableRun, title: str, begun: "Future[str]") -> None:
        self._loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        try:
            server = DeskServer(run, title)
        except BaseException as error:  # raised where the desk is made
            begun.set_exception(error)
            return
        begun.set_result(server.address)
        try:
            await self._ended.wait()
        finally:
            await server.close()
