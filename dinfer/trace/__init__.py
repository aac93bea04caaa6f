"""What happened: events as plain records, the merged trace, and the figures that are read off it.

Works without torch. Start at `events` and `trace`; `recorder` writes events on a rank, `export` and `read` are files.
"""
