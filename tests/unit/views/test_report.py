"""The report: its first sentence, the page as a golden file, what may not be in it, and its size."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinfer import __version__
from dinfer.plan.lower import lower
from dinfer.plan.partition import partition
from dinfer.plan.plan import Plan
from dinfer.plan.schedule import build
from dinfer.trace.events import Event
from dinfer.trace.findings import Findings, KvFinding, RankFinding, findings_of, with_findings
from dinfer.trace.read import read_traces
from dinfer.trace.shares import LinkShare, Share, Shares, shares
from dinfer.trace.simulated import Machine, paper_trace
from dinfer.trace.summary import summary
from dinfer.trace.trace import Trace
from dinfer.views.cells import EVERYWHERE, NOT_YET
from dinfer.views.report import facts
from dinfer.views.report.facts import exposed_part, parts_of, percent
from dinfer.views.report.page import report_html, write_report
from tests.support.reports import HOSTILE, told
from tests.support.traces import on_paper, recorded

GOLDEN = Path(__file__).with_name("golden") / "report.html"
NO_PLOTLY = "/* plotly */"


def small(strategy: str = "pairwise") -> Trace:
    return on_paper(4, 2, 2, strategy)


# -- the first sentence


def exposed(wire: float = 0.0, wait: float = 0.0, late: int | None = None, ranks: int = 3) -> Shares:
    """Three ranks that computed for 100 s each but for what one link took of rank 1."""
    spent = [(int(wire), int(wait)) if rank == 1 else (0, 0) for rank in range(ranks)]
    found = [
        Share(rank, [(0, (100 - a - b) * 10**9)], [(0, a * 10**9)], [(0, b * 10**9)], [], [])
        for rank, (a, b) in enumerate(spent)
    ]
    return Shares(found, [LinkShare(0, 1, wire, wait, late), LinkShare(1, 2, 0.0, 0.0, None)])


def ranks(
    *digests: str, tokens: tuple[tuple[int, ...] | None, ...] = (None, None, None)
) -> tuple[RankFinding, ...]:
    return tuple(
        RankFinding(n, kv_sha256=digest, tokens=mine)
        for n, (digest, mine) in enumerate(zip(digests, tokens, strict=False))
    )


SAME = ranks("a", "a", "a", tokens=((1, 2),) * 3)
SENTENCES: list[tuple[Findings, Shares, str]] = [
    (
        Findings(ranks=SAME, parameters={"temperature": 0.0}),
        exposed(wire=8, wait=13, late=0),
        "All 3 ranks hold the same KV; greedy tokens agree; 7 % of prefill; waiting for rank 0 on link 0→1",
    ),
    (
        Findings(ranks=ranks("a", "a", "b", tokens=((1,), (1,), (2,)))),
        exposed(wire=30),
        "Rank 2 holds other KV than rank 0; tokens differ; 10 % of prefill; on the wire of link 0→1",
    ),
    (Findings(), exposed(), "no communication of prefill was exposed; KV was not checked"),
    (
        Findings(state="failed", failure="rank 1 failed.\nmore", faults=("f",), ranks=ranks("a", "b", "b")),
        Shares([], []),
        "The run failed: rank 1 failed; ranks 1, 2 hold other KV than rank 0; 1 fault",
    ),
    (
        Findings(state="paused", edited=("x",), corrupt=("c", "d"), kv=KvFinding(False, "Rank 2 differs.")),
        exposed(wait=20),
        "not at the end; rank 2 differs; edited by hand; changed bytes; 2 times; 7 %; waiting on link 0→1",
    ),
    (
        Findings(ranks=(RankFinding(0, kv_sha256="a"),)),
        Shares([Share(0, [(0, 10)], [], [], [], [])], []),
        "only one rank; nothing was sent",
    ),
]


@pytest.mark.parametrize(("findings", "found", "facts"), SENTENCES)
def test_what_is_known_is_told_in_order_the_headline_first(
    findings: Findings, found: Shares, facts: str
) -> None:
    told_of = parts_of(findings, found)
    assert all(not part[0].islower() and part.endswith(".") and "\n" not in part for part in told_of)
    said = " ".join(told_of)
    places = [said.lower().find(fact.lower()) for fact in facts.split("; ")]
    assert -1 not in places
    assert places == sorted(places)


def test_the_headline_leaves_the_lanes_of_a_lost_rank_to_the_message_below_it() -> None:
    failure = "rank 2 was killed by SIGKILL; it stood at: 3 of 9 ops done; compute in `layer c1 l3`"
    told_of = parts_of(Findings(state="lost", failure=failure), Shares([], []))
    assert told_of[0] == "A rank was lost: rank 2 was killed by SIGKILL."


def test_the_headline_is_one_clause_whatever_a_token_says() -> None:
    verdict = (
        "rank 2 differs at layer 1, token 8 ('; '), dim 0: 1 against 2; 1 of 9 values; changed on the wire"
    )
    first, *others = parts_of(Findings(kv=KvFinding(False, verdict)), exposed())
    assert first == "Rank 2 differs at layer 1, token 8 ('; '), dim 0: 1 against 2."
    assert others[:2] == ["1 of 9 values differ.", "Changed on the wire."]


@pytest.mark.parametrize(
    ("links", "most"),
    [
        # Waiting on link 0→2 is the largest single part, and yet most is on the wire.
        (
            [LinkShare(0, 2, 5, 20, 0), LinkShare(0, 1, 18, 4, 1), LinkShare(1, 2, 14, 2, 1)],
            "on the wire, above all of link 0→1",
        ),
        (
            [LinkShare(0, 1, 25, 4, 1), LinkShare(0, 2, 2, 20, 0), LinkShare(1, 2, 2, 18, 1)],
            "waiting, above all for rank 0 on link 0→2",
        ),
        ([LinkShare(0, 1, 9, 0, None), LinkShare(1, 2, 0, 4, 2)], "on the wire of link 0→1"),
        ([LinkShare(0, 1, 9, 0, None), LinkShare(1, 2, 0, 14, None)], "waiting on link 1→2"),
    ],
)
def test_what_is_most_over_all_is_said_before_the_link(links: list[LinkShare], most: str) -> None:
    wire, wait = (
        int(10**9 * sum(part)) for part in zip(*((one.wire_s, one.wait_s) for one in links), strict=True)
    )
    share = Share(0, [(0, 10**11)], [(0, wire)], [(0, wait)], [], [])
    assert exposed_part(Shares([share], links)).endswith(f"exposed communication, most of it {most}")


@pytest.mark.parametrize(
    ("part", "text"),
    [(0.0714, "7 %"), (0.004, "0.4 %"), (0.0004, "less than 0.1 %"), (0, "0 %"), (1, "100 %")],
)
def test_percent(part: float, text: str) -> None:
    assert percent(part) == text


def test_all_chunks_are_told_and_a_prediction_beside_a_prefill_that_has_ended() -> None:
    shape = partition(layers=4, tokens=40, world_size=2, chunk_size=1, lengths=(8, 16, 16))
    trace = paper_trace(build(shape, "lockstep", "pairwise"))
    trace = replace(trace, about={**trace.about, "predicted_s": 0.5})
    for state, is_told in (("", True), ("decoding", True), ("paused", False), ("failed", False)):
        page = report_html([with_findings(trace, Findings(state=state))], plotly=NO_PLOTLY)
        assert "40 tokens by 8, 2 × 16" in page
        assert ("0.5 s of prefill, by the planner; it took" in page) == is_told


# -- the page


def plain(page: str) -> str:
    """The page without what would make a golden file unreadable: data, figures, the text of scripts and styles."""
    page = re.sub(r'(<script type="application/json"[^>]*>).*?(</script>)', r"\1…\2", page, flags=re.DOTALL)
    page = page.replace(f"dinfer {__version__}", "dinfer …")
    page = re.sub(r"'sha256-[^']+'", "'sha256-…'", page.replace("&#39;", "'"))
    return re.sub(r"(<script>|<style>).*?(</script>|</style>)", r"\1…\2", page, flags=re.DOTALL)


def test_the_page_is_as_it_was(request: pytest.FixtureRequest) -> None:
    """To make the file anew: delete it and run this test, which then fails once, and read what it has written."""
    page = plain(report_html([told(small())], plotly=NO_PLOTLY))
    if not GOLDEN.exists():
        GOLDEN.write_text(page, encoding="utf-8")
        pytest.fail(f"{GOLDEN.name} was made anew by {request.node.name}")
    assert page == GOLDEN.read_text(encoding="utf-8")


def test_the_page_is_the_same_each_time() -> None:
    traces = [told(small()), told(small("ring"))]
    assert report_html(traces) == report_html(traces)


class Elements(HTMLParser):
    """Every element with its attributes, and every text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.mark.parametrize("make", [lambda: [told(small(), HOSTILE)], lambda: [told(small(), HOSTILE)] * 2])
def test_what_a_run_said_stays_text(make: Callable[[], list[Trace]]) -> None:
    """No element comes from it: there are as many of each as where the same places hold harmless words."""
    hostile = Elements(report_html(make(), plotly=NO_PLOTLY))
    harmless = Elements(report_html([told(small()) for _ in make()], plotly=NO_PLOTLY))
    assert [tag for tag, _ in hostile.found] == [tag for tag, _ in harmless.found]
    assert sum(HOSTILE in text for text in hostile.texts) > 15
    assert not [
        attributes for _, attributes in hostile.found if any(name.startswith("on") for name in attributes)
    ]


def test_nothing_comes_from_outside_and_only_its_own_scripts_run() -> None:
    page = report_html([told(small())])
    elements = Elements(page)
    sources = [a.get("src") or a.get("href") or "" for _, a in elements.found]
    assert all(not source or source.startswith(("#", "data:,")) for source in sources)
    (policy,) = [a["content"] or "" for tag, a in elements.found if tag == "meta" and "http-equiv" in a]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "http" not in policy
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert re.findall(r"'sha256-([^']+)'", policy) == hashes
    assert "unsafe-inline" not in policy.split("style-src")[0]
    assert "unsafe-eval" not in policy


def test_a_large_run_fits_into_ten_megabytes_and_comes_back_whole(tmp_path: Path) -> None:
    path = write_report([told(on_paper())], tmp_path / "report.html")
    assert path.stat().st_size < 10_000_000
    (back,) = read_traces(path)
    assert back == told(on_paper())


def test_a_report_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OSError, match=r"report\.html' is a folder, and a file is to be written"):
        write_report([small()], tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_bare_trace_says_what_is_not_known() -> None:
    page = report_html([Trace((Event(0, "main", "other", 0, 0, 0, 10**9),))], plotly=NO_PLOTLY)
    for words in (
        "was not checked",
        "The plan and its proof are unknown",
        "Nothing was sent between ranks",
        "Not compared",
    ):
        assert words in page


@pytest.mark.parametrize("failure", ["", "rank 1 is gone"])
def test_the_log_is_folded_away_unless_the_run_failed(failure: str) -> None:
    log = ("10:00:00 run: 5 tokens", "10:00:01 rank 1 stands at:\n  one\n  two")
    page = report_html([with_findings(small(), Findings(log=log, failure=failure))], plotly=NO_PLOTLY)
    [(opened, lines, text)] = re.findall(
        r'<details( open)?><summary>Session log[^<]*: (\d+) lines</summary><pre class="whole">(.*?)</pre>',
        page,
        re.DOTALL,
    )
    assert (bool(opened), lines, text) == (bool(failure), "4", "\n".join(log))


def facts_of(page: str) -> dict[str, tuple[bool, list[str]]]:
    """The rows of the table that compares runs, by name: whether it is marked, and its cells."""
    rows = re.findall(
        r'<tr( class="differs")?><th class="text" scope="row">([^<]*).*?</th>(.*?)</tr>', page, re.DOTALL
    )
    return {name: (bool(marked), re.findall(r"<td[^>]*>(.*?)</td>", cells)) for marked, name, cells in rows}


def slow(trace_of: Plan, factor: float = 30) -> Trace:
    return paper_trace(trace_of, Machine(slow={(0, 1): factor}))


def test_two_runs_stand_side_by_side_row_by_row_and_differences_are_marked() -> None:
    """Every fact has both runs in one row, with the ratio of numbers and its direction."""
    page = report_html([slow(plan()), paper_trace(plan("lockstep"))], ["A", "B"], plotly=NO_PLOTLY)
    assert re.search(r'<h1 id="verdict">(A|B) took [\d.]+ s and (A|B) ', page)
    rows = facts_of(page)
    marked, (first, second, ratio) = rows["prefill, s"]
    took = [summary(trace)["prefill_s"] for trace in (slow(plan()), paper_trace(plan("lockstep")))]
    assert marked
    assert ratio == f"{took[1] / took[0]:.2f} × as long"
    assert float(first) < float(second)
    assert rows["schedule"] == (True, ["pipelined", "lockstep", ""])
    assert rows["layers"] == (False, ["4", "4", ""])
    assert rows["transfers"][1][2] == "the same"
    parts = [rows[name][1] for name in ("computing", "exposed, on the wire", "exposed, waiting", "bubble")]
    for run in (0, 1):
        assert sum(float(cells[run].removesuffix(" %")) for cells in parts) == pytest.approx(100)
    assert all(re.fullmatch(r"[+−][\d.]+ points", cells[2]) for cells in parts)
    for number in (0, 1):
        assert page.count(f'<section class="run run{number}">') >= 10
    assert len(set(re.findall(r' id="([^"]+)"', page))) == len(re.findall(r' id="([^"]+)"', page))


def test_figures_side_by_side_have_equal_axes_and_colours() -> None:
    page = report_html([slow(plan()), paper_trace(plan("lockstep"))], plotly=NO_PLOTLY)

    def drawn(run: int, name: str) -> dict[str, Any]:
        [text] = re.findall(rf'id="run{run}-{name}-data">(.*?)</script>', page, re.DOTALL)
        found: dict[str, Any] = json.loads(text)
        return found

    for name, axes in {
        "gantt": ["xaxis"],
        "latency": ["xaxis", "yaxis", "yaxis2"],
        "distribution": ["xaxis", "xaxis2"],
    }.items():
        for axis in axes:
            one, other = (drawn(run, name)["layout"][axis] for run in (0, 1))
            assert (one["range"], one.get("tickvals")) == (other["range"], other.get("tickvals")), (
                name,
                axis,
            )
    for name in ("matrix", "layers"):
        for one, other in zip(drawn(0, name)["data"], drawn(1, name)["data"], strict=True):
            values = [
                value for heat in (one, other) for row in heat["z"] for value in row if value is not None
            ]
            assert (one["zmin"], one["zmax"]) == (other["zmin"], other["zmax"]) == (min(values), max(values))
    colours = [{line["name"]: line["line"] for line in drawn(run, "distribution")["data"]} for run in (0, 1)]
    assert colours[0] == colours[1]


def test_a_run_that_did_not_end_has_no_ratio_of_times() -> None:
    failed = with_findings(small(), Findings(failure="rank 1 is gone"))
    rows = facts_of(report_html([small(), failed], ["A", "B"], plotly=NO_PLOTLY))
    assert rows["prefill, s"][1][1:] == ["not ended", ""]
    assert "computing" not in rows
    assert rows["result"][0]


def test_more_than_two_runs_have_a_column_each() -> None:
    page = report_html([small(), small("ring"), slow(plan())], ["A", "B", "C"], plotly=NO_PLOTLY)
    assert len(facts_of(page)["transfers"][1]) == 3
    assert "against" not in page.partition("</thead>")[0]


def test_runs_alike_are_numbered_and_names_win() -> None:
    assert '<p class="which">run 2: pairwise</p>' in report_html([small(), small()], plotly=NO_PLOTLY)
    assert '<p class="which">after</p>' in report_html(
        [small(), small()], ["before", "after"], plotly=NO_PLOTLY
    )


def test_what_no_one_reads_is_left_out_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "MOST_LINKS", 3)
    monkeypatch.setattr(facts, "MOST_OPS", 10)
    trace = on_paper(16, 4, 8)
    table = facts.link_table(trace)
    assert len(table.rows) == 3
    assert "0→1" in [row[0] for row in table.rows]  # which is slow
    assert table.left_out.endswith("of 56.")
    assert table.left_out in report_html([trace], plotly=NO_PLOTLY)
    made = facts.plan_of(trace, Findings())
    assert made
    assert len(facts.plan_text(made).splitlines()) == 11


def test_earlier_runs_and_pauses_are_told() -> None:
    other = {**summary(small("ring")), "name": "run 1 of this session"}
    trace = with_findings(recorded(), replace(findings_of(recorded()), others=(other,)))
    assert "run 1 of this session" in report_html([trace], plotly=NO_PLOTLY)
    times = ("ready", "start", "met", "end")
    later = [replace(e, **{name: getattr(e, name) + 10**10 for name in times}) for e in small().events]
    stopped = Trace((*small().events, *later), small().about)
    assert "Pauses of 10." in report_html([stopped], plotly=NO_PLOTLY)


# -- plan and map


def plan(schedule: Any = "pipelined") -> Plan:
    return build(partition(layers=4, tokens=16, world_size=2, chunk_size=8), schedule, "pairwise")


@pytest.mark.parametrize(
    "made", [plan(), plan("lockstep"), lower(plan())], ids=["pipelined", "lockstep", "lowered"]
)
def test_the_plan_is_found_again_by_its_id(made: Plan) -> None:
    assert facts.plan_of(paper_trace(made), Findings()) == made


def test_a_plan_that_is_another_is_not_made_up() -> None:
    trace = paper_trace(plan())
    assert facts.plan_of(replace(trace, about={**trace.about, "plan_id": "00"}), Findings()) is None
    assert facts.plan_of(Trace(()), Findings()) is None
    edited = plan().text().replace("lane compute", "lane mine")
    found = facts.plan_of(trace, Findings(plan=edited))
    assert found
    assert found.text() == edited


def test_the_map_shows_where_the_run_stood_not_what_it_once_held() -> None:
    trace, made = paper_trace(plan()), plan()
    ended = facts.map_states(trace, Findings(), made)
    assert ended is not None
    assert set(np.unique(ended)) == {EVERYWHERE}
    start = tuple((0,) * len(lanes) for lanes in made.lanes)
    back = facts.map_states(trace, Findings(positions=start), made)
    assert back is not None
    assert set(np.unique(back)) == {NOT_YET}
    assert facts.map_states(Trace(()), Findings(), None) is None


def test_owners_without_a_plan_are_those_who_computed() -> None:
    trace = paper_trace(plan())
    assert list(facts.owners_of(trace, None)) == list(facts.owners_of(trace, plan())) == [0, 0, 1, 1]


def test_columns_of_which_nothing_is_known_are_left_out() -> None:
    table = facts.rank_table(Findings(ranks=ranks("a", "a")))
    assert table.heads == ["rank", "KV, SHA-256"]
    assert table.rows == [("0", "a"), ("1", "a")]


def test_shares_of_a_recorded_run_are_told_on_its_page() -> None:
    page = report_html([recorded()], plotly=NO_PLOTLY)
    assert f"{percent(shares(recorded()).exposed)} of prefill was exposed communication and" in page


def test_differences_that_are_not_listed_are_counted_and_on_the_map() -> None:
    trace = told(small())
    found = findings_of(trace)
    assert found.kv
    many = replace(found.kv, count=1234, blocks=((1, 0, 1), (0, 1, 3)))
    page = report_html([with_findings(trace, replace(found, kv=many))], plotly=NO_PLOTLY)
    assert "The first 1 of 1,234. 2 blocks differ, which the map shows." in page
    [path] = re.findall(r'<path class="differs" d="([^"]*)"', page)
    assert path.count("M") == 2
    assert "The first" not in report_html([trace], plotly=NO_PLOTLY)
