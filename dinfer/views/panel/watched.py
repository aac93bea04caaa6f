"""The panel of programs under watch: their verdict, their ranks, what went between these, and where they stand.

It shows, and moves nothing: the programs are other people's. The kernel makes its parts as HTML without scripts, which
is its still picture, too; the browser's side is SCRIPTS.
"""

import linecache
import time
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from threading import Event as Flag
from threading import Thread

import numpy as np
from traitlets import Dict

from dinfer.display import badge
from dinfer.severity import Severity
from dinfer.trace.events import Event
from dinfer.trace.trace import Trace
from dinfer.verdict.completed import OpFinding
from dinfer.verdict.matching import MAKING
from dinfer.verdict.verdict import Verdict
from dinfer.views.cells import CellStates
from dinfer.views.figures.gantt import gantt
from dinfer.views.figures.svg import svg
from dinfer.views.panel.slotted import SlottedWidget, texts_of
from dinfer.views.still import map_svg
from dinfer.watching.evidence import Evidence
from dinfer.watching.figures import table_of
from dinfer.watching.kv import WatchedKv
from dinfer.watching.live import Watch, WatchMoment

REFRESH_S, SHARE = 1.0, 0.1
"""seconds between two looks, and the part of the time that making the page may take"""

EVENTS = 2000
"""the newest, which are drawn"""

MOST_LINES = 5
"""findings that are shown"""

MOST_CELLS = 1 << 20
"""of the map: numbers of layers and chunks are other people's, and may be anything"""

LEAST_WAIT_NS = 1_000_000
"""so long a wait that has not ended is drawn, at least"""

BLOCKS = ("not yet", "under way", "done")
"""states of a rank's ops in a layer and chunk"""

BEHIND = (
    "rows come faster than they are read here, and are compared later: <code>.kv().diff()</code> reads all"
)

MOST_ROWS = 5000
"""of KV, by which the cell that shows a panel waits for their comparison; more are compared once it is there"""

TO_COME = "the ranks' rows are being compared"

SCRIPTS = ("controls.js", "slots.js", "watched.js")
"""concatenated, they are one module"""


class WatchPanel(SlottedWidget):
    """Display it as the last line of a cell; it follows the watch, also while cells run. `close()` removes it."""

    _esm = texts_of(SCRIPTS)
    parts = Dict().tag(sync=True)
    """HTML by the name of each part, in their order"""

    def __init__(self, watch: Watch) -> None:
        self._watch, self._closed = watch, Flag()
        self._text, self._is_behind = "", False
        super().__init__(parts=self._made(MOST_ROWS))
        self._thread = Thread(target=self._follow, name="dinfer watch panel", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Remove the panel from the page; the watch goes on."""
        self._closed.set()
        super().close()

    def still(self) -> str:
        """The parts below one another."""
        return f"<div>{''.join(f'<div>{html}</div>' for html in self.parts.values())}</div>"

    def __repr__(self) -> str:
        return self._text

    def _follow(self) -> None:
        pause = 0.0 if self._is_behind else REFRESH_S
        while not self._closed.wait(pause):
            began = time.monotonic()
            is_over = self._watch.is_over
            self.parts = self._made()
            if is_over and not self._is_behind:
                return
            if not is_over:
                self._watch.ask_stacks()
            pause = max(REFRESH_S, (time.monotonic() - began) / SHARE)

    def _made(self, most_rows: int | None = None) -> dict[str, str]:
        """`most_rows`: of KV, if more are not to be compared now."""
        try:
            moment = self._watch.moment()
            kv = moment.evidence.kv
            compares = most_rows is None or _rows_in(kv) <= most_rows
            parts = parts_of(moment, compares=compares)
            self._is_behind = kv.is_behind or not compares
            said = moment.text(moment.evidence.op_findings)  # KV's are in its part: comparing takes time
            self._text = f"{moment.title}\n{said}".strip()
            return parts
        except Exception as error:  # nothing else would report it
            text = f"the watch cannot be shown: {type(error).__name__}: {error}"
            self._text = text
            return {**self.parts, "banner": _line(Severity.ERROR, text)}


def parts_of(moment: WatchMoment, *, compares: bool = True) -> dict[str, str]:
    """The panel's parts as HTML, in their order; "" for those that there is nothing to show in. `compares`: whether the
    KV of ranks, which takes seconds for long ones."""
    found = moment.evidence
    return {
        "banner": _banner(moment),
        "table": _ranks(found, moment.verdict),
        "kv": _kv(found.kv, compares=compares),
        "blocks": _blocks(found),
        "timeline": _timeline(found),
        "links": _links(found),
        "stacks": _stacks(found),
    }


def _banner(moment: WatchMoment) -> str:
    lines = [_line(Severity.NOTE, moment.title)]
    if moment.verdict:
        lines.append(_line(moment.verdict.severity, moment.verdict.sentence))
    return "".join([*lines, _warnings(moment.evidence.op_findings, "watch.findings")])


def _warnings(findings: Sequence[OpFinding], rest: str) -> str:
    """The first findings; `rest`: what has all of them."""
    lines = [one.text for one in findings[:MOST_LINES]]
    if len(findings) > MOST_LINES:
        lines.append(f"and {len(findings) - MOST_LINES} more: {rest}")
    return "".join(_line(Severity.WARNING, text) for text in lines)


def _line(severity: Severity, text: str) -> str:
    said = f'<span class="dinfer-said">{escape(text)}</span>'
    return f'<div class="dinfer-line" data-severity="{severity.word}">{badge(severity)}{said}</div>'


def _ranks(found: Evidence, verdict: Verdict | None) -> str:
    """A row for each rank: what it does, and the line of code, where its file is here."""
    blamed = verdict.ranks[:1] if verdict else ()
    rows = ""
    for rank in found.ranks if found.processes and found.trace.events else ():
        process, event = found.processes.get(rank), found.at(rank)
        place = f"{process.host} {process.pid}" if process else ""
        rank_text = f"✖ {rank}" if rank in blamed else str(rank)
        ops = process.dropped + len(process.ops) if process else 0
        doing = f"{escape(found.where(rank))}{_code(event)}"
        cells = (rank_text, escape(place), f"{ops:,}")
        rows += f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}<td {_LEFT}>{doing}</td></tr>"
    if not rows:
        return "<div>no rank has begun yet: processes are seen once they use torch.distributed</div>"
    head = f"<th>rank</th><th>process</th><th>ops</th><th {_LEFT}>what it does</th>"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


_LEFT = 'style="text-align:left"'


def _code(event: Event | None) -> str:
    """The line of the last op, from its file."""
    call = event.call if event else None
    text = linecache.getline(call.file, call.line).strip() if call and call.line else ""
    return f"<br><code>{call.line}: {escape(text)}</code>" if call and text else ""


def _blocks(found: Evidence) -> str:
    """The map, where layers are known: which rank has come how far."""
    events = [event for event in found.trace.events if event.layer is not None]
    layers = 1 + max((event.layer or 0 for event in events), default=-1)
    chunks = 1 + max((event.chunk or 0 for event in events), default=-1)
    ranks = 1 + max((event.rank for event in events), default=-1)
    least = min((min(event.layer or 0, event.chunk or 0) for event in events), default=0)
    if not events or least < 0 or layers * chunks * ranks > MOST_CELLS:
        return ""
    states: CellStates = np.zeros((layers, chunks, ranks), np.uint8)
    for event in sorted(events, key=lambda event: not event.end):  # what is under way last
        states[event.layer, event.chunk or 0, event.rank] = 2 if event.end else 1
    picture = map_svg(states, [0] * layers, [f"chunk {chunk}" for chunk in range(chunks)], BLOCKS)
    about = "Ops by layer and chunk; a cell's parts are the ranks, left to right."
    return f"{_head('layers and chunks')}{picture}<div><small>{about}</small></div>{_of_last(found)}"


def _rows_in(kv: WatchedKv) -> int:
    return sum(len(held.rows) for layers in kv.layers.values() for held in layers.values())


def _kv(kv: WatchedKv, *, compares: bool) -> str:
    """What is wrong with the KV, and how many tokens of each layer the ranks hold."""
    table = kv.table()
    if not len(table):
        return ""
    # Of ranks that have been read to different places each would lack what another has.
    if kv.is_behind:
        wrong = f"<div>{BEHIND}</div>"
    else:
        wrong = _warnings(kv.diff(), "watch.kv().diff()") if compares else f"<div>{TO_COME}</div>"
    held = (
        f'<details data-rank="kv"><summary>tokens by layer and rank</summary>{table._repr_html_()}</details>'
    )
    return f"{_head('KV')}{wrong}{held}"


def _timeline(found: Evidence) -> str:
    """The newest ops over time. Those that have not ended are cut off soon after the others, which they would hide."""
    events = [event for event in found.trace.events if event.kind not in MAKING]
    newest = sorted(events, key=lambda event: event.end or event.start)[-EVENTS:]
    if not newest:
        return ""
    began, latest = min(event.ready for event in newest), max(max(event.start, event.end) for event in newest)
    cut = latest + max((latest - began) // 8, LEAST_WAIT_NS)
    now = found.now_ns or cut
    drawn = [event if event.end else replace(event, met=min(now, cut), end=min(now, cut)) for event in newest]
    figure = gantt(Trace.merge([drawn]))
    figure.data = [line for line in figure.data if line.name in ("open", "wait", "transfer")]
    notes = []
    if now > cut and any(not event.end for event in newest):
        notes.append("waits that have not ended are cut off at the right")
    if len(events) > EVENTS:
        notes.append(f"the newest {EVENTS:,} of {len(events):,} ops")
    said = f"<div><small>{'; '.join(notes)}</small></div>" if notes else ""
    return f"{_head('communication')}{svg(figure)}{said}"


def _links(found: Evidence) -> str:
    table = table_of(found.trace)
    return f"{table._repr_html_()}{_of_last(found)}" if len(table) else ""


def _of_last(found: Evidence) -> str:
    """That older ops are not counted, where there are any: a live look takes the last ones only."""
    if not any(process.dropped for process in found.processes.values()):
        return ""
    all_of_them = "<code>.links()</code> and <code>.trace</code> have all"
    return f"<div><small>of the last ops of each rank; {all_of_them}</small></div>"


def _stacks(found: Evidence) -> str:
    """Where Python stands, by rank, as it was last asked."""
    texts = {rank: found.stack(rank) for rank in found.ranks}
    folds = "".join(
        f'<details data-rank="{rank}"><summary>rank {rank}: {escape(_top(text))}</summary>'
        f"<pre>{escape(text)}</pre></details>"
        for rank, text in texts.items()
        if text
    )
    return f"{_head('stacks')}{folds}" if folds else ""


def _top(text: str) -> str:
    """The innermost line that a stack names."""
    lines = [line.strip() for line in text.splitlines() if not line.startswith("thread")]
    return lines[0] if lines else ""


def _head(text: str) -> str:
    return f"<div><b>{text}</b></div>"
