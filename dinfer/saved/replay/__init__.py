"""Replay: one rank of a saved run, run again alone; what its peers sent comes from the recording.

Start at `replay`, what a user holds; `stepper` moves the rank's engine, and `record` is all that it needs.
"""
