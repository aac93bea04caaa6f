"""Saved runs: a run as a folder of plain files, written from ranks and read without any.

Imports `cluster` and what lies below. Start at `format`, the list of files; `write` and `read` are the two directions,
`saved` is what `dinfer.open` returns.
"""
