"""What a rank of a session has of its GPU, as the session is told. Skipped where there is no CUDA device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dinfer
from dinfer.engine.board import DeviceMemory
from dinfer.model.memory import need
from dinfer.session.session import Session
from dinfer.views.status import status
from tests.support.ipclusters import stock_cluster, within
from tests.support.runs import wait_for
from tests.support.tiny import tiny_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.cluster,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device on this machine"),
    pytest.mark.timeout(600),
]

IDS, NEW = list(range(1, 65)), 8


def _told(session: Session) -> list[DeviceMemory]:
    """Of each rank, once all have said so."""

    def found() -> list[DeviceMemory]:
        known = [state.device_memory for state in session.ranks.ranks]
        return [one for one in known if one] if all(known) else []

    wait_for(found, "every rank tells its memory")
    return found()


def test_each_rank_tells_what_it_has_of_its_gpu(tmp_path: Path) -> None:
    """Two engines that share a GPU: at least its weights, after prefill its KV too, and never more than there is."""
    model = tiny_checkpoint(tmp_path / "model", layers=6)
    (tmp_path / "ipython").mkdir()
    with (
        stock_cluster(tmp_path / "ipython", 2) as place,
        within(place),
        dinfer.connect(n=2, start=False) as session,
    ):
        session.load(str(model), gpu_ids=(0, 0))
        assert session.spec
        weights = need(session.spec, "auto", 0).weights_bytes
        kv = need(session.spec, "auto", len(IDS)).kv_bytes
        for allocated, reserved, total in _told(session):
            assert weights <= allocated <= reserved < total
        run = session.prefill(IDS, chunk_size=16, max_new_tokens=NEW)
        run.decode()
        wait_for(lambda: all(one.allocated > weights + kv for one in _told(session)), "KV is in it")
        shown = status(run.plan, run.standing())["ranks"]
        print([rank["memory"] for rank in shown])
        assert all(" GiB · host " in rank["memory"] for rank in shown)
        session.load(str(model))
        wait_for(lambda: not any(state.device_memory for state in session.ranks.ranks), "the CPU has none")
