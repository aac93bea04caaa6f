"""What people see of a run: the panel, its figures and still pictures, and the HTML report.

A run is held by the protocol in `protocol`; no rank, engine or cluster is imported. Start at `panel`, then `desk`.
"""
