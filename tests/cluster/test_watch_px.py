"""A session under watch: `%%px` cells of the user's own that call torch.distributed, in a real kernel."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.support.ipclusters import IPython, stock_cluster, within
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

AGAIN = """%%px
import torch, torch.distributed as dist
block = torch.ones(2)
dist.all_reduce(block)
print(block)
"""


def shown(found: Kernel, cell: Cell, words: str) -> bool:
    """Whether a cell shows these words within a while."""
    deadline = time.monotonic() + PATIENCE_S
    while words not in cell.text and time.monotonic() < deadline:  # also once it has ended
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
        assert found.run(AGAIN).count("tensor([3., 3.])") == 3
        assert not found.value("session.watch().verdict().is_hung"), found.run(
            "print(session.watch().verdict())"
        )
        found.run("session.close()")


@pytest.mark.slow
def test_a_cell_that_hangs_in_the_background_is_ended_by_recover(engines: IPython) -> None:
    """Else the next cell would wait for it, and nothing would say so."""
    assert engines
    with kernel() as found:
        found.run("%load_ext dinfer\nsession = dinfer.connect(n=3)\n%dinfer watch")
        cell = found.begin(HANGS.replace("%%px", "%%px --noblock"))
        assert shown(found, cell, "✖ error: deadlock: "), cell.text
        assert cell.ended
        said = found.run("print(session.recover())")
        assert "rank 1 was stuck and is started again" in said
        assert "rank 0 was stuck" not in said  # which has come free once the others had ended
        assert found.run(AGAIN).count("tensor([3., 3.])") == 3
        found.run("session.close()")


DEAF = """%%px --noblock
import ctypes
mutex = ctypes.create_string_buffer(128)
ctypes.CDLL(None).pthread_mutex_lock(mutex)
ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""
"""C code that waits for good and hears of no interrupt"""


@pytest.mark.slow
def test_a_cluster_that_has_just_been_started_outlives_all_its_engines(tmp_path: Path) -> None:
    """A stock ipcluster ends its controller if these all end soon after their start."""
    with stock_cluster(tmp_path) as place, within(place), kernel() as found:
        found.run("%load_ext dinfer\nsession = dinfer.connect(n=3)")
        found.run(DEAF)
        said = found.run("print(session.recover())")
        assert all(f"rank {rank} was stuck and is started again" in said for rank in range(3))
        assert found.run(AGAIN).count("tensor([3., 3.])") == 3
        found.run("session.close()")
