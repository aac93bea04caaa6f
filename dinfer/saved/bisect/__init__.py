"""Bisect: from a wrong answer to the block that makes it wrong, by partial re-runs on one rank, in this process.

Start at `search`.
"""
