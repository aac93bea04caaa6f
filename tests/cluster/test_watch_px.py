"""A session under watch: `%%px` cells of the user's own that call torch.distributed, in a real kernel."""

from __future__ import annotations

import time

import pytest

from tests.support.ipclusters import IPython
from tests.support.kernels import Cell, Kernel, kernel

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

PATIENCE_S = 60.0

HANGS = """%%px
import torch, torch.distributed as dist
block = torch.ones(4)
dist.all_reduce(block)
if rank == 1:
    dist.recv(block, 0)
else:
    dist.all_reduce(block)
"""


def shown(found: Kernel, cell: Cell, words: str) -> bool:
    """Whether a cell shows these words within a while."""
    deadline = time.monotonic() + PATIENCE_S
    while words not in cell.text and not cell.ended and time.monotonic() < deadline:
        found.look(cell)
    return words in cell.text


def test_a_cell_that_hangs_has_its_verdict_under_it_and_recover_frees_the_engines(engines: IPython) -> None:
    assert engines
    with kernel() as found:
        found.run("%load_ext dinfer\nsession = dinfer.connect(n=3)\n%dinfer watch")
        found.run("%%px\nimport torch, torch.distributed as dist\ndist.all_reduce(torch.ones(2))")
        assert "all_reduce (default)" in found.run("print(session.watch().links())")
        cell = found.begin(HANGS)
        assert shown(found, cell, "✖ error: deadlock: rank 0 is in `all_reduce` ([4] float32)"), cell.text
        assert "rank 1 is in `recv <- 0` ([4] float32)" in cell.text
        found.interrupt()
        found.finish(cell)
        where = found.run("print(session.watch().where())")
        assert "rank 1: in `recv <- 0`" in where
        assert "all ranks have met" in found.run("session.recover()")
        begin = "%%px\nimport torch, torch.distributed as dist\nblock = torch.ones(2)\n"
        again = f"{begin}dist.all_reduce(block)\nprint(block)"
        assert found.run(again).count("tensor([3., 3.])") == 3
        assert not found.value("session.watch().verdict().is_hung"), found.run(
            "print(session.watch().verdict())"
        )
        found.run("session.close()")
