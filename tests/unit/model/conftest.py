"""What the model tests share: one thread, and tiny checkpoints written once a session."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dinfer.model.decoder import Decoder
from tests.support.tiny import tiny_checkpoint

torch.set_num_threads(1)

FAMILIES = ("qwen3", "llama")


@pytest.fixture(scope="session", params=FAMILIES)
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """A decoder of 7 random layers, of each family in turn."""
    return Decoder.load(tiny_checkpoint(tmp_path_factory.mktemp(request.param), request.param))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """One decoder, for tests that are not about architectures."""
    return Decoder.load(tiny_checkpoint(tmp_path_factory.mktemp("one"), "llama", layers=3))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete checkpoint of one layer that the test may damage."""
    return tiny_checkpoint(tmp_path / "model", "qwen3", layers=1)
