"""README and guide as their readers see them: code blocks by language, and the cells of pages that are notebooks."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "notebooks" / "guide"
PAGES = [ROOT / "README.md", ROOT / "notebooks" / "zh" / "README.md", *sorted(GUIDE.glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language, as it is written after the backticks."""
    pattern = rf"^```{re.escape(language)}\n(.*?)^```$"
    return re.findall(pattern, page.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def cells(page: Path) -> list[str]:
    """The code cells of a page that is a notebook."""
    return blocks(page, "{code-cell} ipython3")
