"""The model on one rank: transformers' own layers, their KV cache, sampling, text and checkpoints.

It knows no ranks, plans or communication, and imports nothing of dinfer but `errors`. Start at `decoder`, then `cache`;
`checkpoint` and `families` say which checkpoints fit. `checkpoint`, `families`, `memory`, `sampling`, `text`
and `tolerance` import without torch.
"""
