"""`dinfer doctor`: what of this host stands in the way of a run, with one fix for each failure.

It looks and measures; it changes nothing and ends nobody's process. Only the host it runs on is examined.
"""
