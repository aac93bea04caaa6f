"""One rank's part of a plan: it runs its lanes of ops, over any transport.

The same under ipyparallel, torchrun, mpirun, or threads in one process. Imports `plan`, `model`, `kv`, `trace` and
`transport`; it knows nothing of sessions. Start at `engine`, then `lanes` and `ops`.
"""
