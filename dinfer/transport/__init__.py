"""Bytes from rank to rank: gloo, NCCL, or queues within one process. The only package that imports torch.distributed.

It imports `plan` for channels and values, `config`, and `kv` for digests. Start at `header`, then `gloo` (which has the
protocol `Comm`); `in_process` serves ranks that are threads, `gate` makes lanes wait.
"""
