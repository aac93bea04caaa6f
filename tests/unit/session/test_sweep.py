"""Sweeps on threads: every combination is a row, also one that cannot be; an interrupt keeps what there is."""

from __future__ import annotations

import re
from typing import Any

import pytest

from dinfer.errors import NotPossible
from dinfer.session.session import Session
from dinfer.session.sweep import ABOUT, SWEEP_FIGURES, Sweep

PROMPTS = ["The code of Lima is 471. The code of Lima is", "The code of Oslo is 306. The code of Oslo is"]


MODEL = "demo"
RANKS = 2


def test_every_combination_is_a_row(session: Session) -> None:
    sweep = session.sweep(PROMPTS, sync_strategy=["pairwise", "ring"], chunk_size=[8, 16], max_new_tokens=3)
    named = [(row["prompt"], row["sync_strategy"], row["chunk_size"]) for row in sweep.rows]
    assert named == [
        (text, way, size) for text in PROMPTS for way in ("pairwise", "ring") for size in (8, 16)
    ]
    assert all(row["kv_equal"] and row["prefill_s"] > 0 and not row["error"] for row in sweep.rows)
    for text, answer in zip(PROMPTS, ("471", "306"), strict=True):
        assert {row["text"].strip()[:3] for row in sweep.rows if row["prompt"] == text} == {answer}
    lines = str(sweep).splitlines()
    assert len(lines) == 10
    assert "= 100 %" in lines[-1]
    for row in sweep.rows:
        parts = [row[name] for name in ("compute", "exposed_wire", "exposed_wait", "bubble")]
        assert sum(parts) == pytest.approx(1)
        assert all(part >= 0 for part in parts)
    bars = sweep.plot().figure.data
    for n, row in enumerate(sweep.rows):
        assert sum(bar.x[n] for bar in bars) == pytest.approx(row["prefill_s"])
        assert bars[0].y[n].endswith(f"{row['sync_strategy']}, {row['chunk_size']}")
    assert lines[0].split() == [
        "prompt",
        "sync_strategy",
        "chunk_size",
        "max_new_tokens",
        *SWEEP_FIGURES[:-1],
    ]


def test_a_run_that_cannot_be_is_a_row_that_says_why(session: Session) -> None:
    sweep = session.sweep(PROMPTS[:1], schedule=["pipelined", "batched"], chunk_size=8, max_new_tokens=1)
    good, refused = sweep.rows
    assert (good["error"], good["kv_equal"]) == ("", True)
    assert "rank 0 sends" in refused["error"]
    assert refused["kv_equal"] is None
    assert list(good) == list(refused)
    assert "–" in str(sweep)


def test_an_interrupt_keeps_what_has_been_measured(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Any] = []
    prefill = session.prefill

    def interrupted(*given: Any, **chosen: Any) -> Any:
        begun.append(chosen)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return prefill(*given, **chosen)

    monkeypatch.setattr(session, "prefill", interrupted)
    sweep = session.sweep(PROMPTS, chunk_size=[8, 16], max_new_tokens=1)
    assert (len(sweep.rows), sweep.left) == (1, 3)
    assert str(sweep).endswith("interrupted: 3 more runs were not begun")
    assert "3 more runs" in sweep._repr_html_()


# -- as a table


def row(prompt: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "sync_strategy": "ring", "prefill_s": 0.123456, **more}


def test_one_prompt_stands_above_the_table() -> None:
    text = str(Sweep((row("of Lima", chunk_size=8), row("of Lima", chunk_size=16))))
    above, *table = text.splitlines()
    assert above == "prompt: of Lima"
    assert [line.split() for line in table] == [
        ["sync_strategy", "prefill_s", "chunk_size"],
        ["ring", "0.1235", "8"],
        ["ring", "0.1235", "16"],
    ]


def test_several_prompts_have_a_column() -> None:
    text = str(Sweep((row("of Lima"), row("of\n  Oslo"))))
    assert [re.split("  +", line) for line in text.splitlines()] == [
        ["prompt", "sync_strategy", "prefill_s"],
        ["of Lima", "ring", "0.1235"],
        ["of Oslo", "ring", "0.1235"],
    ]


def test_a_prompt_stays_text() -> None:
    for rows in ((row("<script>"),), (row("<script>"), row("<b>"))):
        html = Sweep(rows)._repr_html_()
        assert "&lt;script&gt;" in html
        assert "<script>" not in html
        assert "<th>sync_strategy</th>" in html


def test_nothing_to_run() -> None:
    assert str(Sweep(())) == "no runs"


def test_a_dataframe_is_made_of_the_rows() -> None:
    found = Sweep(({"prompt": "a", "prefill_s": 0.25},)).dataframe()
    assert (list(found.columns), found.values.tolist()) == (["prompt", "prefill_s"], [["a", 0.25]])
    assert "prefill_s" in Sweep(()).to_frame().columns


def test_a_sweep_of_which_no_run_has_ended_says_why_nothing_is_drawn() -> None:
    refused = {"prompt": "a", "tokens": None, "prefill_s": None, "error": "no"}
    with pytest.raises(NotPossible, match="no run of this sweep has ended"):
        Sweep((refused,)).plot()


def test_what_columns_mean_stands_at_their_names() -> None:
    html = Sweep((row("a"),))._repr_html_()
    assert f'<th title="{ABOUT["prefill_s"]}">prefill_s</th>' in html
