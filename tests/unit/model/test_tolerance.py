"""The tolerance is that of the coarser dtype, and grows with the root of the depth."""

import pytest
import torch

from dinfer.model.tolerance import UNIT_ROUNDOFF, tolerance


@pytest.mark.parametrize("name", UNIT_ROUNDOFF)
def test_the_unit_roundoff_is_that_of_the_dtype(name: str) -> None:
    assert UNIT_ROUNDOFF[name] == torch.finfo(getattr(torch, name)).eps / 2


def test_the_coarser_dtype_and_the_depth_decide() -> None:
    assert tolerance("float32", "bfloat16", 3, 64) == tolerance("bfloat16", "float32", 3, 64)
    assert tolerance("bfloat16", "float32", 3, 64) == tolerance("bfloat16", "bfloat16", 3, 64)
    assert tolerance("float32", "float32", 3, 64) == 2 * tolerance("float32", "float32", 0, 64)
    assert tolerance("float32", "float32", 0, 4096) > tolerance("float32", "float32", 0, 64)
    assert tolerance("float32", "float32", 0, 64) == pytest.approx(4 * (4 + 8) * 2**-24)
