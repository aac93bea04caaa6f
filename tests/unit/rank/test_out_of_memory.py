"""Memory that runs out while a rank works: recognised in all its forms, and told with what to change."""

from __future__ import annotations

import errno

import pytest
import torch

from dinfer.config import Config
from dinfer.model.decoder import Decoder
from dinfer.rank.failure import OutOfMemory, asked_bytes, explained, is_shortage
from tests.support.twin import prompt, twin

CUDA = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB."


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (CUDA, int(2.5 * 2**30)),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes. Error code 12", 4096),
        ("HIP out of memory. Tried to allocate 20.00 MiB", 20 * 2**20),
        ("no room", None),
    ],
)
def test_what_was_asked_for_is_read_from_the_error(text: str, size: int | None) -> None:
    assert asked_bytes(text) == size


@pytest.mark.parametrize(
    ("error", "shortage"),
    [
        (torch.OutOfMemoryError(CUDA), True),
        (MemoryError("no room"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (RuntimeError(CUDA), True),
        (OSError(errno.ENOENT, "no file"), False),
        (RuntimeError("shapes differ"), False),
    ],
)
def test_a_shortage_is_told_from_other_errors(error: Exception, shortage: bool) -> None:
    assert is_shortage(error) is shortage


def test_an_allocation_that_fails_in_an_op_is_told_with_the_op_and_what_to_change(
    small: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real one: torch is asked for more than any machine has."""
    monkeypatch.setattr(Decoder, "layer", lambda *_: torch.empty(1 << 50))
    config = Config(model_path=str(small.spec.path), world_size=1, chunk_size=4)
    with (
        twin(small, world_size=1, chunk_size=4) as made,
        pytest.raises(OutOfMemory) as caught,
        explained(config, prompt(10), "cpu"),
    ):
        made.engines[0].prefill_phase(prompt(10))
    first, second = str(caught.value).splitlines()
    assert first.startswith("rank 0 failed at `layer c0 l0` (lane compute): RuntimeError: ")
    assert second.startswith("Out of memory on cpu: 4,194,304.0 GiB was asked for, ")
    assert "No single change saves the missing " in second


def test_other_errors_pass_as_they_are() -> None:
    with pytest.raises(ValueError, match=r"^as it was$"), explained(Config(), [1], "cpu"):
        raise ValueError("as it was")


def test_a_checkpoint_that_is_gone_does_not_hide_the_shortage() -> None:
    config = Config(model_path="/nowhere/at/all")
    with (
        pytest.raises(
            OutOfMemory,
            match=r"MemoryError: no room\nMemory ran out on cpu; .* folder /nowhere.* does not exist",
        ),
        explained(config, [1], "cpu"),
    ):
        raise MemoryError("no room")
