"""Comparing a run with transformers' own forward: where the first real difference is, and what causes it.

Pure: works on reports that ranks have sent. Start at `comparison`; `judge` decides, `sentences` puts it into words.
"""
