"""What the unit tests share: tiny decoders, written and loaded once a session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dinfer.model.decoder import Decoder
from tests.support.expected import lane_threads
from tests.support.tiny import tiny_checkpoint

Decoders = dict[str, Decoder]


@pytest.fixture(scope="session")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> Decoders:
    """Random decoders by name: 7 layers of each family, and a `small` one of 3."""
    folder = tmp_path_factory.mktemp("engine")
    made = {family: Decoder.load(tiny_checkpoint(folder / family, family)) for family in ("qwen3", "llama")}
    small = tiny_checkpoint(folder / "small", "qwen3", layers=3, tokenizer=True, max_position_embeddings=64)
    return {**made, "small": Decoder.load(small)}


@pytest.fixture
def small(decoders: Decoders) -> Decoder:
    """Three layers, 64 positions and a tokenizer, for tests that are not about architectures."""
    return decoders["small"]


@pytest.fixture(scope="module", autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """After every module all lanes have ended, those of sessions that its tests share too."""
    yield
    assert lane_threads() == []
