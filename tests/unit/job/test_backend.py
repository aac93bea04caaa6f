"""auto is NCCL if every rank of one machine has its own GPU, else gloo; and the errors of what is
impossible."""

from __future__ import annotations

from typing import Any

import pytest

from dinfer.config import Config, ConfigError
from dinfer.job import choose_backend


def settled(*, nccl: bool = True, ipc: bool = True, **values: Any) -> str:
    return choose_backend(Config.of({"world_size": 2, **values}), lambda: nccl, lambda: ipc).backend


@pytest.mark.parametrize(
    ("values", "nccl", "expected"),
    [
        ({"gpu_ids": "0,1"}, True, "nccl"),
        ({"gpu_ids": "0,1"}, False, "gloo"),
        ({"gpu_ids": "0,0"}, True, "gloo"),
        ({"gpu_ids": "0,0", "backend": "ipc"}, False, "ipc"),
        ({"gpu_ids": "0,0", "device_mode": "multi_node"}, True, "gloo"),
        ({"gpu_ids": "0,0,1", "world_size": 3}, True, "gloo"),
        ({"gpu_ids": "0,0", "backend": "gloo"}, True, "gloo"),
        ({}, True, "gloo"),
        ({"gpu_ids": "3", "world_size": 1}, True, "nccl"),
        ({"gpu_ids": "0,1", "device_mode": "multi_node"}, True, "gloo"),
        ({"gpu_ids": "0,0", "device_mode": "multi_node", "backend": "nccl"}, True, "nccl"),
        ({"gpu_ids": "0,1", "backend": "gloo"}, True, "gloo"),
        ({"gpu_ids": "0,1", "backend": "nccl"}, True, "nccl"),
    ],
)
def test_the_choice(values: dict[str, Any], nccl: bool, expected: str) -> None:
    assert settled(nccl=nccl, **values) == expected


@pytest.mark.parametrize(
    ("values", "nccl", "words"),
    [
        (
            {},
            True,
            "backend is nccl, but gpu_ids is empty: NCCL needs one GPU a rank. Give gpu_ids, such as 0,1, "
            "or use backend gloo.",
        ),
        (
            {"gpu_ids": "4,4"},
            True,
            "backend is nccl, but ranks 0 and 1 share GPU 4: NCCL needs one GPU a rank. "
            "Give each rank its own in gpu_ids, or use backend gloo.",
        ),
        (
            {"gpu_ids": "0,1"},
            False,
            "backend is nccl, but this torch has no NCCL or finds no GPU. "
            "Install a CUDA build of torch for Linux, or use backend gloo.",
        ),
    ],
)
def test_what_cannot_be_is_told_with_what_to_do(values: dict[str, Any], nccl: bool, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settled(nccl=nccl, backend="nccl", **values)
    assert str(caught.value) == words


@pytest.mark.parametrize(
    ("values", "ipc", "words"),
    [
        ({}, True, "gpu_ids is empty: CUDA IPC needs a GPU that all ranks share. Give gpu_ids, such as 0,0"),
        ({"gpu_ids": "0,1"}, True, "gpu_ids is 0,1: CUDA IPC is for ranks that share one GPU. Use nccl"),
        ({"gpu_ids": "0,0", "device_mode": "multi_node"}, True, "the ranks are on several machines"),
        (
            {"gpu_ids": "0,0"},
            False,
            "backend is ipc, but this machine's GPU memory cannot be shared, or torch finds no GPU. Use backend gloo.",
        ),
    ],
)
def test_what_memory_cannot_be_shared_is_told(values: dict[str, Any], ipc: bool, words: str) -> None:
    with pytest.raises(ConfigError, match=r"se backend gloo\.$") as caught:
        settled(ipc=ipc, backend="ipc", **values)
    assert words in str(caught.value)


def test_without_gpus_nothing_is_asked_of_torch() -> None:
    def ask() -> bool:
        raise AssertionError

    assert choose_backend(Config(), ask, ask).backend == "gloo"
