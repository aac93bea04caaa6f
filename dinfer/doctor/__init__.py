"""`dinfer doctor`: is this machine fit to run ranks? Versions, devices, network, memory, leftovers.

A leaf: only `cli` imports it. Start at `doctor`, which runs all checks; each other file is one check or a part of one.
"""
