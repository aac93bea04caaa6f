"""Checks the relative links of README, guide and notebooks without a network: the file is there, and so is the heading.

`python env/docs/links.py` prints what is broken, one a line; its exit status says whether anything is.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", ".github/*.md", "notebooks/**/*.md", "notebooks/**/*.ipynb")
GENERATED = {"cli.md", "api.md"}
"""pages whose headings are made when the site is built"""
_FENCE = re.compile(r"^(```+|~~~+).*?^\1\s*$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`[^`\n]*`")
_LINK = re.compile(r"\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")
_HEADING = re.compile(r"^#{1,6}\s+(.*?)\s*#*$", re.MULTILINE)


def slug(heading: str) -> str:
    """The anchor that GitHub and the site give a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    """Every heading's anchor; a notebook's also as Jupyter makes them."""
    headings = _HEADING.findall(_FENCE.sub("", text_of(page)))
    jupyter = {heading.replace(" ", "-") for heading in headings} if page.suffix == ".ipynb" else set()
    return {slug(heading) for heading in headings} | jupyter


def text_of(page: Path) -> str:
    """A page's Markdown: all of it, or a notebook's cells of text."""
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".ipynb":
        return text
    cells = json.loads(text)["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def broken(page: Path) -> Iterator[str]:
    """What is wrong with each of a page's relative links."""
    for target in _LINK.findall(_CODE.sub("", _FENCE.sub("", text_of(page)))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        found = (page.parent / path).resolve() if path else page
        if not found.exists():
            yield f"there is no file {path}"
        elif not found.is_relative_to(ROOT):
            yield f"{path} is outside the repository"
        elif anchor and found.name not in GENERATED and anchor not in anchors(found):
            yield f"{path or 'this page'} has no heading #{anchor}"


def main() -> int:
    """Look through all pages."""
    pages = sorted({page for pattern in PAGES for page in ROOT.glob(pattern)})
    found = [f"{page.relative_to(ROOT)}: {text}" for page in pages for text in broken(page)]
    print("\n".join(found), end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
