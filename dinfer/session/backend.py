"""Which backend a run takes: NCCL where every rank of one machine has a GPU of its own, otherwise gloo.

Nothing here imports torch unless GPUs are named: a mistake is told at once.
"""

from collections.abc import Callable

from dinfer.config import Config, ConfigError


def has_nccl() -> bool:
    from dinfer.engine.transport.comm_nccl import has_nccl as found

    return found()


def settle_backend(config: Config, nccl_is_here: Callable[[], bool] = has_nccl) -> Config:
    """The config with its backend chosen. Raises ConfigError where it asks for NCCL and cannot have it.

    On several machines each has a network of its own kind, so there gloo is taken unless NCCL is asked for.
    """
    if config.backend == "gloo":
        return config
    obstacle = _obstacle(config, nccl_is_here)
    if config.backend == "auto":
        takes = not obstacle and config.device_mode == "single_node"
        return config.with_(backend="nccl" if takes else "gloo")
    if obstacle:
        raise ConfigError(f"backend is nccl, but {obstacle}, or use backend gloo.")
    return config


def _obstacle(config: Config, nccl_is_here: Callable[[], bool]) -> str:
    """Why NCCL cannot be had and what to do about it, or nothing."""
    ids = config.gpu_ids
    if not ids:
        example = ",".join(map(str, range(config.world_size)))
        return f"gpu_ids names no GPUs: NCCL takes one a rank. Give gpu_ids, such as {example}"
    shared = next((gpu for gpu in ids if ids.count(gpu) > 1), None)
    if shared is not None and config.device_mode == "single_node":
        ranks = " and ".join(str(rank) for rank, gpu in enumerate(ids) if gpu == shared)
        return (
            f"ranks {ranks} share GPU {shared}: NCCL takes one rank a GPU. Give each rank its own in gpu_ids"
        )
    if not nccl_is_here():
        return "torch here has no NCCL, or sees no GPU. Install a CUDA build of torch for Linux"
    return ""
