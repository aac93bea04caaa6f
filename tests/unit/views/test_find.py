"""The search box: what queries mean, and what they find."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as some

from dinfer.run.state import Mark
from dinfer.trace.simulated import Machine, paper_trace
from dinfer.trace.trace import Trace
from dinfer.trace.transfers import transfers
from dinfer.views.find import ALLOWED, COUNTED, MOST, TOGETHER, FindError, Query, Searched, find, parsed
from dinfer.views.panel.finder import Finder
from dinfer.views.recorded import RecordedRun
from dinfer.views.timeline import Timeline
from tests.support.doubles import PaperRun, paper_plan
from tests.support.runs import wait_for

SIZE = (6, 4, 3)
PLAN = paper_plan(*SIZE)
TRACE = paper_trace(PLAN, Machine(slow={(0, 1): 20}))
LABELS = ["The code of Lima ", "is 471. The code of O", "slo is 306. Layer of", " Lima"]
MARKS = [
    Mark(1, 2, 5, "differs", "rank 1 differs"),
    Mark(0, 1, 1, "nonfinite", "NaN in K"),
    Mark(2, 3, 3, "armed", "a fault is armed"),
]


def paper_run() -> PaperRun:
    run = PaperRun(PLAN, LABELS)
    run.events, run.cut, run.marks = list(TRACE.events), run.cuts.end, MARKS
    return run


RUN = Searched(PLAN, LABELS, paper_run().standing(), Timeline(TRACE, SIZE))


@pytest.mark.parametrize(
    ("query", "parts"),
    [
        ("layer 5", Query(places={"layer": (5, 5)})),
        ("l5 c2 r1", Query(places={"layer": (5, 5), "chunk": (2, 2), "rank": (1, 1)})),
        ("layer=5 Chunk:2", Query(places={"layer": (5, 5), "chunk": (2, 2)})),
        ("layers 3-5", Query(places={"layer": (3, 5)})),
        ("link 0→1 recv kv", Query(link=(0, 1), words=["recv", "kv"])),
        ("0->1", Query(link=(0, 1))),
        ("0>1 slowest", Query(link=(0, 1), words=["slowest"])),
        ("slow 0>1", Query(link=(0, 1), words=["slow"])),
        ("Slow link", Query(words=["slow link"])),
        ("slow links l2", Query(places={"layer": (2, 2)}, words=["slow link"])),
        ("slow link 0>1", Query(link=(0, 1), words=["slow link"])),
        ("0>1 slow link", Query(link=(0, 1), words=["slow link"])),
        ("layer", Query(words=["layer"])),
        ("of Lima", Query(text="of Lima")),
        ('"layer 5"', Query(text="layer 5")),
        ('c3 "recv"', Query(places={"chunk": (3, 3)}, text="recv")),
        ("", Query()),
    ],
)
def test_a_query_has_parts(query: str, parts: Query) -> None:
    assert parsed(query) == parts


@given(some.text(max_size=60))
def test_any_text_is_found_or_answered_with_what_is_allowed(text: str) -> None:
    said = ""
    try:
        hits, total = find(text, RUN)
    except FindError as error:
        hits, total, said = [], 0, str(error)
    assert len(hits) == min(total, MOST)
    assert not said or ALLOWED in said or TOGETHER in said or "there are" in said


def test_the_prompt_is_searched_across_chunks() -> None:
    hits, count = find("lima", RUN)
    assert (count, [(hit.layer, hit.chunk) for hit in hits]) == (2, [(0, 0), (0, 3)])
    assert [hit.chunk for hit in find("Oslo", RUN).hits] == [1]
    assert [hit.chunk for hit in find("c3 lima", RUN).hits] == [3]
    assert [hit.chunk for hit in find('"Layer of"', RUN).hits] == [2]


def test_places_come_first_then_their_ops_in_time() -> None:
    hits, count = find("c2 l5", RUN)
    assert hits[0].text.startswith("block c2 l5")
    assert count == 1 + sum((event.chunk, event.layer) == (2, 5) for event in TRACE.events)
    times = [hit.at for hit in hits[1:]]
    assert None not in times
    assert find("rank 2", RUN).hits[0].rank == 2


def test_ops_of_a_link_are_those_that_went_over_it() -> None:
    hits, count = find("0→1 recv kv", RUN)
    expected = [e for e in TRACE.events if (e.kind, e.what, e.peer, e.rank) == ("recv", "kv", 0, 1)]
    assert count == len(expected) > 0
    assert {(hit.chunk, hit.layer, hit.rank) for hit in hits} == {(e.chunk, e.layer, 1) for e in expected}


def test_slowest_is_in_order_and_of_a_link_that_of_its_transfers() -> None:
    hits, count = find("slowest recv", RUN)
    assert count == len(transfers(TRACE))
    longest = max(transfers(TRACE), key=lambda one: one.latency)
    assert (hits[0].layer, hits[0].chunk, hits[0].rank) == (longest.layer, longest.chunk, longest.target)
    on_link = find("slowest kv 1→2", RUN)
    assert on_link.total == sum(one.link == (1, 2) and one.what == "kv" for one in transfers(TRACE))
    layers = find("slowest layer rank 1", RUN)
    assert layers.total == sum(event.kind == "layer" and event.rank == 1 for event in TRACE.events)


def test_marks_are_found_by_what_is_wrong() -> None:
    assert [(hit.layer, hit.chunk, hit.rank) for hit in find("differs", RUN).hits] == [(5, 2, 1)]
    assert [hit.severity.word for hit in find("nan", RUN).hits] == ["warning"]
    assert find("armed layer 3", RUN).total == 1
    assert find("armed layer 2", RUN).total == 0


def test_late_and_bubbles_lead_to_their_time() -> None:
    for word in ("bubble", "late"):
        for hit in find(word, RUN).hits:
            assert hit.at is not None
    assert find("bubble", RUN).total


def test_messages_slow_on_the_wire_are_found_by_link_and_op() -> None:
    expected = sorted(
        (one.layer, one.chunk) for one in transfers(TRACE) if one.link == (0, 1) and one.what == "kv"
    )
    for query in ("slow kv 0>1", "slow recv kv 0>1", "slow send kv 0>1"):
        hits, total = find(query, RUN)
        assert total == len(expected) > 0, query
        assert sorted((hit.layer, hit.chunk) for hit in hits) == expected
        assert {hit.rank for hit in hits} == {1}
    hit = find("slow kv 0>1", RUN).hits[0]
    assert hit.text.startswith("slow: kv c")
    assert " 0→1 took " in hit.text
    assert hit.at is not None
    assert not find("slow kv 1>0", RUN).total
    assert not find("slow layer 0>1", RUN).total  # a layer goes over no link


def test_a_slow_link_is_found_with_its_longest_message() -> None:
    [hit] = find("slow link", RUN).hits
    assert hit.text.startswith("slow link 0→1: ")
    assert (hit.rank, hit.severity.word, hit.at is None) == (1, "warning", False)
    assert find("slow link rank 0", RUN).total == 1
    assert find("slow link rank 2", RUN).total == 0
    assert find("slow link 0>1", RUN) == find("0>1 slow link", RUN) == find("slow link", RUN)


def test_a_slow_link_is_found_in_each_layer_and_chunk_that_it_carries() -> None:
    carried = [one for one in transfers(TRACE) if one.link == (0, 1)]
    for name, used in (("layer", {one.layer for one in carried}), ("chunk", {one.chunk for one in carried})):
        for at in range(SIZE[0] if name == "layer" else SIZE[1]):
            hits = find(f"slow link {name} {at}", RUN).hits
            assert [getattr(hit, name) for hit in hits] == [at] * (at in used), (name, at)


def test_what_is_late_is_found_in_its_direction() -> None:
    recv = next(e for e in TRACE.events if (e.kind, e.what, e.peer, e.rank) == ("recv", "kv", 1, 2))
    later = recv.met + 50_000_000
    send = next(
        e for e in TRACE.events if (e.name, e.rank, e.peer) == (recv.name.replace("recv", "send"), 1, 2)
    )
    changed = {
        recv: replace(recv, start=later, met=later, end=later + recv.busy),
        send: replace(send, met=later, end=later + recv.busy),
    }
    trace = Trace.merge([[changed.get(event, event) for event in TRACE.events]])
    run = RUN._replace(timeline=Timeline(trace, SIZE))
    for query in ("late 1>2", "late kv 1>2", "late recv 1>2"):
        [hit] = find(query, run).hits
        assert (hit.layer, hit.chunk, hit.rank) == (recv.layer, recv.chunk, 2)
        assert " 1→2: rank 1 waited " in hit.text
    for query in ("late 2>1", "late hidden 1>2"):
        assert not find(query, run).total


def test_what_there_is_not_is_refused_with_what_there_is() -> None:
    with pytest.raises(FindError, match="layer is 99; there are layers 0–5"):
        find("layer 99", RUN)
    with pytest.raises(FindError, match="rank is 7; there are ranks 0–2"):
        find("0→7", RUN)
    with pytest.raises(
        FindError, match=r"'nowhere': it is not in the prompt\. Search for text of the prompt"
    ):
        find("nowhere", RUN)
    with pytest.raises(FindError, match="text is not known here"):
        find("Lima", RUN._replace(labels=["", "", "", ""]))
    with pytest.raises(FindError, match="the run moves: pause it"):
        find("slowest", RUN._replace(timeline=None))


@pytest.mark.parametrize(
    ("query", "one", "other"),
    [
        ("slowest lima", "Lima", "slowest"),
        ("lima recv kv", "Lima", "recv"),
        ("lima 0>1", "Lima", "0→1"),
        ("lima nan", "Lima", "nan"),
        ("nan slow", "nan", "slow"),
        ("nan armed inf", "nan", "armed"),
        ("slow late", "slow", "late"),
        ("bubble recv", "bubble", "recv"),
        ("slow link recv", "slow link", "recv"),
        ("bubble 0>1", "bubble", "0→1"),
        ("differs 0>1", "differs", "0→1"),
        ("slowest waiting", "slowest", "waiting"),
    ],
)
def test_words_that_cannot_all_hold_are_refused_with_what_can(query: str, one: str, other: str) -> None:
    with pytest.raises(FindError) as caught:
        find(query, RUN)
    assert str(caught.value).lower() == f"'{one}' and '{other}' do not hold of one thing: {TOGETHER}.".lower()


def test_words_of_one_kind_all_hold() -> None:
    assert find("nan inf layer 1", RUN).total == 1
    assert find("differs", RUN).total == 1
    assert find("differs corrupt", RUN).total == 0
    assert find("bubble bubbles", RUN).hits == find("bubble", RUN).hits


def test_text_is_found_at_its_place_whatever_its_small_letters_are() -> None:
    labels = ["İ" * 20, "and LIMA are", " of İzmir, in that order", ""]
    run = RUN._replace(labels=labels)
    [hit] = find("lima", run).hits
    assert (hit.chunk, "and LIMA are" in hit.text) == (1, True)
    assert [hit.chunk for hit in find("İZmir", run).hits] == [2]


@pytest.mark.parametrize("count", [COUNTED, COUNTED + 1])
def test_more_hits_than_are_counted_are_told_as_more(count: int) -> None:
    run, heard = paper_run(), []
    run.labels = ["a" * count, "", "", ""]
    finder = Finder(run, RecordedRun(run), lambda content: heard.append(content["found"]))
    finder.ask({"view": "a", "number": 1, "query": '"a"'})
    wait_for(lambda: heard, "an answer")
    assert (heard[0]["count"], heard[0]["more"]) == (COUNTED, count > COUNTED)
    finder.close()


def test_ops_that_have_not_run_are_found_too() -> None:
    run = paper_run()
    run.cut = run.cuts.after_block(1, 1)
    run.events = []
    at_start = Searched(PLAN, LABELS, run.standing(), Timeline(Trace.merge([run.events]), SIZE))
    hits, _ = find("c3 l5 layer", at_start)
    assert [hit.text for hit in hits] == ["layer c3 l5 on rank 2: not yet"]
    run.started = tuple(tuple(int(lane.name == "compute") for lane in lanes) for lanes in PLAN.lanes)
    waiting = find("waiting", at_start._replace(standing=run.standing()))
    assert all(hit.text.endswith("under way") for hit in waiting.hits)
    assert waiting.total == 3


def test_the_finder_answers_each_page_with_its_number() -> None:
    run, heard = paper_run(), []
    finder = Finder(run, RecordedRun(run), lambda content: heard.append(content["found"]))
    finder.ask({"view": "a", "number": 3, "query": "l5"})
    wait_for(lambda: heard, "an answer")
    assert (heard[0]["view"], heard[0]["number"]) == ("a", 3)
    assert heard[0]["hits"][0]["layer"] == 5
    finder.ask({"view": "a", "number": 4, "query": "nowhere"})
    wait_for(lambda: len(heard) == 2, "an answer")
    assert "Search for" in heard[1]["said"]
    finder.close()
