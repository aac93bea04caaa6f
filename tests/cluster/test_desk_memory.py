"""The desk for as long as DINFER_SOAK_S says: runs come and go on three ranks while a panel is asked for its pages of
runs, time, find and KV, and runs are bisected; the kernel's memory comes to a level."""

from __future__ import annotations

import gc
import os
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from dinfer.run.run import Run
from dinfer.session.session import Session
from dinfer.views.panel.panel import Panel
from tests.support.linked_panel import HeardPanel
from tests.support.runs import wait_for
from tests.support.twin import prompt

SECONDS = float(os.environ.get("DINFER_SOAK_S", "120"))
pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(4 * SECONDS + 300)]

MODEL = {"layers": 6}
SEED = 18
LEAST_ROUNDS = 6
MAY_GROW_MB = 25.0
"""of the median round of the last third beside that of the middle third: for caches of other things, as in
tests/browser/test_soak"""

QUERIES = ("slowest", "slow link", "late", "l3 c1", "recv kv", "0>1", "differs", "rank 2", "waiting")


class AskedPanel:
    """A panel of a run, and what it has answered: as a browser, which keeps the newest answer of each kind."""

    def __init__(self, run: Run) -> None:
        self.run, self._number = run, 0
        self._answers: dict[str, Any] = {}
        self.panel: Panel = HeardPanel(run, self._hear)

    def _hear(self, content: Any, _: Any) -> None:
        self._answers.update(content)

    def ask(self, key: str, **message: Any) -> Any:
        """The answer to a message, under its key."""
        self._number += 1
        self._answers.pop(key, None)
        self.panel._on_message(
            None, {"id": self._number, "number": self._number, "view": "soak", **message}, []
        )
        wait_for(lambda: key in self._answers, f"{message} is answered")
        return self._answers[key]


def pages(asked: AskedPanel, chosen: random.Random, names: list[str]) -> Iterator[Callable[[], object]]:
    """What a user looks at in one run."""
    for query in chosen.sample(QUERIES, 4):
        yield lambda query=query: asked.ask("found", do="find", query=query)  # type: ignore[misc]
    span = asked.ask("time", do="time", bins=800).get("span", 0)
    for _ in range(6):
        at, begin, end = (chosen.randrange(span + 1) for _ in range(3))
        question = {"at": at, "bins": 800, "rank": chosen.randrange(3), "stretch": sorted((begin, end))}
        yield lambda question=question: asked.ask("time", do="time", **question)  # type: ignore[misc]
    yield lambda: asked.ask("runs", do="runs")
    if len(names) > 1:
        yield lambda: asked.ask("compared", do="compare_runs", names=chosen.sample(names, 2))
    for tool in ("difference", "heads", "drift"):
        yield lambda tool=tool: asked.ask("kv_tool", do="kv_tool", tool=tool, tensor="K", rank=1)  # type: ignore[misc]
    for layer in chosen.sample(range(6), 2):
        question = {"layer": layer, "tensor": "K", "a": 1, "b": 0, "show": "a-b"}
        yield lambda question=question: asked.ask("kv", do="inspect", **question)  # type: ignore[misc]
    yield lambda: asked.ask("cell", do="cell")


def round_of(session: Session, chosen: random.Random) -> None:
    """A run that is stepped, stopped, perhaps made wrong, run to its end, looked at from all sides, and bisected."""
    run = session.prefill(
        tuple(prompt(40 + chosen.randrange(3))), paused=True, chunk_size=8, max_new_tokens=4
    )
    if is_wrong := chosen.random() < 0.5:
        run.inject("bitflip", rank=2, layer=chosen.randrange(1, 6), chunk=1, tensor="V", bit=29)
    run.break_at(layer=chosen.randrange(6), hit=chosen.randrange(1, 4))
    asked = AskedPanel(run)
    try:
        run.step("layer")
        run.resume()
        run.wait(120)
        names = [one.name for one in session.runs]
        for look in pages(asked, chosen, names):
            look()
        run.undo()
        run.step_back("chunk")
        run.breakpoints.clear()
        run.resume()
        run.wait(120)
        for look in pages(asked, chosen, names):
            look()
        answer = run.bisect()
        assert answer.found or not is_wrong
        if not is_wrong:  # else ranks may choose different tokens, which ends the run
            run.decode(2)
    finally:
        asked.panel.close()


def test_kernel_memory_comes_to_a_level_while_runs_come_and_go(session: Session) -> None:
    chosen, began = random.Random(SEED), time.monotonic()
    curve: list[tuple[float, float]] = []
    while time.monotonic() - began < SECONDS or len(curve) < LEAST_ROUNDS:
        round_of(session, chosen)
        gc.collect()
        rss = psutil.Process().memory_info().rss / 1e6
        curve.append((time.monotonic() - began, rss))
        print(f"{curve[-1][0]:.0f} s, round {len(curve)}: {rss:.0f} MB", flush=True)
    third = max(1, len(curve) // 3)
    first, last = (
        sorted(rss for _, rss in part)[third // 2] for part in (curve[third : 2 * third], curve[-third:])
    )
    assert last - first <= MAY_GROW_MB, curve
