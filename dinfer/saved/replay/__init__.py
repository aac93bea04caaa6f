"""Replay: one rank of a saved run, run again alone; what its peers sent comes from the recording.

Start at `replay`.
"""
