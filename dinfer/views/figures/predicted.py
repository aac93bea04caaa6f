"""What the planner has predicted of a run beside what was measured: prefill, each rank's compute, each link."""

from collections.abc import Sequence

import plotly.graph_objects as go

from dinfer.views.figures.style import BUBBLE, COMPUTE, styled


def predicted(
    figures: Sequence[tuple[str, float, float]], *, so_far: bool = False, dark: bool = False
) -> go.Figure:
    """Two bars for each figure: its name, predicted and measured seconds. `so_far`: the measured ones are of a part of
    the run, so how far the prediction is off is not known."""
    names = [name for name, _, _ in figures]
    off = [
        f"{wanted / found - 1:+.0%}" if found and not so_far else "" if so_far else "not measured"
        for _, wanted, found in figures
    ]
    measured = "measured so far" if so_far else "measured"
    ending = "" if so_far else " (prediction off by %{customdata})"
    figure = go.Figure()
    for label, seconds, colour, text in (
        ("predicted", [wanted for _, wanted, _ in figures], BUBBLE, off),
        (measured, [found for _, _, found in figures], COMPUTE, [""] * len(figures)),
    ):
        figure.add_bar(
            name=label,
            orientation="h",
            y=names,
            x=seconds,
            text=text,
            textposition="outside",
            cliponaxis=False,
            customdata=off,
            hovertemplate=f"%{{y}}: {label} %{{x:.4g}} s{ending}<extra></extra>",
            marker={"color": colour},
        )
    largest = max((max(wanted, found) for _, wanted, found in figures), default=0.0) or 1.0
    figure.update_xaxes(title={"text": "seconds"}, range=[0, 1.12 * largest])
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False)
    height = 130 + max(20, min(34, 1200 // max(1, len(names)))) * max(2, len(names))
    return styled(figure, dark=dark, height=height, barmode="group", bargap=0.25, legend_traceorder="normal")
