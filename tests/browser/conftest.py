"""What the browser tests share: one Chromium, one JupyterLab, one kernel, and notebooks opened in them.

`notebook([cell, …])` opens a notebook of these cells; `shot(name)` keeps a picture of the page in the folder that
DINFER_SCREENSHOTS names, or in the test's own.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Error,
    Page,
    Playwright,
    expect,
    sync_playwright,
)

import dinfer
from dinfer.session.session import Session
from tests.support.ipclusters import ipython
from tests.support.jupyter import Lab, Notebook, open_notebook
from tests.support.runs import DEADLINE_S, wait_for

expect.set_options(timeout=DEADLINE_S * 1000)
ARGUMENTS = [
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
STARTING = "Cannot read properties of undefined (reading 'schema')"
"""Notebook 7.6 says so of itself at each start: its shortcuts hear of others' settings before they have their own"""


class OpenNotebook(Protocol):
    """Opens a notebook of these cells, with the kernel that notebooks share, or with a `fresh` one."""

    def __call__(self, cells: list[str], *, fresh: bool = False) -> Notebook: ...


Shot = Callable[[str], Path]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A Chromium without a window. Skips where there is none."""
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=_chromium(playwright), args=ARGUMENTS)
        yield made
        made.close()


def _chromium(playwright: Playwright) -> str:
    own = playwright.chromium.executable_path
    found = shutil.which("chromium") or (own if Path(own).exists() else None)
    if not found:
        pytest.skip("no Chromium: install the package chromium, or run `playwright install chromium`")
    return found


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    """Three ranks on threads with the demo loaded, and with views, which the other tests' sessions lack."""
    with dinfer.connect("threads", n=3) as session:
        yield session.load("demo", threads=1)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A JupyterLab server."""
    made = Lab(tmp_path_factory.mktemp("lab"))
    yield made
    made.close()


@pytest.fixture
def ipcluster(lab: Lab) -> Iterator[None]:
    """`ipcluster start -n 3`, in the folder that the lab's kernels use."""
    folder = lab.home / "ipython"
    folder.mkdir(exist_ok=True)
    with ipython(folder) as place:
        begun = place.profile_dir / "security" / "cluster-.json"
        begun.unlink(missing_ok=True)  # of the cluster of a test before this one
        process = place.ipcluster(3)
        wait_for(lambda: begun.exists() or process.poll(), "ipcluster has begun")
        yield


@pytest.fixture(scope="session")
def context(browser: Browser) -> Iterator[BrowserContext]:
    """What pages have in common: the scripts of JupyterLab, which take seconds to fetch and compile."""
    made = browser.new_context(viewport={"width": 1280, "height": 800})
    made.set_default_timeout(DEADLINE_S * 1000)
    yield made
    made.close()


@pytest.fixture
def page(context: BrowserContext) -> Iterator[Page]:
    """A page of 1280 × 800. An exception in its scripts fails the test."""
    page = context.new_page()
    errors: list[str] = []

    def on_error(error: Error) -> None:
        if not (STARTING in str(error) and "/static/notebook/notebook_core" in (error.stack or "")):
            errors.append(f"{error}\n{error.stack}")

    page.on("pageerror", on_error)
    yield page
    page.close()
    assert not errors, errors


@pytest.fixture
def console_errors(page: Page) -> list[str]:
    """What the page's console has said of errors, with where."""
    said: list[str] = []

    def on_console(message: ConsoleMessage) -> None:
        if message.type == "error":
            said.append(f"{message.text} {message.location}")

    page.on("console", on_console)
    return said


@pytest.fixture
def notebook(page: Page, lab: Lab, request: pytest.FixtureRequest) -> Iterator[OpenNotebook]:
    """Opens notebooks."""
    sharing: list[Notebook] = []

    def opened(cells: list[str], *, fresh: bool = False) -> Notebook:
        name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)
        book = open_notebook(page, lab, name, cells, fresh=fresh)
        sharing.extend([] if fresh else [book])
        return book

    yield opened
    try:
        for book in sharing:
            book.clean_up()
    except Error:  # a test that fails may leave page and kernel in any state
        lab.leave_kernel()


@pytest.fixture
def screenshots(tmp_path: Path) -> Path:
    """Where pictures are kept."""
    folder = Path(os.environ.get("DINFER_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def shot(page: Page, screenshots: Path) -> Shot:
    """Takes pictures of the page."""

    def taken(name: str) -> Path:
        path = screenshots / f"{name}.png"
        page.screenshot(path=path)
        return path

    return taken
