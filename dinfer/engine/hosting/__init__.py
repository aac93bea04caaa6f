"""One rank as a process, or as a guest in one: its line to a session, its watcher, log and end."""
