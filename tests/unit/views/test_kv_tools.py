"""The tools of the KV page beside the run itself: what they say is what `run.kv` and `run.compare` say."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load

from dinfer.run.run import Run
from dinfer.session.session import Session
from dinfer.views.panel import kv_tools
from dinfer.views.panel.desk import VIEWS
from dinfer.views.panel.kv_tools import MOST_PINS, KvPin, KvTools, pins_of
from tests.support.doubles import PaperRun, paper_plan
from tests.support.runs import wait_for
from tests.support.saved_runs import DIMS, HEADS, LAYERS, PROMPT, TOKENS

MODEL = {"layers": LAYERS, "tokenizer": True}


class Asked:
    """What a browser asks and hears."""

    def __init__(self, run: Run | PaperRun) -> None:
        self.run, self.heard = run, list[tuple[dict[str, Any], list[bytes]]]()
        self.tools = KvTools(
            run, lambda content, buffers=(): self.heard.append((content["kv_tool"], buffers))
        )

    def ask(self, tool: str, **fields: Any) -> tuple[dict[str, Any], list[bytes]]:
        before = len(self.heard)
        self.tools.ask({"view": "me", "tool": tool, **fields})
        wait_for(lambda: len(self.heard) > before, "an answer")
        return self.heard[-1]


@pytest.fixture
def asked(session: Session) -> Iterator[Asked]:
    """Of a run whose rank 2 differs in two blocks, at its end."""
    run = session.prefill(PROMPT, chunk_size=8, paused=True)
    run.inject("bitflip", rank=2, layer=1, chunk=1, tensor="K", token=9, head=1, dim=3, where="memory")
    run.inject("bitflip", rank=2, layer=0, chunk=3, tensor="V", token=25, head=0, dim=5, where="memory")
    run.resume()
    run.wait(60)
    made = Asked(run)
    yield made
    made.tools.close()


def test_differences_follow_one_another_and_begin_anew(asked: Asked) -> None:
    run = asked.run
    assert isinstance(run, Run)
    expected = sorted(
        (one.layer, int(one.tensor == "V"), one.token, one.head, one.dim)
        for one in run.kv().diff().differences
    )
    assert len(expected) >= 2
    at, seen = None, []
    for _ in [*expected, None]:
        found, _ = asked.ask("difference", at=at, forward=True)
        assert (found["a"], found["b"]) == (run.plan.shape.owners[found["place"]["layer"]], 2)
        assert found["show"] == "a-b"
        place = found["place"]
        at = [place[name] for name in KvPin._fields]
        seen.append(tuple(at))
    assert seen == [*expected, expected[0]]
    found, _ = asked.ask("difference", at=at, forward=False)
    assert found["which"] == found["count"] == len(expected)


def test_a_change_that_was_passed_on_is_shown_by_its_values(session: Session) -> None:
    run = session.prefill(PROMPT, chunk_size=8, paused=True)
    run.inject("stale", rank=0, layer=0, chunk=1, tensor="V", where="memory")
    run.resume()
    run.wait(60)
    found, _ = Asked(run).ask("difference", at=None)
    assert (found["a"], found["show"], found["chunk"]) == (0, "a", 1)
    assert "stale" in found["text"]


def test_where_nothing_differs_it_says_so(session: Session) -> None:
    run = session.prefill(PROMPT, chunk_size=8)
    run.wait(60)
    found, _ = Asked(run).ask("difference", at=None)
    assert (found["severity"], "none" in found) == ("ok", True)
    assert "bit for bit" in found["none"]


def test_watched_values_are_those_of_each_rank_after_each_change(session: Session) -> None:
    run = session.prefill(PROMPT, chunk_size=8, paused=True)
    asked = Asked(run)
    forget = run.on_change(asked.tools.touch)
    found, _ = asked.ask("pins", pins=[[1, 0, 9, 1, 3]])
    assert found["values"] == [["not here"] * 3]
    run.run_to(chunk=1, layer=1)
    wait_for(lambda: "not here" not in asked.heard[-1][0]["values"][0], "values come")
    exact = float(run.kv(layer=1).k[1, 9][3])
    assert [float(text.replace("−", "-")) for text in asked.heard[-1][0]["values"][0]] == pytest.approx(
        [exact] * 3
    )
    forget()
    asked.tools.close()


def test_what_fails_while_values_are_watched_is_said_and_they_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    run = PaperRun(paper_plan())
    asked, values = Asked(run), KvTools._values

    def fail(_: object, __: KvPin) -> list[str]:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(KvTools, "_values", fail)
    found, _ = asked.ask("pins", pins=[[0, 0, 0, 0, 0]])
    assert (found["tool"], found["error"]) == ("pins", "the device is gone")
    monkeypatch.setattr(KvTools, "_values", values)
    asked.tools.touch()
    wait_for(lambda: "values" in asked.heard[-1][0], "values come")
    asked.tools.close()


def test_only_the_newest_pages_watch_values() -> None:
    asked = Asked(PaperRun(paper_plan()))
    for n in range(3 * VIEWS):
        asked.tools.ask({"tool": "pins", "view": str(n), "pins": []})
    assert list(asked.tools._pins) == [str(n) for n in range(2 * VIEWS, 3 * VIEWS)]
    asked.tools.close()


def test_heads_are_those_of_each_layer(asked: Asked) -> None:
    run = asked.run
    assert isinstance(run, Run)
    found, _ = asked.ask("heads", tensor="V", rank=1)
    assert found["fields"][0] == "absmax"
    rows = found["values"]["max"]
    assert (len(rows), len(rows[0])) == (LAYERS, HEADS)
    exact = run.kv(layer=2, rank=1).v[:]
    assert rows[2] == [float(head.max()) for head in exact]


def test_the_drift_is_that_of_the_comparison(asked: Asked) -> None:
    run = asked.run
    assert isinstance(run, Run)
    found, _ = asked.ask("drift")
    expected = {(row["layer"], row["chunk"]): row["K_share"] for row in run.compare("reference").rows}
    assert {(layer, chunk): k for layer, chunk, k, *_ in found["shares"]} == {
        place: share for place, share in expected.items() if place[0] < LAYERS
    }
    assert found["severity"] == "error"


def test_files_hold_the_values_of_the_rank(asked: Asked) -> None:
    run = asked.run
    assert isinstance(run, Run)
    kv = run.kv(layer=1, rank=2)
    found, buffers = asked.ask("export", form="safetensors", layer=1, rank=2)
    assert found["file"] == "kv-l1-rank2.safetensors"
    assert torch.equal(load(buffers[0])["k"], kv.k[:])
    found, buffers = asked.ask("export", form="csv", layer=1, rank=2)
    rows = list(csv.DictReader(io.StringIO(buffers[0].decode(), newline="")))
    assert len(rows) == 2 * HEADS * TOKENS
    assert float(rows[9][str(DIMS - 1)]) == float(kv.k[0, 9][DIMS - 1])


def test_what_is_too_large_for_a_browser_names_the_call(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_tools, "MOST_VALUES", 10)
    found, buffers = asked.ask("export", form="csv", layer=1, rank=0)
    assert 'run.kv(layer=1, rank=0).to_csv("kv.csv")' in found["error"]
    assert not buffers


def test_an_error_is_the_answer() -> None:
    asked = Asked(PaperRun(paper_plan()))
    for tool in ("difference", "heads", "drift", "export"):
        found, _ = asked.ask(tool)
        assert found["error"]
        assert found["severity"] in ("note", "warning", "error")
    asked.tools.ask({"view": "me", "tool": "another"})
    asked.tools.close()


def test_places_that_are_none_are_left_out() -> None:
    run = PaperRun(paper_plan())
    good = [0, 1, 2, 3, 4]
    wrong = [
        [0, 1, 2, 3],
        [9, 0, 0, 0, 0],
        [0, 2, 0, 0, 0],
        [-1, 0, 0, 0, 0],
        [0, 0, 1.5, 0, 0],
        [True, 0, 0, 0, 0],
        None,
    ]
    assert pins_of(run, [*wrong, good]) == [KvPin(*good)]
    assert pins_of(run, {"a": 1}) == []
    assert len(pins_of(run, [good] * 50)) == MOST_PINS
