"""The views tests: afterwards no thread of a panel is left."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tests.support.runs import wait_for


def panel_threads() -> list[str]:
    """Names of the threads that panels have now."""
    return [thread.name for thread in threading.enumerate() if "panel" in thread.name]


@pytest.fixture(autouse=True)
def no_panel_thread_is_left() -> Iterator[None]:
    """After every test the threads behind panels have ended."""
    yield
    wait_for(lambda: not panel_threads(), "threads of panels end", 10)
