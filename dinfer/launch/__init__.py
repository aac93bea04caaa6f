"""Ranks as processes from the command line: `dinfer run`, torchrun, mpirun, or a debugger's launch entry.

Imports `rank`, `cluster` and `monitor`, but neither `run` nor `session`: there is no notebook here. Start at `runner`
(starts the ranks itself) and `join` (was started as one of them).
"""
