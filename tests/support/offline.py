"""A file as a person opens it in a browser without any network, and what the browser had to say. Not a test."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from playwright.sync_api import Browser, Page, Request, Route

from tests.support.runs import DEADLINE_S, wait_for


@dataclass
class Opened:
    """A report on a page, and what the browser had to say."""

    page: Page
    path: Path
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def settle(self) -> None:
        """Wait until no figure is being drawn."""
        self.until("document.body.dataset.busy === 'false'")

    def until(self, expression: str) -> None:
        """Wait until that holds on the page. Playwright's own way has the page evaluate text: refused."""
        wait_for(lambda: bool(self.page.evaluate(expression)), expression)

    def read_through(self) -> None:
        """Scroll from top to bottom, as a reader does, until every figure is drawn."""
        figures = self.page.locator(".drawn")
        for number in range(figures.count()):
            figures.nth(number).scroll_into_view_if_needed()
            self.until(f"document.body.dataset.drawn > {number}")
        self.settle()

    def is_clean(self) -> None:
        """Fails where anything was asked for but the file itself, or the console has spoken."""
        assert self.asked == [self.path.as_uri()]
        assert self.said == []


def open_offline(browser: Browser, path: Path, scheme: Literal["light", "dark"] = "light") -> Opened:
    """The report, in a context of its own that is offline and refuses every request but the file."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, color_scheme=scheme, offline=True)
    context.set_default_timeout(DEADLINE_S * 1000)
    found = Opened(context.new_page(), path)

    def on_request(route: Route, request: Request) -> None:
        found.asked.append(request.url)
        if request.url == path.as_uri():
            route.continue_()
        else:
            route.abort()

    context.route("**/*", on_request)
    found.page.on("console", lambda message: found.said.append(message.text))
    found.page.on("pageerror", lambda error: found.said.append(str(error)))
    found.page.goto(path.as_uri())
    found.settle()
    return found
