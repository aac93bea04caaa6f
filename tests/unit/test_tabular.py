"""What is a table or a figure can be had as a DataFrame and as CSV, with all of its numbers."""

from __future__ import annotations

import csv
import importlib
import io
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import dinfer
from dinfer.display import Composed, Table
from dinfer.errors import NotPossible
from dinfer.kv.view import KV
from dinfer.plan.ops import PlanError
from dinfer.run.run import Run
from dinfer.session.session import Session
from dinfer.tabular import Tabular
from dinfer.views.figures.plots import PLOTS, plot
from tests.support.saved_runs import DIMS, HEADS, LAYERS, TOKENS, done
from tests.support.traces import on_paper

MODEL = {"layers": LAYERS, "tokenizer": True}


@pytest.fixture
def run(session: Session) -> Run:
    return done(session)


def read(table: Tabular) -> list[dict[str, str]]:
    """The CSV, as another program reads it."""
    text = table.to_csv()
    assert isinstance(text, str)
    return list(csv.DictReader(io.StringIO(text, newline="")))


def kinds(found: type[Any]) -> Iterator[type[Any]]:
    for one in found.__subclasses__():
        yield one
        yield from kinds(one)


def test_all_that_is_shown_as_a_table_is_one() -> None:
    for module in pkgutil.walk_packages(dinfer.__path__, "dinfer."):
        # Triton's, programs, and an old name of a module
        if not module.name.endswith(("device_code", "__main__", "session.application")):
            importlib.import_module(module.name)
    composed = [one for one in kinds(Composed) if one.__module__.startswith("dinfer.")]
    assert composed
    assert [one.__name__ for one in composed if not issubclass(one, Tabular)] == []


def test_a_column_of_numbers_is_one_of_numbers() -> None:
    table = Table(
        ("name", "count", "s", "share", "mixed", "none"),
        [("a", "1,024", "−0.5", "3 %", "1", ""), ("b,\n", "2", "1e-3", "4 %", "x", "–")],
        shown=1,
    )
    frame = table.to_frame()
    assert frame["count"].tolist() == [1024, 2]
    assert frame["s"].tolist() == [-0.5, 0.001]
    assert frame["share"].tolist() == ["3 %", "4 %"]
    assert frame["mixed"].tolist() == ["1", "x"]
    assert frame["none"].tolist() == ["", "–"]
    assert [row["name"] for row in read(table)] == ["a", "b,\n"]
    with_gap = Table(("rank", "s"), [(0, "1.5"), (1, ""), (2, "nan")]).to_frame()
    assert with_gap["s"].isna().tolist() == [False, True, True]
    assert Table(("a", "b"), []).to_csv() == "a,b\r\n"


def test_a_file_is_written_and_its_folder_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "table.csv"
    written = Table(("a",), [("中文",)]).to_csv(path)
    assert written == path
    assert pandas.read_csv(path)["a"].tolist() == ["中文"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="is no folder"):
        Table(("a",), [(1,)]).to_csv(tmp_path / "file" / "table.csv")


def test_without_pandas_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(NotPossible, match="pip install pandas"):
        Table(("a",), [(1,)]).to_frame()


def test_a_trace_has_a_row_for_each_event(run: Run) -> None:
    trace = run.trace
    frame = trace.to_frame()
    assert len(frame) == len(trace.events)
    assert "call" not in frame.columns
    event = trace.events[3]
    assert (frame["kind"][3], frame["end"][3]) == (event.kind, event.end)


def test_values_of_kv_come_back_exactly(run: Run, tmp_path: Path) -> None:
    kv = run.kv(layer=1, rank=2)
    frame = kv.to_frame()
    assert len(frame) == 2 * HEADS * TOKENS
    one = frame[(frame["tensor"] == "V") & (frame["head"] == 1) & (frame["token"] == 7)].iloc[0]
    exact = kv.v[1, 7]
    assert torch.equal(torch.tensor([one[str(dim)] for dim in range(DIMS)], dtype=exact.dtype), exact)
    assert one["text"] == run.source().subject.texts[7]
    found = load_file(kv.to_safetensors(tmp_path / "kv.safetensors"))
    assert torch.equal(found["k"], kv.k[:])
    assert torch.equal(found["v"], kv.v[:])
    part = run.kv(layer=1, chunk=1).k
    assert torch.equal(load_file(part.to_safetensors(tmp_path / "k.safetensors"))["k"], part[:])
    with safe_open(tmp_path / "k.safetensors", framework="pt") as file:
        opened: Any = file
        assert opened.metadata()["tokens"] == "8:16"
        assert opened.metadata()["layer"] == "1"
    assert [row["token"] for row in read(part)][:2] == ["8", "9"]


def test_all_layers_are_no_one_table(run: Run) -> None:
    kv = run.kv()
    assert isinstance(kv, KV)
    with pytest.raises(PlanError, match="name a layer"):
        kv.to_csv()


def test_hidden_states_and_attention_weights(run: Run) -> None:
    hidden = run.hidden(chunk=1, layer=2).to_frame()
    assert hidden["token"].tolist() == list(range(8, 16))
    attention = run.attention(layer=1, chunk=0, head=0)
    frame = attention.to_frame()
    assert len(frame) == attention.weights.numel()
    first = frame[(frame["query"] == 7) & (frame["key"] == 3)]["weight"].item()
    assert first == attention.weights[0, 7, 3].item()


def test_a_diff_has_both_values(session: Session) -> None:
    run = session.prefill("Lima 是秘鲁的首都, isn't it so?", chunk_size=8, paused=True)
    run.inject("bitflip", rank=2, layer=1, chunk=1, where="memory")
    run.resume()
    run.wait(60)
    diff = run.kv(layer=1).diff()
    row = read(diff)[0]
    first = diff.first
    assert first is not None
    assert first.values is not None
    assert (float(row["value"]), float(row["expected"])) == first.values
    assert (row["rank"], row["layer"], row["token"]) == ("2", "1", str(first.token))
    comparison = run.compare("reference")
    assert [float(row["K"] or 0) for row in read(comparison)] == [row["K"] or 0 for row in comparison.rows]
    assert read(run.kv(layer=0).diff()) == []


@pytest.mark.parametrize("name", [name for name in PLOTS if name != "sweep"])
def test_each_figure_has_what_it_is_drawn_from(name: str) -> None:
    figure = plot(name, on_paper(6, 4))
    frame = figure.to_frame()
    drawn = sum(
        max((len(line[at]) for at in ("x", "y") if line[at] is not None), default=0)
        for line in figure.figure.data
        if line.type != "heatmap"
    )
    maps = sum(len(line.z) * len(line.z[0]) for line in figure.figure.data if line.type == "heatmap")
    assert len(frame) == drawn + maps > 0
    assert frame.columns[0] == "series"
