"""`dinfer bench`: times of prefill variants, sync strategies, digests, sessions and views.

A leaf: only `cli` imports it, and it may import everything but other leaves. Start at `prefill`, the plain `dinfer
bench`; `rank` runs inside each timed process.
"""
