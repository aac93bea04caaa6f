"""The inspector beside the run itself: what it shows is what `run.kv` says; it asks ranks only for what is new."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinfer.run.run import Run
from dinfer.run.state import State
from dinfer.session.session import Session
from dinfer.views.panel import inspector
from dinfer.views.panel.inspector import Inspector, window
from dinfer.views.panel.quantise import MISSING, ZERO
from tests.support.runs import wait_for
from tests.support.traces import PROMPT

MODEL = "demo"


class Browser:
    """What a browser would ask and hear."""

    def __init__(self, run: Run) -> None:
        self.run, self.heard = run, list[tuple[Any, Any]]()
        self.inspector = Inspector(run, lambda content, buffers=None: self.heard.append((content, buffers)))
        run.on_change(self.inspector.touch)

    def ask(self, have: str = "", **fields: Any) -> None:
        self.verdicts = len(self.of("kv_diff"))
        want = {"layer": 3, "tensor": "K", "head": None, "a": 0, "b": 2, "show": "a", "scale": "full"}
        self.inspector.ask({"view": "me", "have": have, **want, **fields})

    def of(self, kind: str) -> list[tuple[Any, Any]]:
        return [(content[kind], buffers) for content, buffers in self.heard if kind in content]

    def picture(self, have: str = "", **fields: Any) -> tuple[dict[str, Any], np.ndarray[Any, Any]]:
        """The next picture, as [heads, tokens, dims]."""
        before = len(self.of("kv"))
        self.ask(have, **fields)
        wait_for(lambda: len(self.of("kv")) > before, "a picture")
        head, buffers = self.of("kv")[-1]
        shape = (len(head["heads"]), head["tokens"], head["dims"])
        return head, np.frombuffer(buffers[0], np.uint8).reshape(shape)

    def verdict(self) -> str:
        """What comparing the ranks says after what was asked for last."""
        wait_for(lambda: len(self.of("kv_diff")) > self.verdicts, "a verdict")
        return str(self.of("kv_diff")[-1][0]["text"])

    def value(self, head: int, token: int, dim: int) -> dict[str, Any]:
        self.inspector.value({"view": "me", "head": head, "token": token, "dim": dim})
        found: dict[str, Any] = self.of("value")[-1][0]
        return found


@pytest.fixture
def browser(session: Session) -> Iterator[Browser]:
    made = Browser(session.prefill(PROMPT, chunk_size=4, paused=True))
    yield made
    made.inspector.close()


def test_a_picture_is_of_what_the_rank_holds_and_values_are_exact(browser: Browser) -> None:
    browser.run.run_to(chunk=2, layer=5)
    head, codes = browser.picture()
    k = browser.run.kv(layer=3, rank=0).k[:].numpy()
    assert codes.shape == k.shape
    read_back = (codes.astype(float) - ZERO) / 125 * head["top"]
    assert np.abs(read_back - k).max() <= head["top"] / 125 * 0.51
    assert head["call"] == "run.kv(layer=3, rank=0).k[:, :]"
    value = browser.value(1, 5, 7)
    assert np.float32(value["a"].replace("−", "-")) == k[1, 5, 7]
    assert (value["b"], value["difference"]) == (value["a"], "0")
    assert value["text"].strip() == "4"


def test_a_difference_is_seen_marked_and_told(browser: Browser) -> None:
    browser.run.run_to(chunk=2, layer=5)
    browser.run.inject("bitflip", rank=2, layer=3, chunk=1, head=0, token=5, dim=7, where="memory")
    head, codes = browser.picture(show="a-b")
    assert np.argwhere(codes != ZERO).tolist() == [[0, 5, 7]]
    assert head["differ"] == 1
    assert browser.verdict().startswith("rank 2 differs at layer 3, K, head 0, token 5")
    marks = [
        (mark.rank, mark.chunk, mark.layer) for mark in browser.run.standing().marks if mark.kind == "differs"
    ]
    assert marks == [(2, 1, 3)]
    assert browser.picture(show="a-b", b=1)[0]["differ"] == 0


def test_what_is_not_there_yet_is_said_so(browser: Browser) -> None:
    head, codes = browser.picture()
    assert (head["tokens"], codes.size) == (0, 0)
    assert "no block is on" in browser.verdict()
    browser.run.step("op")  # embeds
    browser.run.step("op")
    browser.run.step("op", 2)
    head, codes = browser.picture(layer=0, show="b")
    assert head["held"][0] >= head["held"][1]
    assert browser.value(0, 0, 0)["a"] != "not here"
    head, codes = browser.picture(layer=0, show="a-b")
    assert np.all(codes[:, head["held"][1] :] == MISSING)


def test_nan_is_marked(browser: Browser) -> None:
    browser.run.run_to(chunk=1, layer=5)
    browser.run.inject("nan", rank=0, layer=3, chunk=1, head=1, token=6, dim=2, where="memory")
    head, _ = browser.picture(head=1)
    assert (head["nan"], head["special"], head["heads"]) == (1, [[1, 6, 2]], [1])
    assert browser.value(1, 6, 2)["a"] == "nan"


def test_it_is_answered_once_there_is_something_new_and_fetches_only_that(
    browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    browser.run.run_to(chunk=1, layer=5)
    head, _ = browser.picture()
    fetched = list[int]()
    source = browser.run._inspector.live

    def counted() -> Any:
        live = source()
        part = live.part
        live.part = lambda rank, layer, tensor, heads, places: (  # type: ignore[method-assign]
            fetched.extend(places) or part(rank, layer, tensor, heads, places)  # type: ignore[func-returns-value]
        )
        return live

    monkeypatch.setattr(browser.run._inspector, "live", counted)
    before = len(browser.of("kv"))
    browser.ask(head["stamp"])
    browser.run.run_to(chunk=2, layer=5)
    wait_for(lambda: len(browser.of("kv")) > before, "the next picture comes by itself")
    assert browser.of("kv")[-1][0]["tokens"] == 12
    assert fetched == [8, 9, 10, 11]
    browser.picture(a=2)
    assert fetched == [8, 9, 10, 11]  # rank 2 holds the same bytes


def test_nothing_is_fetched_while_the_run_moves(browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    moving = browser.run.standing()._replace(state=State.RUNNING)
    looked = list[str]()

    def standing() -> Any:
        looked.append("now")
        return moving

    with monkeypatch.context() as patched:
        patched.setattr(browser.run, "standing", standing)
        browser.ask()
        wait_for(lambda: len(looked) > 2, "it has looked")
        assert browser.heard == []
    browser.inspector.touch()
    wait_for(lambda: bool(browser.of("kv")), "a picture comes once the run stands")


def test_an_error_is_told(browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(**_: object) -> None:
        raise RuntimeError("rank 1 is gone: its KV is lost")

    monkeypatch.setattr(browser.run, "kv", lost)
    browser.ask()
    wait_for(lambda: bool(browser.of("kv")), "an answer")
    assert browser.of("kv")[0][0]["error"] == "rank 1 is gone: its KV is lost"


def test_answers_bear_the_number_of_their_question(browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    browser.run.run_to(chunk=1, layer=5)
    assert browser.picture(question=7)[0]["question"] == 7
    browser.verdict()
    assert browser.of("kv_diff")[-1][0]["question"] == 7

    def lost(**_: object) -> None:
        raise RuntimeError("rank 1 is gone")

    monkeypatch.setattr(browser.run, "kv", lost)
    before = len(browser.of("kv"))
    browser.ask(question=8)
    wait_for(lambda: len(browser.of("kv")) > before, "an answer")
    assert browser.of("kv")[-1][0]["question"] == 8


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(0, 60), st.data())
def test_a_window_has_its_chunk_and_as_many_around_it_as_fit(
    sizes: list[int], tokens: int, data: st.DataObject
) -> None:
    ends = list(accumulate(sizes))
    spans = [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    chunk = data.draw(st.integers(0, len(spans) - 1))
    found = window(spans, chunk, tokens)
    size = sum(sizes[found.start : found.stop])
    assert chunk in found
    assert size <= tokens or len(found) == 1
    for beside in (found.start - 1, found.stop):
        assert not 0 <= beside < len(spans) or size + sizes[beside] > tokens


def test_of_a_long_prompt_the_chunks_around_the_wanted_one_are_seen(
    browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    browser.run.run_to(chunk=5, layer=5)
    browser.run.inject("bitflip", rank=2, layer=3, chunk=4, head=0, token=17, dim=7, where="memory")
    whole = browser.run.kv(layer=3, rank=0).k[:].numpy()
    assert browser.picture()[0]["seen"] is None
    heads, _, dims = whole.shape
    monkeypatch.setattr(inspector, "VALUES", 12 * heads * dims)
    head, codes = browser.picture(chunk=4, show="a-b")
    assert (head["first"], head["seen"], head["held"]) == (12, [12, 24], [24, 24])
    assert np.argwhere(codes != ZERO).tolist() == [[0, 17 - 12, 7]]
    assert head["call"].startswith("run.kv(layer=3, rank=0).k[:, 12:24] - ")
    value = browser.value(0, 17, 7)
    assert np.float32(value["a"].replace("−", "-")) == whole[0, 17, 7]
    assert value["difference"] != "0"
    assert browser.value(0, 3, 7)["a"] == "not here"
    head, codes = browser.picture(chunk=0, show="a-b")
    assert (head["seen"], set(codes.flatten())) == ([0, 12], {ZERO})
    assert browser.verdict().startswith("rank 2 differs at layer 3, K, head 0, token 17")
