"""`dinfer lab`: known faults on real ranks, and a score of which verdicts were right and in time.

A leaf: only `cli` imports it, and it may import everything but other leaves. Start at `lab`; `faults` holds the table
of faults and the right verdict of each.
"""
