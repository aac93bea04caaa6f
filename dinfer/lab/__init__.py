"""`dinfer lab`: known faults on real ranks, and a score of which verdicts were right and in time.

Imports everything below; `cli` imports it, and `bench`, for `hosts`. Start at `lab`; `faults` holds the table of faults
and the right verdict of each.
"""
