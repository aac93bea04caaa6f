"""Figures: pure functions from a trace to a plotly figure. Numbers come from `trace/`; nothing here works any out."""
