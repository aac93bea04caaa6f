"""The ranks as a session reaches them: as engines of an ipyparallel cluster, or as threads of this process.

Imports `rank` and what lies below, never `run` or `session`. Start at `ranks`, the interface that both kinds implement;
`engines` and `threads` are the two, `link` carries their messages, `lease` gives a run exclusive use of them.
"""
