"""Still: the panel's picture as HTML without script or kernel, for nbconvert and pages that show notebooks.

Where a page takes pictures out, the table of ranks is left. Pure.
"""

from collections.abc import Sequence
from html import escape

import numpy as np

from dinfer.plan.plan import Plan
from dinfer.views.cells import EVERYWHERE, HERE, STATES, CellMap, States, cut_line
from dinfer.views.protocol import Standing
from dinfer.views.status import status

COLOURS = ("#e9edf1", "#f4c430", "#2672b3", "#e07b39", "#14385c")
"""of each state on white, as in panel.css; each differs from the others in lightness"""
_LEFT, _TOP = 34, 18


def still_html(plan: Plan, standing: Standing, labels: Sequence[str]) -> str:
    """The map as SVG, and what each rank does and holds as a table."""
    states = CellMap(plan).states(standing.stands)
    shown = status(plan, standing)
    held = np.isin(states, (HERE, EVERYWHERE)).sum(axis=(0, 1))
    rows = "".join(
        f"<tr><td>{rank}</td><td>{escape(line['device'])}</td><td>{line['state']}</td>"
        f"<td>{held[rank]} of {plan.shape.blocks}</td>"
        f"<td style='text-align:left'>{escape(line['where'])}</td></tr>"
        for rank, line in enumerate(shown["ranks"])
    )
    words = "; ".join(filter(None, (shown["state"], shown["message"], *shown["faults"], shown["call"])))
    return (
        f"<div><div>dinfer: {escape(words)}</div>{map_svg(states, plan.shape.owners, labels)}"
        "<table><thead><tr><th>rank</th><th>device</th><th>state</th><th>blocks held</th><th>position</th></tr>"
        f"</thead><tbody>{rows}</tbody></table>"
        "<small>A cell's parts are the ranks, left to right; the line, the cut, parts what has been computed from "
        "what has not. A still picture: the live panel needs a running kernel, and ipywidgets and anywidget where the "
        "Jupyter server runs.</small></div>"
    )


def map_svg(states: States, owners: Sequence[int], labels: Sequence[str]) -> str:
    """Layers × chunks, each cell split by rank; the cut as a line."""
    layers, chunks, ranks = states.shape
    part = max(2, min(16, 640 // (chunks * ranks)))
    across, down = part * ranks, max(4, min(18, 360 // layers))
    right, bottom = _LEFT + across * chunks, _TOP + down * layers
    paths = "".join(_path(states, state, part, down) for state in range(len(STATES)))
    grid = "".join(f"M{_LEFT + across * c} {_TOP}V{bottom}" for c in range(chunks + 1))
    grid += "".join(f"M{_LEFT} {_TOP + down * n}H{right}" for n in range(layers + 1))
    stages = "".join(
        f"M{_LEFT} {_TOP + down * n}H{right}" for n in range(1, layers) if owners[n] != owners[n - 1]
    )
    cut = [_TOP + down * depth for depth in cut_line(states)]
    steps = f"M{_LEFT} {cut[0]}" + "".join(f"V{y}h{across}" for y in cut)
    names = _names(states, across, down, labels)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{max(right + 8, 560)}" height="{bottom + 26}" role="img" '
        'style="background:#fff" font-family="sans-serif" font-size="10">'
        f"<title>blocks by layer and chunk, each split by rank</title>{paths}"
        f'<path class="grid" d="{grid}" stroke="#fff"/>'
        f'<path d="{stages}" stroke="#555" stroke-dasharray="3 2"/>'
        f'<path class="cut" d="{steps}" fill="none" stroke="#b3125b" stroke-width="2.5"/>'
        f"{names}{_legend(bottom + 12)}</svg>"
    )


def _path(states: States, state: int, part: int, down: int) -> str:
    """All cells of one state as one path; neighbours in a row are one rectangle."""
    rows = states.reshape(states.shape[0], -1) == state
    pieces = []
    for layer, row in enumerate(rows):
        edges = np.flatnonzero(np.diff(row, prepend=False, append=False))
        for begin, end in edges.reshape(-1, 2).tolist():
            wide = (end - begin) * part
            pieces.append(f"M{_LEFT + begin * part} {_TOP + layer * down}h{wide}v{down}h-{wide}z")
    return f'<path class="s{state}" d="{"".join(pieces)}" fill="{COLOURS[state]}"/>' if pieces else ""


def _names(states: States, across: int, down: int, labels: Sequence[str]) -> str:
    layers, chunks, _ = states.shape
    every_chunk, every_layer = -(-24 // across), -(-11 // down)
    tops = "".join(
        f'<text x="{_LEFT + across * c}" y="{_TOP - 5}"><title>{escape(labels[c])}</title>c{c}</text>'
        for c in range(0, chunks, every_chunk)
    )
    lefts = "".join(
        f'<text x="{_LEFT - 5}" y="{_TOP + down * n + down / 2 + 3.5}" text-anchor="end">l{n}</text>'
        for n in range(0, layers, every_layer)
    )
    return f'<g fill="#333">{tops}{lefts}</g>'


def _legend(y: int) -> str:
    """One line under the map."""
    pieces, x = [], _LEFT
    for state, name in enumerate(STATES):
        pieces.append(
            f'<rect class="s{state}" x="{x}" y="{y}" width="10" height="10" fill="{COLOURS[state]}" stroke="#999"/>'
        )
        pieces.append(f'<text x="{x + 14}" y="{y + 9}" fill="#333">{name}</text>')
        x += 26 + 6 * len(name)
    return "".join(pieces)
