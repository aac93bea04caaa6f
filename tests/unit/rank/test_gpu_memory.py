"""What a rank has of its GPU reaches the session by way of board and watcher; torch's counters are made up here."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dinfer.cluster.link import Link
from dinfer.rank import weights
from dinfer.rank.control import Control
from dinfer.rank.service import RankService
from tests.support.runs import wait_for

GPU = torch.device("cuda:1")


class Rank:
    """This process as a rank of a session, with counters in place of torch's."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.allocated, self.asked = 1 << 30, list[torch.device]()
        patch.setattr(weights, "PERIOD_S", 0.01)
        patch.setattr(torch.cuda, "memory_allocated", self._allocated)
        patch.setattr(torch.cuda, "memory_reserved", lambda _: 3 << 30)
        patch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 << 30))
        self.link = Link(1)
        self.control = Control(self.link.job_part(0, launcher=os.getpid()))
        nowhere: Any = None  # this rank meets nobody
        board, memory = self.control.board, self.control.recorder_memory
        self.host = RankService(0, self.control, nowhere, board=board, memory=memory)

    def _allocated(self, device: torch.device) -> int:
        self.asked.append(device)
        return self.allocated

    def known(self) -> object:
        """What the session knows."""
        return self.link.ranks[0].device_memory

    def gauges(self) -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "dinfer gauge"]

    def close(self) -> None:
        self.host.close()
        self.control.close()
        self.link.close()


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rank]:
    made = Rank(monkeypatch)
    yield made
    made.close()
    assert made.gauges() == []


def test_the_session_knows_what_a_rank_has_of_its_gpu(rank: Rank) -> None:
    rank.host.weights.measure(GPU)
    wait_for(lambda: rank.known() == (1 << 30, 3 << 30, 80 << 30), "it is known")
    rank.allocated = 2 << 30
    wait_for(lambda: rank.known() == (2 << 30, 3 << 30, 80 << 30), "it is known anew")
    assert set(rank.asked) == {GPU}


def test_another_device_takes_its_place_and_the_cpu_has_none(rank: Rank) -> None:
    rank.host.weights.measure(GPU)
    rank.host.weights.measure(GPU)
    assert len(rank.gauges()) == 1
    wait_for(rank.known, "it is known")
    rank.host.weights.measure(torch.device("cpu"))
    assert rank.gauges() == []
    wait_for(lambda: rank.known() is None, "there is no GPU any more")


def test_a_device_that_has_failed_ends_the_gauge_and_nothing_else(
    rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> int:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch.cuda, "memory_reserved", fail)
    rank.host.weights.measure(GPU)
    wait_for(lambda: rank.asked and not rank.gauges(), "the gauge has ended")
    assert rank.known() is None


def test_a_rank_that_shares_its_process_has_no_memory_of_its_own(rank: Rank) -> None:
    rank.host.weights.alone = False
    rank.host.weights.measure(GPU)
    assert rank.gauges() == []
