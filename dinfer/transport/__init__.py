"""Bytes from rank to rank: gloo, NCCL, shared GPU memory, or queues within one process.

The only package that imports torch.distributed. It imports `plan` for channels and values, `config`, and `kv` for
digests. Start at `header`, then `gloo` (which has the protocol `Comm`), or `cuda_streams` for what `nccl` and `ipc`
share; `in_process` serves ranks that are threads, `gate` makes lanes wait; `connect` chooses.
"""
