"""What a notebook holds of engines under watch, from the records of this process as its only rank."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from transformers import AutoModelForCausalLM, DynamicCache

import dinfer
from dinfer.errors import DinferError
from dinfer.model.demo import CHECKPOINT
from dinfer.watch.probe.reading import read
from dinfer.watch.probe.start import Probe, start, stop
from dinfer.watching.live import EnginesSource, EnginesWatch


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[EnginesWatch]:
    probe = Probe(tmp_path, compares=True)
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
    dinfer.tap("kv", layer=0, k=block, v=block)
    assert [one.kind for one in watch.moment().evidence.kv.diff()] == ["rows repeated"]
    assert [one.kind for one in watch.findings] == ["rows repeated"]


def test_a_model_in_cells_is_compared_with_the_reference(watch: EnginesWatch) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
        with torch.no_grad():
            model(input_ids=torch.arange(20, 40)[None], past_key_values=DynamicCache(config=model.config))
        found = watch.compare("reference")
    finally:
        torch.set_num_threads(before)
    assert found.equal, found
    assert "hidden, K, V, output of 6 layers" in str(found)


def test_a_process_is_watched_anew_where_another_session_looks(tmp_path: Path) -> None:
    first = start(tmp_path / "first")
    try:
        assert start(tmp_path / "first") is first
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        dist.barrier()
        second = start(tmp_path / "second")
        assert second is not first
        dist.all_reduce(torch.ones(2))
        more = start(tmp_path / "second", compares=True)
        assert more is not second
        assert start(tmp_path / "second") is more  # which takes what is asked for, and more
        dist.all_reduce(torch.ones(2))
    finally:
        stop()
        dist.destroy_process_group()
    kinds = [[op.kind for one in read(tmp_path / name) for op in one.ops] for name in ("first", "second")]
    assert kinds == [["init_group", "barrier"], ["all_reduce", "all_reduce"]]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (3, "command is 3; it must be text or a list of texts"),
        (["torchrun", 3], r"command is \['torchrun', 3\]; it must be text or a list of texts"),
        ("", "there is no command"),
        (
            "no-such-program --x 1",
            "the command 'no-such-program' was not found: it is not on the path, nor beside",
        ),
    ],
)
def test_a_command_that_cannot_be_started(command: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(DinferError, match=said):
        dinfer.watch(command, tmp_path / "watch")
    assert not (tmp_path / "watch").exists()
