"""Why a run hangs, on a page without a kernel: the picture, a fold for each rank, links to the source, the remedy."""

from __future__ import annotations

import re
from typing import Literal

import pytest
from playwright.sync_api import Page, expect

from dinfer.run.state import RECOVER
from dinfer.verdict.verdict import Verdict
from dinfer.verdict.waits import Node, Wait
from dinfer.views.panel.why import explained
from tests.browser.conftest import Shot
from tests.support.maps import half_done
from tests.support.panel_pages import BarePanel

pytestmark = pytest.mark.browser

STACK = """rank {0} main:
  File "/home/ann/work/my code/infer.py", line 31, in exchange
    dist.recv(hidden, source)
  File "/usr/lib/python3.11/threading.py", line 1002, in _bootstrap
    self._bootstrap_inner()
"""
SENTENCE = (
    "deadlock: rank 0 waits for rank 1 to take block c0 l0; rank 1 waits for rank 2; rank 2 waits for rank 0"
)


def deadlock() -> Verdict:
    nodes = [Node(rank, 0) for rank in range(3)]
    waits = {}
    for n, node in enumerate(nodes):
        other, what = (n + 1) % 3, f"block c0 l{2 * n}"
        waits[node] = Wait(node, f"waits for rank {other} to take {what}", 2.5, (nodes[other],), what=what)
    lines = tuple(f"rank {node.rank}: {wait.text}, for 2.5 s" for node, wait in waits.items())
    stacks = {rank: STACK.format(rank) for rank in range(3)}
    return Verdict("cycle", SENTENCE, (0, 1, 2), None, (), (), lines, waits, stacks)


class HungPanel:
    """The panel of a run that hangs, and the kernel's answer."""

    def __init__(self, page: Page) -> None:
        self.panel = BarePanel(page, half_done(6, 4, 3))
        self.page, self.root = page, self.panel.root
        page.evaluate(
            """(given) => window.model.set("shown", { ...window.model.get("shown"), ...given })""",
            {
                **{"state": "hung", "state_severity": "error", "severity": "error", "message": SENTENCE},
                **{
                    "verdict": f"{SENTENCE}\n  rank 0: waits",
                    "remedy": RECOVER,
                    "mend": "recover and restart",
                },
            },
        )
        asked = self.panel.sent("explain")
        self.panel.hear(
            {
                "why": {
                    **explained(deadlock()),
                    "view": asked["view"],
                    "have": asked["have"],
                    "home": "/home/ann",
                }
            }
        )
        self.why = self.root.locator(".dinfer-why")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_hang_is_drawn_with_its_cycle_and_a_fold_for_each_rank(
    page: Page, shot: Shot, scheme: Literal["light", "dark"]
) -> None:
    page.emulate_media(color_scheme=scheme)
    hung = HungPanel(page)
    expect(hung.why.locator("svg rect")).to_have_count(3)
    expect(hung.why.locator("svg path[marker-end]")).to_have_count(3)
    expect(hung.why.locator("details[data-rank]")).to_have_count(3)
    expect(hung.why).not_to_contain_text("_bootstrap")
    link = hung.why.locator("details[data-rank='1'] a")
    expect(link).to_have_text("infer.py:31")
    expect(link).to_have_attribute("href", "vscode://file/home/ann/work/my%20code/infer.py:31")
    shot(f"why-{scheme}")
    hung.root.get_by_role("button", name="recover and restart").click()
    assert hung.panel.sent("mend")["do"] == "mend"


def test_a_file_under_jupyters_folder_opens_there(page: Page) -> None:
    page.goto("about:blank")
    hung = HungPanel(page)
    expect(hung.why.locator("svg")).to_be_visible()
    config = '{"baseUrl": "/user/ann/", "serverRoot": "~/work", "appName": "JupyterLab"}'
    page.evaluate(
        """(config) => {
            const node = document.createElement("script");
            Object.assign(node, { id: "jupyter-config-data", type: "application/json", textContent: config });
            document.body.append(node);
            window.model.set("shown", { ...window.model.get("shown"), verdict: "another" });
        }""",
        config,
    )
    asked = hung.panel.sent("explain")
    hung.panel.hear(
        {"why": {**explained(deadlock()), "view": asked["view"], "have": asked["have"], "home": "/home/ann"}}
    )
    links = hung.why.locator("details[data-rank='0'] a")
    expect(links).to_have_count(2)
    expect(links.nth(0)).to_have_attribute("href", "/user/ann/lab/tree/my%20code/infer.py")
    expect(links.nth(1)).to_have_attribute("href", re.compile("^vscode://file/home/ann/work/.*:31$"))
    expect(hung.why.locator("details[data-rank='0'] li").first).to_contain_text(
        "infer.py:31 (opens the file; at the line: VS Code) in exchange"
    )


def test_it_goes_once_the_run_goes_on(page: Page) -> None:
    hung = HungPanel(page)
    expect(hung.why).to_be_visible()
    page.evaluate(
        """() => {
            const shown = window.model.get("shown");
            window.model.set("shown", { ...shown, state: "running", verdict: "", remedy: "" });
        }"""
    )
    expect(hung.why).to_be_hidden()
