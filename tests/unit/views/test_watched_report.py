"""The report of somebody else's program: only what is known of it, in words that fit it."""

from __future__ import annotations

import re

import pytest

from dinfer.trace.findings import Findings, with_findings
from dinfer.trace.intervals import seconds
from dinfer.trace.shares import pauses, shares
from dinfer.trace.trace import LOOKED, Trace
from dinfer.views.figures.exposure import exposure
from dinfer.views.figures.gantt import gantt
from dinfer.views.report.page import report_html
from tests.support.made_ops import MadeOps

S = 10**9


def hung() -> Trace:
    """Rank 0 sends at 1 s and is at a barrier from 2 s on; rank 1 has the message and waits for another from 3 s on. It
    was looked at after 10 s."""
    ops = MadeOps(2)
    ops.send(0, 1)
    ops.recv(1, 0, at=1.5)
    ops.add(0, "barrier", open=True)
    ops.recv(1, 0, open=True, at=3)
    return Trace.merge([ops.events], command=["python", "my program.py"], **{LOOKED: 10 * S})


def page(trace: Trace, **known: object) -> str:
    found = report_html([with_findings(trace, Findings(**known))], plotly="")  # type: ignore[arg-type]
    return re.sub(r"<script.*?</script>|<style.*?</style>", "", found, flags=re.DOTALL)


def test_its_own_code_is_what_is_in_no_op() -> None:
    trace = hung()
    own = {rank: [(start / S, end / S) for start, end in trace.computing(rank)] for rank in (0, 1)}
    assert own == {0: [(1.001, 2)], 1: [(1, 1.5), (1.501, 3)]}
    found = {share.rank: share for share in shares(trace).ranks}
    assert found[1].prefill_s == pytest.approx(9)
    assert seconds(found[1].bubble) == pytest.approx(7, abs=0.01), "nothing was sent to it"
    assert pauses(trace) == [], "nobody has paused it: it works, then"


def test_an_async_op_that_nobody_waits_for_blocks_nobody() -> None:
    ops = MadeOps(2)
    ops.message(0, 1)
    ops.send(0, 1, open=True, is_async=True, is_waited=False)
    assert Trace.merge([ops.events], **{LOOKED: 10 * S}).unended(0) == []


def test_figures_show_what_it_stands_in_until_it_was_looked_at() -> None:
    names = {line.name: line for line in gantt(hung()).data}
    assert "its own code" in names
    assert "compute" not in names
    assert max(names["open"].x) == pytest.approx(9)
    assert exposure(hung()).data[0].name == "its own code"


def test_the_table_of_ranks_has_no_prefill() -> None:
    assert "own code s" in repr(hung())
    assert "prefill" not in repr(hung())


def test_the_page_speaks_of_no_prefill_plan_or_kv() -> None:
    verdict = "deadlock: rank 0 is in `barrier`\n  rank 0: is in `barrier`\n  rank 1: is in `recv <- 0`"
    text = page(hung(), state="hung", failure=verdict, warnings=("rank 0's isend was never waited for",))
    for word in ("prefill", "KV", "plan", "chunk", "layer"):
        assert word not in text, word
    assert "python &#39;my program.py&#39;" in text
    assert "<pre>  rank 0: is in `barrier`\n  rank 1: is in `recv &lt;- 0`</pre>" in text
    assert "was never waited for" in text


def test_collectives_have_a_table() -> None:
    ops = MadeOps(2)
    ops.all("all_reduce", 0, 1, shape=(256,))
    text = page(Trace.merge([ops.events]), state="done")
    assert '<td class="text">all_reduce</td><td class="text">default</td><td>2</td><td>0.002</td>' in text
    assert "All ranks ended, and nothing went wrong." in text
