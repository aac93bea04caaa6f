"""The KV cache as evidence: who holds which rows, where two holders differ, and what kind of difference that is.

Works on any `Source` of KV (live ranks, a saved run, a reference) and imports no rank, cluster or run. Start at
`source`, then `diff`; `digests` and `ledger` are what the ranks themselves record.
"""
