"""Watches distributed code that is not dinfer's own: what it sent and received, and why it does not move.

`probe` is what runs inside the watched processes, and reads what they wrote; it imports nothing of dinfer. `zipped`
packs it, so that environments without dinfer can be watched. Start with `probe.records`: what is recorded of an op.
"""
