"""`dinfer bench session` and `bench views --engines` as people start them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.ipclusters import ipython

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(400)]


def test_it_measures_and_leaves_nothing(tmp_path: Path) -> None:
    with ipython(tmp_path) as place:
        process = place.start("-m", "dinfer", "bench", "session", "--repeats", "1", "--json", "figures.json")
        assert process.wait(300) == 0, place.output(process)
        assert "from kill to report: " in place.output(process)
        figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
        assert figures["events"]["heard"] == figures["events"]["ops"] > 100
        assert figures["recording"]["layer"] > 0 < figures["step"]["ratio"]
        assert len(figures["death"]["seconds"]) == 1
        assert place.members() == []


def test_the_inspector_is_timed_on_engines_that_are_gone_afterwards(tmp_path: Path) -> None:
    with ipython(tmp_path) as place:
        command = ("bench", "views", "--engines", "--repeats", "1", "--json", "figures.json")
        process = place.start("-m", "dinfer", *command)
        assert process.wait(300) == 0, place.output(process)
        assert "from one of three engines: " in place.output(process)
        fetch = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))["fetch"]
        assert fetch["bytes"] == 8 * 2048 * 128 * 4
        assert place.members() == []
