"""Replaying: one rank of a run alone, without its peers, from what was recorded of it."""
