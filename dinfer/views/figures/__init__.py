"""Figures: pure functions from a trace to a plotly figure. The numbers come from `dinfer.trace`."""
