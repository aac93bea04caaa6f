"""A refuted plan as a drawing: who would wait for whom, in a terminal and as SVG. Pure."""

from dinfer.plan.plan import Plan
from dinfer.plan.verify import Counterexample
from dinfer.verdict.picture import Arrow, Box, drawing


def cycle_text(found: Counterexample) -> str:
    """The circle in a few lines, for a terminal; empty for what is no circle."""
    if found.flaw != "cycle":
        return ""
    if len(found.steps) == 1:
        return f"↻ {found.steps[0]}"
    first, *middle, last = found.steps
    lines = [f"┌▶ {first}"]
    for step in middle:
        lines += ["│     ▼", f"│  {step}"]
    return "\n".join([*lines, "│     ▼", f"└─ {last}"])


def counterexample_svg(plan: Plan, found: Counterexample) -> str:
    """The ops that it speaks of, and, of a circle, what each waits for; empty where it speaks of no op."""
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
