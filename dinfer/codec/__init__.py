"""Codecs: how a block's K and V are written on the wire. Knows no ranks.

`choice` has the names and sizes, without torch; `coding` encodes and decodes a block, by `lossless`, `scaled` and plain
casts. What is lossy is so by token and head: a row's bytes depend on nothing but this row, so they are the same
whatever the chunks are.
"""
