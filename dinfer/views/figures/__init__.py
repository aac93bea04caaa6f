"""Figures: pure functions from a trace to a plotly figure. The numbers come from `dinfer.trace`.

Start at `plots`, which has them by name; each of the others is a figure, but for `style`, their common look, `shown`,
which puts one into a notebook, and `svg`, which draws one without plotly's script.
"""
