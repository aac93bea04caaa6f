"""`dinfer doctor`: is this machine fit to run ranks? Versions, devices, network, memory, leftovers.

A leaf: only `cli` imports it, and it may import everything but other leaves. Start at `doctor`, which runs all checks;
`report` prints them, and each other file holds checks.
"""
