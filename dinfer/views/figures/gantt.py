"""Gantt: what each lane did over time: compute, wait, transfer, or bubbles, with nothing to do.

Each of these is a single line with gaps, however many ops there are; ops too short to be distinguished are merged.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go

from dinfer.trace.events import COLLECTIVES, Event
from dinfer.trace.events import COMPUTE as COMPUTING
from dinfer.trace.shares import shares, without_pauses
from dinfer.trace.trace import Trace
from dinfer.trace.transfers import transfers
from dinfer.views.figures.style import BUBBLE, COMPUTE, OWN_CODE, WAIT, WIRE, styled

COLOURS = {"open": BUBBLE, "bubble": BUBBLE, "wait": WAIT, "transfer": WIRE, "compute": COMPUTE}
"""in the order of drawing; `open`: a recv to which nothing has been sent yet, as a thin line"""

FINE, POINTS = 4000, 120_000
"""time steps of the figure, fewer for many rows: at most POINTS in all rows; ops within one step are merged"""

MOST_ROWS = 42

IDLE = "nothing to do until another rank has computed"

LEGIBLE = 10
"""pixels of the lowest rows that all have names"""


class Piece(NamedTuple):
    """A coloured stretch of a row, in nanoseconds since the run began: an op, or several from `first` to `last`, as
    events or texts. Its text is made only once it is known to be drawn."""

    start: int
    end: int
    first: Event | str
    ops: int = 1
    last: Event | str = ""

    @property
    def text(self) -> str:
        several = f" … {_op_text(self.last)}" if self.last else ""
        return f"{_op_text(self.first)}{several}"


def _op_text(op: Event | str) -> str:
    """For example `send kv c0 l0 → 1`."""
    if isinstance(op, str):
        return op
    return op.name if op.peer is None else f"{op.name} {'→' if op.kind == 'send' else '←'} {op.peer}"


GanttRow = tuple[int, str]
"""(rank, lane)"""

Pieces = dict[str, dict[GanttRow, list[Piece]]]
"""by colour and row"""


def gantt(trace: Trace, *, dark: bool = False) -> go.Figure:
    """Lanes over time, without pauses; with many ranks, lanes of one kind share a row."""
    trace = without_pauses(trace)
    rows = rows_of(trace)
    found = pieces(trace)
    height = max(9, min(20, 620 // max(1, len(rows))))
    words = {"compute": OWN_CODE} if trace.is_watched else {}
    lines = [_line(colour, words.get(colour, colour), found[colour], rows, height) for colour in COLOURS]
    figure = go.Figure(lines)
    ends = [trace.ended(rank) - trace.began for rank in trace.ranks]
    figure.update_xaxes(title={"text": "seconds since the run began"}, range=[0, max(ends, default=0) / 1e9])
    named = {n: f"rank {rank} {lane}" for n, (rank, lane) in enumerate(rows)}
    if height < LEGIBLE:  # the first row of each rank only
        named = {n: f"rank {rank}" for n, (rank, _) in enumerate(rows) if n == 0 or rows[n - 1][0] != rank}
    figure.update_yaxes(
        tickvals=list(named),
        ticktext=list(named.values()),
        range=[len(rows) - 0.4, -0.6],
        showgrid=False,
        zeroline=False,
        tickfont={"size": max(LEGIBLE, min(12, height))},
    )
    return styled(figure, dark=dark, height=105 + height * len(rows), legend_traceorder="reversed")


def rows_of(trace: Trace) -> list[GanttRow]:
    """A row per lane, each rank's compute first; if these are too many, a row per rank and kind of lane."""
    known = {(event.rank, event.lane) for event in trace.prefill()}
    known |= {(event.rank, event.lane) for rank in trace.ranks for event, _ in trace.unended(rank)}
    lanes = sorted(known, key=_order)
    if len(lanes) <= MOST_ROWS:
        return lanes
    return sorted({(rank, _kind(lane)) for rank, lane in lanes}, key=_order)


def _kind(lane: str) -> str:
    """kv-out:1 → kv; hidden-in → hidden."""
    return lane.partition(":")[0].partition("-")[0]


def _order(row: GanttRow) -> tuple[int, bool, str]:
    rank, lane = row
    return rank, lane != "compute", lane


def pieces(trace: Trace) -> Pieces:
    """The pieces to draw, those too short to be distinguished merged."""
    rows, began = rows_of(trace), trace.began
    shown = set(rows)
    # For each recv, when there was something to receive.
    offered: dict[tuple[object, ...], int] = {
        (*t.link, t.what, t.chunk, t.layer, t.end): t.offered for t in transfers(trace)
    }
    found: Pieces = {colour: defaultdict(list) for colour in COLOURS}
    compute, transfer = found["compute"], found["transfer"]
    for event in trace.prefill():
        row = (event.rank, event.lane)
        if row not in shown:
            row = event.rank, _kind(event.lane)
        if event.kind in COMPUTING:
            compute[row].append(Piece(event.met - began, event.end - began, event))
            continue
        transfer[row].append(Piece(event.met - began, event.end - began, event))
        if event.met > event.start and (event.kind in ("send", "recv") or event.kind in COLLECTIVES):
            key = (event.peer, event.rank, event.what, event.chunk, event.layer, event.end)
            begun = max(event.start, offered.get(key, event.start))
            if begun > event.start:
                found["open"][row].append(Piece(event.start - began, begun - began, event))
            if event.met > begun:
                found["wait"][row].append(Piece(begun - began, event.met - began, event))
    for share in shares(trace).ranks:
        first = next(row for row in rows if row[0] == share.rank)
        found["bubble"][first] = [Piece(start - began, end - began, IDLE) for start, end in share.bubble]
        for event, (start, end) in trace.unended(share.rank):
            row = event.rank, event.lane
            found["open"][row if row in shown else first].append(Piece(start - began, end - began, event))
        if trace.is_watched:
            compute[first] = [Piece(start - began, end - began, OWN_CODE) for start, end in share.compute]
    steps = max(1, min(FINE, POINTS // max(1, len(rows))))
    fine = max((event.end - began for event in trace.prefill()), default=0) // steps
    # The thin lines, which lie under all others, are merged more coarsely.
    coarse = {"open": 25 * fine}
    return {
        colour: {row: joined(some, coarse.get(colour, fine)) for row, some in by_row.items()}
        for colour, by_row in found.items()
    }


def joined(some: Iterable[Piece], fine: int) -> list[Piece]:
    """Merge neighbours that are shorter than `fine` and closer than `fine`."""
    found: list[Piece] = []
    together: list[Piece] = []
    end = 0
    for piece in sorted(some, key=itemgetter(0)):
        is_short = piece.end - piece.start < fine
        if together and is_short and piece.start - end < fine and together[0].end - together[0].start < fine:
            together.append(piece)
            end = max(end, piece.end)
            continue
        found += _merged(together, end)
        together, end = [piece], piece.end
    return [*found, *_merged(together, end)]


def _merged(together: Sequence[Piece], end: int) -> Sequence[Piece]:
    """These pieces as one."""
    if len(together) < 2:
        return together
    ops = sum(piece.ops for piece in together)
    return [Piece(together[0].start, end, together[0].first, ops, together[-1].first)]


def _line(
    colour: str, name: str, by_row: dict[GanttRow, list[Piece]], rows: Sequence[GanttRow], height: int
) -> go.Scatter:
    numbers = {row: number for number, row in enumerate(rows)}
    x, y, texts = list[float](), list[float](), list[str]()
    word = "nothing sent yet" if colour == "open" else name
    for row, some in by_row.items():
        for piece in some:
            several = f"{piece.ops} ops: " if piece.ops > 1 else ""
            hover = f"{several}{piece.text}<br>{word}, {(piece.end - piece.start) / 1e6:.3g} ms"
            x += [piece.start / 1e9, piece.end / 1e9, np.nan]
            y += [numbers[row]] * 2 + [np.nan]
            texts += [hover, hover, ""]
    width = height * (0.2 if colour == "open" else 0.75)
    return go.Scatter(
        name=name,
        mode="lines",
        line={"color": COLOURS[colour], "width": width, "simplify": False},
        showlegend=colour != "open",
        legendgroup="bubble" if colour == "open" else colour,
        x=np.array(x, np.float32),
        y=np.array(y, np.float32),
        text=texts,
        hovertemplate="%{text}<extra></extra>",
        connectgaps=False,
    )
