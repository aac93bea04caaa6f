"""The KV cache as evidence: who holds which rows, where two holders differ, and what kind of difference that is.

Works on any `Source` of KV (the ranks of a run, a saved run) and imports no rank, cluster or run. Start at `source`,
then `diff`, which names rows by `rows` and the op at which a block changed by `origin`; `digests` and `ledger` are what
the ranks themselves record.
"""
