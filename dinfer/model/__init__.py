"""The model side of one rank: transformers' own layers, their KV cache, sampling, text and checkpoints.

Nothing here knows of ranks, plans or communication. Importing this package imports nothing else;
`checkpoint`, `families` and `sampling` do not import torch, the other modules do.
"""
