"""Latency of transfers by link: over time, as a distribution, by layer."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from math import ceil, floor, log10
from operator import attrgetter
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from dinfer.trace.events import block_text
from dinfer.trace.shares import without_pauses
from dinfer.trace.trace import Trace
from dinfer.trace.transfers import (
    Spread,
    Transfer,
    by_link,
    percentile,
    spread,
    transfers,
)
from dinfer.views.figures.style import SCALE, link_line, link_marker, link_name, styled

PER_LINK = 400
"""points per link and plot; of more transfers, the slowest of every few"""

SHORTEST_MS = 0.001

NAMED_LINKS = 12
"""links with a colour and a name: of more, the slowest ones, and the others together"""

LAYER_LINKS = 60
"""the same of links by layer, each of which is a row"""

PARTS: tuple[tuple[str, Callable[[Transfer], int]], ...] = (
    ("on the wire", lambda one: one.wire),
    ("waiting for the peer", lambda one: one.waited),
)


def latency(trace: Trace, *, dark: bool = False, per_link: int = PER_LINK) -> go.Figure:
    """Each transfer as two points, on the wire and waiting for the peer, over its time of arrival, without pauses. At
    most `per_link` transfers of a link: the slowest of every few."""
    trace = without_pauses(trace)
    found = transfers(trace)
    links = named_links(found, NAMED_LINKS)
    names = [name for name, _ in PARTS]
    figure = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.09, row_titles=names)
    for number, (name, some) in _numbered(links):
        for row, (part, take) in enumerate(PARTS, 1):
            shown = slowest(some, take, per_link)
            points = go.Scatter(
                **_of_link(name, row),
                mode="markers",
                marker=link_marker(number, len(links)),
                x=np.array([(one.end - trace.began) / 1e9 for one in shown], np.float32),
                y=_milliseconds(map(take, shown)),
                text=[transfer_text(one) for one in shown],
                hovertemplate=f"%{{text}}<br>%{{y:.3~f}} ms {part}<extra></extra>",
            )
            figure.add_trace(points, row, 1)
    for row, (_, take) in enumerate(PARTS, 1):
        figure.update_yaxes(log_ms(_milliseconds(map(take, found))), row=row, col=1)
    seconds = (max((event.end for event in trace.prefill()), default=0) - trace.began) / 1e9
    figure.update_xaxes(range=[0, seconds * 1.01])
    figure.update_xaxes(title={"text": "seconds since the run began"}, row=2, col=1)
    return styled(figure, dark=dark, height=470)


def distribution(trace: Trace, *, dark: bool = False) -> go.Figure:
    """The cumulative distribution of each link's transfer times, in milliseconds."""
    found = transfers(trace)
    links = named_links(found, NAMED_LINKS)
    names = [name for name, _ in PARTS]
    figure = make_subplots(1, 2, shared_yaxes=True, horizontal_spacing=0.04, column_titles=names)
    for number, (name, some) in _numbered(links):
        for column, (part, take) in enumerate(PARTS, 1):
            # From 0 % up, so that a single transfer is a line too.
            ordered = sorted(map(take, some))
            shares = np.linspace(0, 1, min(200, len(ordered)) + 1)
            steps = go.Scatter(
                **_of_link(name, column),
                mode="lines",
                line={**link_line(number), "shape": "hv"},
                x=_milliseconds([ordered[0], *(percentile(ordered, share) for share in shares[1:].tolist())]),
                y=(shares * 100).astype(np.float32),
                hovertemplate=f"%{{y:.0f}} % took at most %{{x:.3~f}} ms {part}<extra>{name}</extra>",
            )
            figure.add_trace(steps, 1, column)
    for column, (_, take) in enumerate(PARTS, 1):
        figure.update_xaxes(log_ms(_milliseconds(map(take, found))), row=1, col=column)
    figure.update_yaxes(title={"text": "transfers"}, ticksuffix=" %", row=1, col=1)
    figure.update_yaxes(range=[-1, 101])
    return styled(figure, dark=dark, height=350, margin={"t": 64}, legend_y=1.1)


def _of_link(name: str, part: int) -> dict[str, Any]:
    """Both parts of a link share an entry of the legend."""
    return {"name": name, "legendgroup": name, "showlegend": part == 1}


def _numbered(links: dict[str, list[Transfer]]) -> Iterable[tuple[int, tuple[str, list[Transfer]]]]:
    """Links and their transfers by number, from 0; the other links together have −1."""
    return enumerate(links.items(), -sum("→" not in name for name in links))


def layers(trace: Trace, *, dark: bool = False) -> go.Figure:
    """The 99th percentile of latency, waiting plus wire, by link and layer."""
    known = [one for one in transfers(trace) if one.layer is not None]
    links = named_links(known, LAYER_LINKS)
    latencies: dict[tuple[str, int], list[int]] = defaultdict(list)
    for name, some in links.items():
        for one in some:
            latencies[name, one.layer or 0].append(one.latency)
    found = {key: spread(some) for key, some in latencies.items()}
    numbers = sorted({layer for _, layer in found})
    grid = [[found.get((name, layer)) for layer in numbers] for name in links]
    texts: dict[Spread | None, str] = {None: "no transfers"}
    for cell in found.values():
        p50, p90, p99, longest = (f"{seconds * 1e3:.3g}" for seconds in cell[1:])
        texts[cell] = f"p50 {p50}, p90 {p90}, p99 {p99}, longest {longest} ms, {cell.number} transfers"
    heat = go.Heatmap(
        x=[f"l{number}" for number in numbers],
        y=list(links),
        z=[[cell and cell.p99 * 1e3 for cell in row] for row in grid],
        text=[[texts[cell] for cell in row] for row in grid],
        hovertemplate="%{y} %{x}: %{text}<extra></extra>",
        colorscale=SCALE,
        colorbar={"title": {"text": "p99, ms"}},
        xgap=1,
        ygap=1,
    )
    figure = go.Figure(heat)
    figure.update_xaxes(showgrid=False, type="category")
    figure.update_yaxes(showgrid=False, autorange="reversed", type="category")
    return styled(figure, dark=dark, height=110 + 22 * max(4, len(links)), margin={"t": 15})


def named_links(found: Iterable[Transfer], most: int) -> dict[str, list[Transfer]]:
    """The transfers of each link, by its name. Of more than `most` links, those with the longest transfers, after the
    transfers of all others together."""
    links = by_link(found)
    if len(links) <= most:
        return {link_name(link): some for link, some in links.items()}
    longest = {link: max(one.end - one.offered for one in some) for link, some in links.items()}
    slow = set(sorted(links, key=longest.__getitem__)[len(links) - most + 1 :])
    others = sorted(
        (one for link in sorted(links.keys() - slow) for one in links[link]),
        key=attrgetter("end", "source", "target"),
    )
    named = {link_name(link): some for link, some in links.items() if link in slow}
    return {f"{len(links) - len(slow)} other links": others, **named}


def slowest(found: list[Transfer], take: Callable[[Transfer], int], most: int) -> list[Transfer]:
    """The transfers; of more than `most`, the slowest of every few consecutive ones, so that no outlier is lost."""
    step = -(-len(found) // most)
    return [max(found[at : at + step], key=take) for at in range(0, len(found), max(1, step))]


def transfer_text(one: Transfer) -> str:
    """For example `0→1 kv c3 l5, 65,536 bytes`."""
    return f"{link_name(one.link)} {block_text(one.what, one.chunk, one.layer)}, {one.bytes:,} bytes"


def log_ms(values: NDArray[np.float32]) -> dict[str, Any]:
    """A logarithmic axis in milliseconds that covers these values and at least a decade, with few labels."""
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.1, 1.0)
    first, last = floor(log10(low)), ceil(log10(max(high, low * 10)))
    marks = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = [mark * 10.0**power for power in range(first, last + 1) for mark in marks]
    names = [f"≤ {SHORTEST_MS:g}" if tick == SHORTEST_MS else f"{tick:g}" for tick in ticks]
    room = 0.04 * (last - first)
    return {
        "type": "log",
        "title": {"text": "ms"},
        "tickvals": ticks,
        "ticktext": names,
        "range": [log10(low) - room, max(log10(high), log10(low) + 1) + room],
    }


def _milliseconds(nanoseconds: Iterable[int]) -> NDArray[np.float32]:
    """In milliseconds, at least a microsecond: a logarithmic axis has no 0."""
    return np.maximum(np.array(list(nanoseconds), np.float64) / 1e6, SHORTEST_MS).astype(np.float32)
