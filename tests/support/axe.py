"""What axe-core finds wrong with a page for people who use a keyboard or a screen reader, or see little contrast. Not a
test."""

from __future__ import annotations

from importlib.resources import files

from playwright.sync_api import Page

SCRIPT = files("axe_playwright_python") / "axe.min.js"

LEVELS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]


def violations(page: Page, within: str = "body") -> list[str]:
    """A line for each rule that is broken, with the first elements that break it."""
    page.evaluate(SCRIPT.read_text(encoding="utf-8"))
    found = page.evaluate("([within, levels]) => axe.run(within, { runOnly: levels })", [within, LEVELS])[
        "violations"
    ]
    return [
        f"{one['id']} ({one['help']}): {[node['html'][:160] for node in one['nodes'][:3]]}" for one in found
    ]
