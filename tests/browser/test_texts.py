"""Texts under a cell of JupyterLab, whose own style breaks them anywhere."""

from __future__ import annotations

import pytest

from tests.browser.conftest import OpenNotebook

pytestmark = pytest.mark.browser

WORDS = "block c2 l1, " * 60
CELLS = [f"from dinfer.results import Where\nWhere('paused', {WORDS!r})", f"print({WORDS!r})"]
BROKEN_WORDS = """
pre => {
    const text = document.createTreeWalker(pre, NodeFilter.SHOW_TEXT), broken = [];
    for (let node = text.nextNode(); node; node = text.nextNode())
        for (const word of node.data.matchAll(/\\S+/g)) {
            const range = document.createRange();
            range.setStart(node, word.index);
            range.setEnd(node, word.index + word[0].length);
            if (range.getClientRects().length > 1) broken.push(word[0]);
        }
    return broken;
}
"""


def test_long_lines_break_between_words(notebook: OpenNotebook) -> None:
    book = notebook(CELLS)
    book.page.set_viewport_size({"width": 700, "height": 800})
    for cell in range(2):
        book.run(cell)
    said, printed = (book.output(cell).locator("pre").last for cell in range(2))
    assert printed.evaluate(BROKEN_WORDS), "printed text breaks inside words: else this test shows nothing"
    assert said.evaluate(BROKEN_WORDS) == []
    assert said.evaluate("pre => pre.getClientRects()[0].height > 40")
