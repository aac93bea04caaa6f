"""One rank as a process: the engine behind a control thread and a watcher process, answering commands.

Imports `engine` and what lies below; it does not know who its session is. Start at `service`, the rank's state and its
commands. A process becomes a rank by `kernel` (an ipyparallel engine) or `worker` (`dinfer run`); each has a
`watcher` beside it.
"""
