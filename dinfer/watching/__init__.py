"""Judges other people's distributed code from what the probe in its processes (`dinfer.watch.probe`) has written.

`events` makes a trace of the records, `signs` says what else is known of a process, `evidence` is both of a moment and
judges them, `command` runs a command under watch. Start at `evidence`.
"""
