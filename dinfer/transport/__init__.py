"""Bytes from rank to rank: gloo, NCCL, or queues within one process. The only package that imports torch.distributed.

Imports `plan`, `trace` and `kv` for what a header says. Start at `header`, then `gloo`; `in_process` is the twin that
tests and threads use, `gate` holds lanes back, `faulty` misbehaves on purpose.
"""
