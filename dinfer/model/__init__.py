"""The model on one rank: transformers' own layers, their KV cache, sampling, text and checkpoints.

It knows no ranks, plans or communication. Start at `decoder`, then `cache`; `checkpoint` and `families` say which
checkpoints fit. Only `attention`, `cache`, `decoder`, `positions` and `reference` import torch at once.
"""
