"""env/oldest.txt, with which `env/test --oldest` runs, and what pyproject.toml promises are the same versions."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_oldest_versions_are_those_that_are_promised() -> None:
    promised = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    pinned = re.findall(
        r"^([\w-]+)==([\d.]+)$", (ROOT / "env" / "oldest.txt").read_text("utf-8"), re.MULTILINE
    )
    oldest = dict(entry.split(">=") for entry in promised)
    assert [name for name, _ in pinned] == sorted(oldest)
    for name, version in pinned:
        assert f"{version}.".startswith(f"{oldest[name]}."), name
