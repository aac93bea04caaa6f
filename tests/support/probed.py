"""The probe in this process: fixtures of all tests that watch themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from dinfer.watch.probe.reading import read
from dinfer.watch.probe.recorder import OpRecorder
from dinfer.watch.probe.records import WatchedProcess
from dinfer.watch.probe.start import Probe


@dataclass(frozen=True)
class Watched:
    """This process under watch."""

    probe: Probe
    folder: Path

    def __call__(self) -> WatchedProcess:
        """What has been recorded so far."""
        (process,) = read(self.folder)
        return process


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[OpRecorder]:
    """Records into a folder."""
    made = OpRecorder(tmp_path)
    yield made
    made.close()


@pytest.fixture
def fake() -> Iterator[None]:
    """Rank 1 of 4, whose messages go nowhere."""
    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.fixture
def gloo() -> Iterator[None]:
    """A group of one."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=torch._C._distributed_c10d.HashStore())
    yield
    dist.destroy_process_group()


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    """Watches this process while the test lasts."""
    probe = Probe(tmp_path)
    yield Watched(probe, tmp_path)
    probe.stop()
