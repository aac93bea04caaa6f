"""`dinfer lab`: known faults on real ranks, and a score of whether each verdict was right and in time.

A leaf: only `cli` imports it. Start at `lab`, then `trial`; `expected` says what the right verdict of each fault is.
"""
