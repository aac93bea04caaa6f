"""`dinfer bench`: prefill variants, sync strategies, digests, sessions and views, timed side by side.

A leaf: only `cli` imports it, and it may use everything below. Start at `prefill`, the plain `dinfer bench`; `rank` is
the part that runs inside each timed process.
"""
