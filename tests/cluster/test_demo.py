"""What `env/demo` does after set-up: JupyterLab on the walkthrough, or its execution; and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.ipclusters import marked
from tests.support.runs import MARK, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
URL = re.compile(r"(http://127\.0\.0\.1:\d+/)lab/tree/(\S+\.ipynb)\?token=(\w+)")


class Demo:
    """A demo that runs, and all its processes."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.mark = uuid.uuid4().hex
        environment = {**os.environ, MARK: self.mark, "TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}
        environment.pop("DISPLAY", None)
        self.said = folder / "said.txt"
        with self.said.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "env" / "demo.py"), *flags],
                stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
            )  # fmt: skip

    @property
    def text(self) -> str:
        """What it has said so far."""
        return self.said.read_text(encoding="utf-8")

    def url(self) -> tuple[str, str, str]:
        """Where JupyterLab is, which notebook it opens, and the token, once it says so."""
        wait_for(lambda: URL.search(self.text) or self.process.poll() is not None, "it says its URL")
        found = URL.search(self.text)
        assert found, self.text
        return found[1], found[2], found[3]

    def is_gone(self) -> bool:
        """Whether nothing of it runs."""
        return not marked(self.mark)

    def end(self) -> None:
        """Kill what is left, process by process."""
        for process in marked(self.mark):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


@pytest.fixture
def demos() -> Iterator[list[Demo]]:
    """What a test starts."""
    started: list[Demo] = []
    yield started
    for demo in started:
        demo.end()


def asked(url: str, token: str, data: dict[str, Any] | None = None) -> Any:
    """The server's answer."""
    request = urllib.request.Request(url, None if data is None else json.dumps(data).encode())
    request.add_header("Authorization", f"token {token}")
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_jupyterlab_opens_the_walkthrough_and_nothing_of_it_stays(
    number: signal.Signals, demos: list[Demo], tmp_path: Path
) -> None:
    demos.append(demo := Demo(tmp_path))
    url, notebook, token = demo.url()
    page = asked(f"{url}api/contents/{notebook}", token)
    assert page["content"]["cells"][0]["source"].startswith("# dinfer in five minutes")
    asked(f"{url}api/kernels", token, {"name": "python3"})
    commands = "\n".join(" ".join(process.cmdline()) for process in marked(demo.mark))
    for part in ("jupyterlab", "ipykernel_launcher", "ipyparallel.controller"):
        assert part in commands
    demo.process.send_signal(number)
    assert demo.process.wait(60) == 130
    wait_for(demo.is_gone, "nothing of it runs")


def test_it_runs_without_a_browser_and_says_where_its_report_is(demos: list[Demo], tmp_path: Path) -> None:
    demos.append(demo := Demo(tmp_path, "--headless", "--chinese"))
    assert demo.process.wait(280) == 0, demo.text
    assert "五分钟认识 dinfer" in demo.text
    places = dict(re.findall(r"^(notebook|report): +(\S+)$", demo.text, re.MULTILINE))
    assert "759" in Path(places["notebook"]).read_text(encoding="utf-8")
    assert Path(places["report"]).read_text(encoding="utf-8").startswith("<!doctype html>")
    wait_for(demo.is_gone, "nothing of it runs")


@pytest.mark.slow
def test_an_interruption_while_engines_start_leaves_nothing(demos: list[Demo], tmp_path: Path) -> None:
    demos.append(demo := Demo(tmp_path, "--headless"))
    wait_for(lambda: "starting 3 engines" in demo.text and len(marked(demo.mark)) > 1, "it has begun")
    demo.process.send_signal(signal.SIGTERM)
    assert demo.process.wait(60) == 130
    wait_for(demo.is_gone, "nothing of it runs")


def test_sigint_ends_one_that_a_script_started_in_the_background(demos: list[Demo], tmp_path: Path) -> None:
    """A shell without job control has what it starts with `&` ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        demos.append(demo := Demo(tmp_path, "--headless"))
    finally:
        signal.signal(signal.SIGINT, before)
    wait_for(lambda: "starting 3 engines" in demo.text and len(marked(demo.mark)) > 1, "it has begun")
    demo.process.send_signal(signal.SIGINT)
    assert demo.process.wait(60) == 130
    wait_for(demo.is_gone, "nothing of it runs")
