"""What is kept of a verdict in a trace's findings: its picture and folds, as plain data and back as HTML. Pure."""

from dinfer.trace.findings import WaitsFinding
from dinfer.verdict.drawing import Arrow, Box, drawing
from dinfer.verdict.folds import folds_html
from dinfer.verdict.verdict import Verdict


def kept_waits(verdict: Verdict) -> WaitsFinding | None:
    """Who waits for whom; None of a run that goes on."""
    if not verdict.is_hung:
        return None
    boxes, arrows = verdict.picture()
    return WaitsFinding(
        tuple((box.key, box.name, box.text, box.is_root, box.detail) for box in boxes),
        tuple((arrow.source, arrow.target, arrow.text) for arrow in arrows),
        verdict.lines,
        tuple(sorted(verdict.stacks.items())),
    )


def waits_html(found: WaitsFinding, title: str) -> str:
    """The picture, and a fold for each rank. What is drawn may come from anybody's file."""
    boxes = [Box(*one) for one in found.ranks]
    known = {box.key for box in boxes}
    arrows = [Arrow(*one) for one in found.waits if known.issuperset(one[:2])]
    blamed = [box.key for box in boxes if box.is_root]
    picture = drawing(title, boxes, arrows) if boxes else ""
    return f"{picture}{folds_html(found.lines, dict(found.stacks), blamed)}"
