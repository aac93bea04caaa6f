"""Why: a deadlock as a picture with folds, in the panel, in its report and in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import dinfer
from dinfer.run.hang import Hung
from dinfer.verdict.verdict import Verdict
from dinfer.views.panel.why import Why, explained
from tests.support.doubles import PaperRun, paper_plan
from tests.support.runs import wait_for
from tests.support.traces import PROMPT


def test_a_deadlock_is_drawn_in_the_panel_the_report_and_the_folder(tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []
    with dinfer.connect("threads", n=3) as session:
        session.load("demo", threads=1)
        run = session.prefill(PROMPT, chunk_size=32, schedule="batched", unsafe=True)
        with pytest.raises(Hung):
            run.wait(60)
        why = Why(run, lambda content: heard.append(content["why"]))
        why.ask({"view": "me", "have": "hung"})
        wait_for(lambda: heard, "a verdict")
        why.close()
        verdict = run.verdict()
        report = Path(run.report(tmp_path / "report.html")).read_text(encoding="utf-8")
        folder = run.save(tmp_path / "hung")
    [answer] = heard
    report = report.partition('<div class="waits">')[2].partition("</div></div>")[0]
    assert (answer["view"], answer["have"]) == ("me", "hung")
    for html in (answer["html"], verdict._repr_html_(), dinfer.open(folder).verdict()._repr_html_(), report):
        assert html.count('marker-end="url(#dinfer-wait)"') == 3  # each waits for the next
        for rank in range(3):
            assert f'<details data-rank="{rank}" open><summary>✖ rank {rank}: waits for rank' in html
        assert "ops.py:" in html
        assert 'href="vscode://file/' in html
        assert "_bootstrap" not in html


def test_what_goes_on_has_no_picture() -> None:
    assert explained(Verdict("moving", "the run moves")) == {"html": "", "said": "the run moves"}
    assert explained("the run moves")["html"] == ""


def test_a_verdict_that_cannot_be_had_is_said() -> None:
    heard: list[dict[str, Any]] = []
    run = PaperRun(paper_plan())

    def refuse() -> str:
        raise RuntimeError("nobody answers")

    run.verdict = refuse  # type: ignore[method-assign]
    why = Why(run, lambda content: heard.append(content["why"]))
    why.ask({"view": "me", "have": "x"})
    wait_for(lambda: heard, "an answer")
    why.close()
    assert (heard[0]["html"], heard[0]["said"]) == ("", "nobody answers")
