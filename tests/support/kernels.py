"""A Jupyter kernel as a notebook has it: cells are run, watched while they run, and interrupted. Not a test."""

from __future__ import annotations

import queue
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager

from tests.support.runs import DEADLINE_S

COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass
class Cell:
    """One cell's run: `text` is all that is shown under it, `error` the error's name and message, if any."""

    parent: str
    text: str = ""
    error: str = ""
    ended: float = 0.0
    """when the kernel was idle again, on the clock of `time.monotonic`"""
    html: list[str] = field(default_factory=list)

    def take(self, message: dict[str, Any]) -> None:
        """Keep what one message shows."""
        kind, content = message["msg_type"], message["content"]
        if kind == "stream":
            text = COLOURS.sub("", content["text"])
            self.text += text
            if text.startswith("UsageError: "):  # which IPython shows in place of an error's message
                self.error = text.strip()
        elif kind in ("execute_result", "display_data"):
            self.text += COLOURS.sub("", content["data"].get("text/plain", "")) + "\n"
            self.html += [shown for kind, shown in content["data"].items() if kind == "text/html"]
        elif kind == "error":
            self.error = f"{content['ename']}: {COLOURS.sub('', content['evalue'])}"
        elif kind == "status" and content["execution_state"] == "idle":
            self.ended = time.monotonic()


class Kernel:
    """A kernel that runs."""

    def __init__(self, manager: KernelManager, client: BlockingKernelClient) -> None:
        self._manager, self._client = manager, client

    def run(self, code: str) -> str:
        """Run a cell, which must not fail; what is shown under it."""
        cell = self.finish(self.begin(code))
        assert not cell.error, f"{code}\n{cell.text}\n{cell.error}"
        return cell.text

    def fail(self, code: str) -> str:
        """Run a cell, which must fail; what is shown, and the error."""
        cell = self.finish(self.begin(code))
        assert cell.error, f"{code}\n{cell.text}"
        return f"{cell.text}\n{cell.error}"

    def value(self, expression: str) -> Any:
        """A Python literal out of the kernel."""
        return eval(self.run(f"print(repr(({expression})), end='')"))

    def begin(self, code: str) -> Cell:
        """Send a cell."""
        return Cell(self._client.execute(code, stop_on_error=False))

    def finish(self, cell: Cell) -> Cell:
        """Wait until a cell has ended."""
        deadline = time.monotonic() + DEADLINE_S
        while not cell.ended:
            assert time.monotonic() < deadline, f"the cell has not ended:\n{cell.text}"
            self.look(cell)
        return cell

    def interrupt(self) -> None:
        """As the stop button does."""
        self._manager.interrupt_kernel()

    def restart(self, *, now: bool = False) -> None:
        """As the restart button does; `now`: as if it had been killed."""
        self._manager.restart_kernel(now=now)
        self._client.wait_for_ready(timeout=DEADLINE_S)

    def look(self, cell: Cell) -> None:
        """Take in what a cell shows, waiting a moment for it."""
        try:
            message = self._client.get_iopub_msg(timeout=0.1)
        except queue.Empty:
            return
        if message["parent_header"].get("msg_id") == cell.parent:
            cell.take(message)


@contextmanager
def kernel() -> Iterator[Kernel]:
    """Start one in this process's environment, and end it."""
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel()
    client = manager.blocking_client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=DEADLINE_S)
        yield Kernel(manager, client)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
        manager.cleanup_resources()
