"""Still: the panel as HTML without scripts, for nbconvert and pages that show notebooks without a kernel.

On pages that remove pictures, the table of ranks remains. Pure.
"""

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinfer.display import badge
from dinfer.plan.plan import Plan
from dinfer.run.state import Standing
from dinfer.severity import Severity
from dinfer.trace.events import Event
from dinfer.trace.trace import Trace
from dinfer.trace.transfers import by_link, spread, transfers
from dinfer.views.bins import LEAST, PART, binned, fitting
from dinfer.views.cells import (
    ARMED,
    BASE,
    DIFFERS,
    EVERYWHERE,
    HERE,
    MARKS,
    NONFINITE,
    STATES,
    CellMap,
    CellStates,
    cut_line,
    marked,
)
from dinfer.views.figures.latency import latency
from dinfer.views.figures.matrix import short
from dinfer.views.figures.style import link_name
from dinfer.views.figures.svg import svg
from dinfer.views.status import status

STILL = (
    "A still picture of the run, as it stood when this cell was run. Run the cell again for a live panel, with a new "
    "kernel also those before it. If that shows a picture, too: <code>pip install ipywidgets anywidget</code> in the "
    "environment of the Jupyter server."
)

COLOURS = ("#e9edf1", "#f4c430", "#2672b3", "#e07b39", "#14385c")
"""of states, on white, as in panel.css; they differ in lightness"""

MARK_LOOKS = {
    DIFFERS: ("differs", MARKS[0], "#d81b60"),
    ARMED: ("armed", MARKS[1], "#7b3fa0"),
    NONFINITE: ("nonfinite", MARKS[2], "#00897b"),
}
"""class, name and colour"""

EVENTS = 50_000
"""events from which links are shown, the newest: as many as do not make a notebook wait"""

_LEFT, _TOP = 34, 18

WIDE, HIGH = 720, 400
"""pixels of the cells of a map, at most"""

LEAST_MARK = 7
"""pixels of a mark, at least: more than those of a small cell"""


def still_html(
    plan: Plan, standing: Standing, labels: Sequence[str], events: Sequence[Event] = (), kv: str = ""
) -> str:
    """The map as SVG, a table of ranks, a table and a figure of links, and `kv`: HTML of KV."""
    bare = CellMap(plan).states(standing.stands)
    states = marked(bare, standing.marks)
    shown = status(plan, standing)
    held = np.isin(bare, (HERE, EVERYWHERE)).sum(axis=(0, 1))
    words = (
        shown["state"],
        shown["over"],
        shown["message"],
        shown["nonfinite"],
        *shown["faults"],
        shown["call"],
    )
    level = max(standing.severity, Severity.NOTE if standing.over else standing.state.severity)
    remedy = f"<div>to go on: <code>{escape(standing.remedy)}</code></div>" if standing.remedy else ""
    # Of NaN and Inf, the first is in the words.
    marks = [mark for mark in standing.marks if "nonfinite" not in mark.kind]
    known = "".join(f"<li>{badge(mark.severity)}{escape(mark.text)}</li>" for mark in marks[:20])
    known += f"<li>and {len(marks) - 20:,} more</li>" if len(marks) > 20 else ""
    return (
        f"<div><div>{badge(level)}dinfer: {escape('; '.join(filter(None, words)))}</div>{remedy}"
        f"<div><small>{STILL}</small></div>"
        f"{map_svg(states, plan.shape.owners, labels)}"
        "<div><small>A cell's parts are the ranks, left to right; the line, the cut, separates computed blocks "
        "from the others.</small></div>"
        f"{_ranks(shown['ranks'], held.tolist(), plan.shape.blocks)}{f'<ul>{known}</ul>' if known else ''}"
        f"{kv}{_links(events)}</div>"
    )


def _ranks(lines: Sequence[dict[str, Any]], held: Sequence[int], blocks: int) -> str:
    """A row for each rank."""
    columns = {
        "rank": [str(rank) for rank in range(len(lines))],
        "device": [escape(line["device"]) for line in lines],
        "memory": [line["memory"] for line in lines],
        "state": [line["state"] for line in lines],
        "blocks held": [f"{has} of {blocks}" for has in held],
        "new tokens": [str(line["tokens"]) for line in lines],
        "position": [escape(line["where"]) for line in lines],
    }
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    head = "".join(f"<th>{name}</th>" for name in shown)
    rows = "".join(
        f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells[:-1])}<td style='text-align:left'>{cells[-1]}</td></tr>"
        for cells in zip(*shown.values(), strict=True)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _links(events: Sequence[Event]) -> str:
    """A row for each link with transfers, and their latencies over time; of many events, from the newest."""
    newest = sorted(events, key=lambda event: event.end)[-EVENTS:]
    said = f"<div>the newest {EVENTS:,} of {len(events):,} events</div>" if len(events) > EVENTS else ""
    trace = Trace.merge([newest])
    found = by_link(transfers(trace))
    if not found:
        return ""
    rows = ""
    for link, some in found.items():
        wire, waited = spread(one.wire for one in some), spread(one.waited for one in some)
        megabytes = f"{sum(one.bytes for one in some) / 1e6:.3g}"
        times = (short(seconds * 1e3) for seconds in (wire.p50, wire.p99, waited.p50, waited.p99))
        cells = (link_name(link), len(some), megabytes, *times)
        rows += f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    return (
        f"{said}<table><thead><tr><th>link</th><th>transfers</th><th>MB</th><th>wire, median ms</th><th>99th</th>"
        f"<th>waiting for the peer, median ms</th><th>99th</th></tr></thead><tbody>{rows}</tbody></table>"
        f"{svg(latency(trace, per_link=100))}"
    )


def map_svg(
    states: CellStates, owners: Sequence[int], labels: Sequence[str], names: Sequence[str] = STATES
) -> str:
    """The map: layers × chunks, each cell split by rank, with the cut as a line; a large one in bins, and says so.
    `names`: of states, those of a run if not given; of others there is no cut."""
    size = fitting(states.shape, WIDE, HIGH)
    cells = binned(states, size)
    rows, columns, parts = cells.shape
    part = max(PART, min(16, WIDE // (columns * parts)))
    across, down = part * parts, max(LEAST, min(18, HIGH // rows))
    right, bottom = _LEFT + across * columns, _TOP + down * rows
    bare = (cells & BASE).astype(np.uint8)
    looks = [(f"s{state}", name, COLOURS[state]) for state, name in enumerate(names)]
    drawn = [_path(bare == state, look, part, down, down) for state, look in enumerate(looks)]
    marks = [look for mark, look in MARK_LOOKS.items() if (cells & mark).any()]
    drawn_marks = [
        _path((cells & mark) > 0, MARK_LOOKS[mark], part, down, high, LEAST_MARK)
        for mark, high in ((DIFFERS, down), (NONFINITE, down // 2), (ARMED, down // 3))
    ]
    grid = ""
    if across > 6 and down > 5:  # lines between smaller cells would hide their colours
        grid += "".join(f"M{_LEFT + across * c} {_TOP}V{bottom}" for c in range(columns + 1))
        grid += "".join(f"M{_LEFT} {_TOP + down * n}H{right}" for n in range(rows + 1))
    per_chunk, per_layer = across / size.chunks, down / size.layers
    stages = "".join(
        f"M{_LEFT} {_TOP + per_layer * n:g}H{right}"
        for n in range(1, len(states))
        if owners[n] != owners[n - 1]
    )
    is_run = names is STATES
    cut = [_TOP + per_layer * depth for depth in cut_line((states & BASE).astype(np.uint8))]
    steps = f"M{_LEFT} {cut[0]:g}" + "".join(f"V{y:g}h{per_chunk:g}" for y in cut) if is_run else ""
    longest = 12 + 6 * len(str(len(labels)))
    tops = "".join(
        f'<text x="{_LEFT + across * c}" y="{_TOP - 5}"><title>{escape(labels[c * size.chunks])}</title>'
        f"c{c * size.chunks}</text>"
        for c in range(0, columns, -(-longest // across))
    )
    lefts = "".join(
        f'<text x="{_LEFT - 5}" y="{_TOP + down * n + down / 2 + 3.5}" text-anchor="end">l{n * size.layers}</text>'
        for n in range(0, rows, -(-11 // down))
    )
    legend, x, y = "", _LEFT, bottom + 12
    for which, name, colour in looks + marks:
        legend += (
            f'<rect class="{which}" x="{x}" y="{y}" width="10" height="10" fill="{colour}" stroke="#999"/>'
        )
        legend += f'<text x="{x + 14}" y="{y + 9}" fill="#333">{name}</text>'
        x += 26 + 6 * len(name)
    if size.text:
        said = f"{size.text}: a mark, or the most urgent state of its blocks"
        legend += f'<text x="{_LEFT}" y="{y + 24}" fill="#333">{said}</text>'
    wide, high = max(right + 8, 800 if marks else 560, x), bottom + (42 if size.text else 26)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" width="{wide}" height="{high}" '
        'role="img" style="background:#fff;max-width:100%;height:auto" font-family="sans-serif" font-size="10">'
        f"<title>blocks by layer and chunk, each split by rank</title>{''.join(drawn)}"
        f'<path class="grid" d="{grid}" stroke="#fff"/>'
        f'<path d="{stages}" stroke="#555" stroke-dasharray="3 2"/>'
        f'<path class="cut" d="{steps}" fill="none" stroke="#b3125b" stroke-width="2.5"/>'
        f'{"".join(drawn_marks)}<g fill="#333">{tops}{lefts}</g>{legend}</svg>'
    )


def _path(
    which: NDArray[np.bool_], look: tuple[str, str, str], part: int, down: int, high: int, least: int = 0
) -> str:
    """The upper part, so high, of these cells as one path; neighbours in a row are one rectangle. `least`: the width
    and height of a rectangle at least, around its cells."""
    name, _, colour = look
    pieces, tall = [], max(high, least)
    for layer, row in enumerate(which.reshape(len(which), -1)):
        edges = np.flatnonzero(np.diff(row, prepend=False, append=False))
        y = max(_TOP, _TOP + layer * down - max(0, tall - down) // 2)
        for begin, end in edges.reshape(-1, 2).tolist():
            wide = max(least, (end - begin) * part)
            x = max(_LEFT, _LEFT + begin * part - (wide - (end - begin) * part) // 2)
            pieces.append(f"M{x} {y}h{wide}v{tall}h-{wide}z")
    edge = ' stroke="#fff"' if least else ""
    return f'<path class="{name}" d="{"".join(pieces)}" fill="{colour}"{edge}/>' if pieces else ""
