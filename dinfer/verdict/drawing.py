"""Who waits for whom, as a small SVG picture or a few lines of text. Pure; all texts are escaped."""

from collections.abc import Sequence
from html import escape
from math import cos, hypot, pi, sin
from typing import NamedTuple

from dinfer.plan.plan import Plan
from dinfer.plan.verify import Counterexample

WIDTH, HEIGHT = 170, 40
"""of a box"""

MARGIN = 46

LONGEST = 26
"""characters of a label; the whole text is its tooltip"""

Point = tuple[float, float]


class Box(NamedTuple):
    """A rank: its name, what it does, whether it is a culprit, and what more there is to say, for the tooltip."""

    key: int
    name: str
    text: str
    is_root: bool = False
    detail: str = ""


class Arrow(NamedTuple):
    """`source` waits for `target`; `text` says for what."""

    source: int
    target: int
    text: str


def drawing(title: str, boxes: Sequence[Box], arrows: Sequence[Arrow]) -> str:
    """An SVG with the boxes on an ellipse, clockwise from the top; two beside one another."""
    count = len(boxes)
    across, down = (max(170.0, 44.0 * count), max(80.0, 24.0 * count)) if count > 1 else (0.0, 0.0)
    first = -pi / 2
    if count == 2:
        first, down = -pi, 0.0
    middle = across + WIDTH / 2 + MARGIN, down + HEIGHT / 2 + MARGIN
    at = {}
    for number, box in enumerate(boxes):
        angle = 2 * pi * number / count + first
        at[box.key] = middle[0] + across * cos(angle), middle[1] + down * sin(angle)
    wide = 2 * middle[0]
    lowest = max((y for _, y in at.values()), default=middle[1]) + HEIGHT / 2 + MARGIN
    pairs = {(arrow.source, arrow.target) for arrow in arrows}
    drawn = [_arrow(arrow, at, (arrow.target, arrow.source) in pairs) for arrow in arrows]
    drawn += [_box(box, *at[box.key]) for box in boxes]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide:.0f}" height="{lowest:.0f}" '
        f'viewBox="0 0 {wide:.0f} {lowest:.0f}" role="img" '
        f'style="background:#fff" font-family="sans-serif" font-size="11"><title>{escape(title)}</title>'
        '<defs><marker id="dinfer-wait" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
        f'orient="auto"><path d="M0 0L8 4L0 8z" fill="#b3125b"/></marker></defs>{"".join(drawn)}</svg>'
    )


def _box(box: Box, x: float, y: float) -> str:
    fill, stroke = ("#fbe3ee", "#b3125b") if box.is_root else ("#eef2f6", "#2672b3")
    left, top, whole = x - WIDTH / 2, y - HEIGHT / 2, f"{box.name}: {box.detail or box.text}"
    return (
        f'<g><title>{escape(whole)}</title><rect x="{left:.1f}" y="{top:.1f}" width="{WIDTH}" height="{HEIGHT}" '
        f'rx="6" fill="{fill}" stroke="{stroke}" stroke-width="1.5"/>'
        f'<text x="{x:.1f}" y="{y - 4:.1f}" text-anchor="middle" font-weight="bold">{escape(box.name)}</text>'
        f'<text x="{x:.1f}" y="{y + 11:.1f}" text-anchor="middle">{escape(_short(box.text))}</text></g>'
    )


def _arrow(arrow: Arrow, at: dict[int, Point], is_answered: bool) -> str:
    """An arrow from edge to edge of the boxes; bent if there is one in the other direction too."""
    source, target = at[arrow.source], at[arrow.target]
    length = hypot(target[0] - source[0], target[1] - source[1]) or 1.0
    bend = 26.0 if is_answered else 0.0
    control = (
        (source[0] + target[0]) / 2 - (target[1] - source[1]) / length * bend,
        (source[1] + target[1]) / 2 + (target[0] - source[0]) / length * bend,
    )
    (x1, y1), (x2, y2) = _edge(source, control), _edge(target, control)
    x, y = (x1 + x2) / 4 + control[0] / 2, (y1 + y2) / 4 + control[1] / 2
    anchor = "middle"
    if is_answered and abs(x2 - x1) < abs(
        y2 - y1
    ):  # else the texts of the two arrows would lie on one another
        anchor = "start" if control[0] > (source[0] + target[0]) / 2 else "end"
    return (
        f'<g><title>{escape(arrow.text)}</title><path d="M{x1:.1f} {y1:.1f}Q{control[0]:.1f} {control[1]:.1f} {x2:.1f} '
        f'{y2:.1f}" fill="none" stroke="#b3125b" stroke-width="1.5" marker-end="url(#dinfer-wait)"/>'
        f'<text x="{x:.1f}" y="{y + 3:.1f}" text-anchor="{anchor}" stroke="#fff" stroke-width="4" paint-order="stroke" '
        f'fill="#333">{escape(_short(arrow.text))}</text></g>'
    )


def _edge(box: Point, towards: Point) -> Point:
    """Where a line from the middle of a box leaves it."""
    dx, dy = towards[0] - box[0], towards[1] - box[1]
    scale = max(abs(dx) / (WIDTH / 2 + 3), abs(dy) / (HEIGHT / 2 + 3))
    return (box[0] + dx / scale, box[1] + dy / scale) if scale > 0 else box


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def cycle_text(found: Counterexample) -> str:
    """A cycle in a few lines, for a terminal; empty for any other counterexample."""
    if found.flaw != "cycle":
        return ""
    if len(found.steps) == 1:
        return f"↻ {found.steps[0]}"
    first, *middle, last = found.steps
    return "\n│     ▼\n".join([f"┌▶ {first}", *(f"│  {step}" for step in middle), f"└─ {last}"])


def counterexample_svg(plan: Plan, found: Counterexample) -> str:
    """The ops in the counterexample and, in a cycle, what each waits for; empty if it names no op."""
    if not found.places:
        return ""
    boxes = [
        Box(number, f"rank {place.rank}", str(plan.op(place)), is_root=True)
        for number, place in enumerate(found.places)
    ]
    arrows = []
    if found.flaw == "cycle":
        for number, (place, step) in enumerate(zip(found.places, found.steps, strict=True)):
            op = plan.op(place)
            text = str(op.value) if f"{op.value} " in step and op.is_transfer else step
            arrows.append(Arrow(number, (number + 1) % len(found.places), text))
    return drawing(str(found), boxes, arrows)
