"""A sweep as a table: what all runs share stands above, everything is escaped."""

from __future__ import annotations

from typing import Any

from dinfer.session.runs.sweep import Sweep


def row(prompt: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "sync_strategy": "ring", "prefill_s": 0.123456, **more}


def test_one_prompt_stands_above_the_table() -> None:
    text = str(Sweep((row("of Lima", chunk_size=8), row("of Lima", chunk_size=16))))
    assert text.splitlines() == [
        "prompt: of Lima",
        "sync_strategy  prefill_s  chunk_size",
        "ring           0.1235     8",
        "ring           0.1235     16",
    ]


def test_several_prompts_have_a_column() -> None:
    text = str(Sweep((row("of Lima"), row("of\n  Oslo"))))
    assert text.splitlines() == [
        "prompt   sync_strategy  prefill_s",
        "of Lima  ring           0.1235",
        "of Oslo  ring           0.1235",
    ]


def test_a_prompt_stays_text() -> None:
    for rows in ((row("<script>"),), (row("<script>"), row("<b>"))):
        html = Sweep(rows)._repr_html_()
        assert "&lt;script&gt;" in html
        assert "<script>" not in html
        assert "<th>sync_strategy</th>" in html


def test_a_sweep_of_nothing_says_so() -> None:
    assert str(Sweep(())) == Sweep(())._repr_html_() == "no runs"
