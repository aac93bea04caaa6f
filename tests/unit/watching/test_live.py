"""What a notebook holds of engines under watch, from the records of this process as its only rank."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

import dinfer
from dinfer.watch.probe.start import Probe
from dinfer.watching.live import EnginesSource, EnginesWatch


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[EnginesWatch]:
    probe = Probe(tmp_path)
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    source = EnginesSource(tmp_path, lambda _: None)
    try:
        dist.barrier()
        yield EnginesWatch(source)
    finally:
        source.close()
        dist.destroy_process_group()
        probe.stop()


def test_what_a_panel_shows_has_the_kv_as_it_grows(watch: EnginesWatch) -> None:
    assert not watch.moment().evidence.kv.layers
    block = torch.randn(1, 2, 4, 8)
    dinfer.tap("kv", layer=0, k=block, v=block)
    before = watch.moment().evidence.kv
    assert (len(before.table()), before.diff()) == (1, [])
    assert watch.moment().evidence.kv is before  # nothing was added, so nothing is read again
    dinfer.tap("kv", layer=0, k=block, v=block)
    assert [one.kind for one in watch.moment().evidence.kv.diff()] == ["rows repeated"]
    assert [one.kind for one in watch.findings] == ["rows repeated"]
