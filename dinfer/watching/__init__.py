"""Judges other people's distributed code from what the probe in its processes (`dinfer.watch.probe`) has written.

`evidence` is all that is known at one moment, and what follows from it; `folders` gathers it while processes run,
`given` from what was recorded before. For these, `events` makes a trace of the records, `signs` says what else is known
of a process, and `failures` which failure came first. `command` runs a command under watch, `live` holds it in a
notebook, `alarm` says when to speak. Of a job on several hosts one is `listening`; the others are `joining` it, and
send their files by `mirror`. Start at `evidence`.
"""
