"""Comparing a run with transformers' own forward: where the first real difference is, and what causes it.

Pure: works on reports that ranks have sent. Start at `comparison`, which puts into words what `judge` decides.
Misplaced rows, routes of blocks and places of values are those of `kv.rows`, `kv.origin` and `kv.difference`.
"""
