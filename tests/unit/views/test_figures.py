"""Figures, drawn of traces on paper, of one that ranks recorded, and of what other programs may write."""

from __future__ import annotations

import json
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinfer.trace.events import COMPUTE, Event
from dinfer.trace.shares import shares
from dinfer.trace.trace import Trace
from dinfer.trace.transfers import by_link, transfers
from dinfer.views.figures.exposure import exposure
from dinfer.views.figures.gantt import MOST_ROWS, Piece, gantt, joined, pieces, rows_of
from dinfer.views.figures.latency import (
    NAMED_LINKS,
    PER_LINK,
    distribution,
    latency,
    layers,
    log_ms,
    named_links,
    slowest,
)
from dinfer.views.figures.matrix import matrix, short
from tests.support.traces import on_paper, recorded

FIGURES: list[Callable[..., go.Figure]] = [exposure, gantt, latency, distribution, matrix, layers]
S = 10**9


def foreign() -> Trace:
    """What another program may have recorded: collectives, and transfers of nothing known."""
    events = [
        Event(0, "main", "all_reduce", 0, 0, 2 * S, 3 * S, bytes=64),
        Event(1, "main", "all_reduce", 0, S, 2 * S, 3 * S, bytes=64),
        Event(0, "main", "send", 3 * S, 3 * S, 4 * S, 5 * S, peer=1, bytes=100),
        Event(0, "main", "other", 5 * S, 5 * S, 5 * S, 6 * S),
        Event(1, "main", "recv", 3 * S, 3 * S, 3 * S, 3 * S),
    ]
    return Trace.merge([events])


TRACES: dict[str, Callable[[], Trace]] = {
    "paper": on_paper,
    "recorded": recorded,
    "lockstep ring": lambda: on_paper(12, 8, 3, "ring", "lockstep"),
    "eight ranks": lambda: on_paper(16, 4, 8),
    "foreign": foreign,
    "one rank": lambda: on_paper(4, 3, 1),
    "empty": lambda: Trace(()),
}


@pytest.mark.parametrize("draw", FIGURES, ids=lambda draw: str(draw.__name__))
@pytest.mark.parametrize("trace", TRACES)
def test_any_trace_can_be_drawn_in_light_and_dark(draw: Callable[..., go.Figure], trace: str) -> None:
    """The two differ only in their template, and none needs WebGL, which freezes pages without a GPU."""
    light, dark = (json.loads(draw(TRACES[trace](), dark=dark).to_json()) for dark in (False, True))
    assert light["layout"].pop("template") != dark["layout"].pop("template")
    assert light == dark
    assert not [data["type"] for data in light["data"] if "gl" in data["type"]]


@pytest.mark.parametrize("draw", FIGURES, ids=lambda draw: str(draw.__name__))
def test_figures_of_a_large_run_are_light(draw: Callable[..., go.Figure]) -> None:
    assert len(draw(on_paper()).to_json()) < 1_500_000
    assert len(draw(on_paper()).data) <= 12


# -- latency


def of_link(figure: go.Figure, link: str) -> list[Any]:
    """Its lines or points: on the wire, then waiting."""
    return [data for data in figure.data if data.name == link]


def test_each_transfer_is_a_point_on_the_wire_and_one_waiting() -> None:
    trace = recorded()
    for link, found in by_link(transfers(trace)).items():
        wire, waiting = of_link(latency(trace), f"{link[0]}→{link[1]}")
        assert wire.y.tolist() == pytest.approx([one.wire / 1e6 for one in found])
        assert waiting.y.tolist() == pytest.approx([one.waited / 1e6 for one in found])
        assert wire.x.tolist() == pytest.approx([(one.end - trace.began) / S for one in found], rel=1e-4)
        assert wire.text[0].startswith(f"{link[0]}→{link[1]} {found[0].what} c0 l")


def test_a_slow_link_stands_out() -> None:
    typical = {name: median(of_link(latency(on_paper()), name)[0].y) for name in ("0→1", "0→2", "1→0", "2→1")}
    assert typical["0→1"] > 5 * max(value for name, value in typical.items() if name != "0→1")


@given(st.lists(st.integers(0, 1000), max_size=50), st.integers(1, 9))
def test_the_slowest_of_every_few_are_kept(durations: list[int], most: int) -> None:
    trace = Trace.merge([[Event(1, "in", "recv", 0, 0, 0, n, peer=0) for n in durations]])
    found = transfers(trace)
    kept = slowest(found, lambda one: one.wire, most)
    assert len(kept) <= most
    assert max((one.wire for one in kept), default=0) == max(durations, default=0)
    assert set(kept) <= set(found)


@pytest.mark.parametrize("most", [1, 2, 12, 56, 60])
def test_of_many_links_the_slowest_have_names_and_none_is_lost(most: int) -> None:
    found = transfers(on_paper(16, 4, 8))
    links = named_links(found, most)
    assert len(links) == min(most, 56)
    assert sum(map(len, links.values())) == len(found)
    assert most == 1 or "0→1" in links  # which is slow
    others = [name for name in links if "→" not in name]
    assert others == [f"{57 - most} other links"] * (most < 56)


def test_figures_of_eight_ranks_name_few_links() -> None:
    for draw in (latency, distribution):
        names = {data.name for data in draw(on_paper(16, 4, 8)).data}
        assert len(names) == NAMED_LINKS
        assert "45 other links" in names


def test_a_long_run_is_thinned_out() -> None:
    trace = on_paper()
    assert all(len(data.x) <= PER_LINK for data in latency(trace).data)
    assert max(len(found) for found in by_link(transfers(trace)).values()) > 400


def test_a_distribution_rises_to_all_transfers() -> None:
    for line in distribution(recorded()).data:
        assert line.y[-1] == 100
        assert np.all(np.diff(line.y) > 0)
        assert np.all(np.diff(line.x) >= 0)


def test_a_cell_is_the_99th_percentile_of_a_link_and_layer() -> None:
    (heat,) = layers(on_paper()).data
    row = list(heat.y).index("0→1")
    mine = sorted(one.latency for one in transfers(on_paper()) if one.link == (0, 1) and one.layer == 5)
    assert heat.z[row][5] == pytest.approx(mine[-1] / 1e6)
    assert f"{len(mine)} transfers" in heat.text[row][5]
    assert heat.z[row][30] is None
    assert heat.text[row][30] == "no transfers"


@pytest.mark.parametrize(
    ("values", "ticks", "first"),
    [
        ([0.001], [0.001, 0.002, 0.005, 0.01, 0.02, 0.05], "≤ 0.001"),
        ([0.3, 7.0], [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50], "0.1"),
        ([0.001, 900.0], [0.001, 0.01, 0.1, 1, 10, 100, 1000], "≤ 0.001"),
        ([], [0.1, 0.2, 0.5, 1, 2, 5], "0.1"),
    ],
)
def test_a_logarithmic_axis_has_few_labels_and_a_decade(
    values: list[float], ticks: list[float], first: str
) -> None:
    axis = log_ms(np.array(values, np.float64))
    assert axis["tickvals"] == pytest.approx(ticks)
    assert axis["ticktext"][0] == first
    assert axis["range"][1] - axis["range"][0] >= 1
    assert all(axis["range"][0] <= np.log10(value) <= axis["range"][1] for value in values)


# -- matrix


def test_a_matrix_by_hand() -> None:
    """Two messages on the wire at once from 1 to 3 s and 2 to 5 s: 4 MB in 4 s."""
    times = [(0, 1, 3), (1, 2, 5)]
    events = [
        Event(2, "in", "recv", a * S, a * S, b * S, c * S, "kv", 0, n, 0, bytes=2_000_000)
        for n, (a, b, c) in enumerate(times)
    ]
    megabytes, rate, median_ms, p99 = matrix(Trace.merge([events])).data
    assert list(megabytes.y) == ["0", "2"]
    assert [list(row) for row in megabytes.z] == [[None, 4.0], [None, None]]
    assert (rate.z[0][1], median_ms.z[0][1], p99.z[0][1]) == (1.0, 3000.0, 4000.0)
    assert rate.text[0][1] == "1"


@pytest.mark.parametrize(
    ("value", "text"), [(1234.5, "1,234"), (12.34, "12.3"), (0.5, "0.5"), (0.00012, "0.0001")]
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert short(value) == text


# -- gantt


def test_gantt_draws_what_was_computed_and_sent() -> None:
    trace = recorded()
    found = pieces(trace)
    for rank in trace.ranks:
        computed = [
            (e.met - trace.began, e.end - trace.began) for e in trace.prefill() if is_compute(e, rank)
        ]
        drawn = [(piece.start, piece.end) for piece in found["compute"][rank, "compute"]]
        assert drawn[0][0] == computed[0][0]
        assert drawn[-1][1] == computed[-1][1]
        assert sum(end - start for start, end in drawn) >= sum(end - start for start, end in computed)
    sent = sum(piece.ops for row in found["transfer"].values() for piece in row)
    assert sent == sum(event.kind in ("send", "recv") for event in trace.prefill())


def is_compute(event: Event, rank: int) -> bool:
    return event.rank == rank and event.kind in COMPUTE


def test_gantt_tells_a_wait_from_a_recv_to_which_nothing_was_sent() -> None:
    send = Event(0, "out", "send", 4 * S, 4 * S, 5 * S, 7 * S, "kv", 0, 0, 1)
    recv = Event(1, "in", "recv", 0, 0, 5 * S, 7 * S, "kv", 0, 0, 0)
    found = pieces(Trace.merge([[send], [recv]]))
    spans = {
        colour: {row[1]: [(p.start // S, p.end // S) for p in some] for row, some in rows.items()}
        for colour, rows in found.items()
    }
    assert spans["open"] == {"in": [(0, 4)]}
    assert spans["wait"] == {"out": [(4, 5)], "in": [(4, 5)]}
    assert spans["transfer"] == {"out": [(5, 7)], "in": [(5, 7)]}
    assert spans["bubble"] == {"out": [(0, 4)], "in": [(0, 4)]}  # from when rank 1 posted its recv
    assert found["wait"][0, "out"][0].text == "send kv c0 l0 → 1"


def test_gantt_puts_together_what_cannot_be_told_apart() -> None:
    tiny = [Piece(n * 10, n * 10 + 5, f"op {n}") for n in range(5)]
    found = joined([*tiny, Piece(50, 900, "long"), Piece(905, 910, "op 5")], 100)
    assert found[0].text == "op 0 … op 4"
    assert found == [
        Piece(0, 45, "op 0", 5, "op 4"),
        Piece(50, 900, "long"),
        Piece(905, 910, "op 5"),
    ]
    assert joined(tiny, 0) == tiny


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 60)), max_size=30), st.integers(0, 40))
def test_joining_loses_no_op_and_moves_no_end(spans: list[tuple[int, int]], fine: int) -> None:
    some = [Piece(start, start + long, "op") for start, long in spans]
    found = joined(some, fine)
    assert sum(piece.ops for piece in found) == len(some)
    assert min((p.start for p in found), default=0) == min((p.start for p in some), default=0)
    assert max((p.end for p in found), default=0) == max((p.end for p in some), default=0)


def test_many_lanes_share_rows() -> None:
    assert ("kv-in:0") in {lane for _, lane in rows_of(on_paper())}
    rows = rows_of(on_paper(16, 4, 8))
    assert len(rows) <= MOST_ROWS
    assert rows[:3] == [(0, "compute"), (0, "hidden"), (0, "kv")]


def test_rows_too_low_for_names_have_one_for_each_rank() -> None:
    axis = gantt(on_paper(32, 1, 32)).layout.yaxis
    assert list(axis.ticktext) == [f"rank {rank}" for rank in range(32)]
    rows = rows_of(on_paper(32, 1, 32))
    assert [rows[n] for n in axis.tickvals] == [(rank, "compute") for rank in range(32)]
    assert axis.tickfont.size >= 10


# -- matrix, exposure


@pytest.mark.parametrize(("ranks", "numbers"), [(3, True), (8, True), (24, False)])
def test_matrices_of_many_ranks_stand_two_by_two_and_say_what_colours_mean(ranks: int, numbers: bool) -> None:
    figure = matrix(on_paper(ranks, 2, ranks))
    titles = [one.text for one in figure.layout.annotations]
    assert len(titles) == len(figure.data) == 4
    assert all(bool(heat.texttemplate) == numbers for heat in figure.data)
    assert all("(dark) to" in title for title in titles) != numbers
    wide = figure.layout.xaxis.domain[1] - figure.layout.xaxis.domain[0]
    assert (wide > 0.4) == (ranks > 4)
    low = min(value for row in figure.data[0].z for value in row if value is not None)
    assert numbers or titles[0].startswith(f"MB: {short(low)} (dark)")


def test_the_parts_of_a_rank_make_a_whole() -> None:
    bars = exposure(recorded()).data
    for n, share in enumerate(shares(recorded()).ranks):
        assert sum(bar.x[n] for bar in bars) == pytest.approx(100)
        assert sum(bar.customdata[n] for bar in bars) == pytest.approx(share.prefill_s)
        exposed = sum(bar.x[n] for bar in bars if bar.name.startswith("exposed"))
        assert exposed == pytest.approx(100 * share.exposed_s / share.prefill_s)
