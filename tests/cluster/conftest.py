"""What the cluster tests share: tiny checkpoints, and runs that are cleaned up whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.support.parrot import SAYING, parrot_checkpoint
from tests.support.runs import Fault, Run, run_arguments
from tests.support.tiny import tiny_checkpoint

torch.set_num_threads(1)  # as the ranks: float32 attention differs between 1 and 2 threads

Start = Callable[..., Run]
"""start(model, fault=None, environment={}, **flags): `dinfer run` with these flags, broken by that fault"""


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of random checkpoints of 7 layers without tokenizers, by family."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {family: tiny_checkpoint(folder / family, family) for family in ("qwen3", "llama")}


@pytest.fixture
def qwen3(checkpoints: dict[str, Path]) -> Path:
    """One checkpoint, for tests that are not about architectures."""
    return checkpoints["qwen3"]


@pytest.fixture(scope="session")
def parrot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer, three layers, and one thing to say."""
    return parrot_checkpoint(tmp_path_factory.mktemp("parrot"), SAYING)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts runs in the test's folder."""
    runs: list[Run] = []

    def started(
        model: Path, fault: Fault | None = None, environment: dict[str, str] | None = None, **flags: object
    ) -> Run:
        more = {**(environment or {}), **(fault.environment(tmp_path) if fault else {})}
        runs.append(Run(tmp_path, run_arguments(model, **flags), more))
        return runs[-1]

    yield started
    for run in runs:
        run.end()
