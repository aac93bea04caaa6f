"""The README as a package index shows it: relative links and pictures get the repository's public address.

A hook of hatch, named in pyproject.toml; the address comes from `[tool.dinfer] address` there, the one place where it
stands. While it is empty, links become their text and pictures are left out, so that nothing is broken.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_PICTURE = re.compile(r"!\[([^\]]*)\]\((?!https?:)([^)]+)\)")
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:)([^)]+)\)")


def for_index(text: str, address: str) -> str:
    """The README for an index. `address`: where the repository is on the web, as GitHub has it, or ""."""
    if not address:
        return re.sub(r"\n{3,}", "\n\n", _LINK.sub(r"\1", _PICTURE.sub("", text)))
    blob, raw = f"{address}/blob/main", f"{address}/raw/main"
    return _LINK.sub(rf"[\1]({blob}/\2)", _PICTURE.sub(rf"![\1]({raw}/\2)", text))


def urls_of(address: str) -> dict[str, str]:
    """What an index lists beside the README."""
    if not address:
        return {}
    changelog = f"{address}/blob/main/.github/CHANGELOG.md"
    return {"Source": address, "Changelog": changelog, "Issues": f"{address}/issues"}


class ReadmeHook(MetadataHookInterface):
    """Fills in `readme` and `urls`."""

    PLUGIN_NAME = "custom"

    def update(self, metadata: dict[str, Any]) -> None:
        root = Path(self.root)
        settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
        address = settings["tool"]["dinfer"]["address"].rstrip("/")
        text = for_index((root / "README.md").read_text(encoding="utf-8"), address)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        metadata["urls"] = urls_of(address)
