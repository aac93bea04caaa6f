"""NaN and Inf are found where they arise, in what each op makes, and named once a rank."""

from __future__ import annotations

from math import inf, nan
from typing import Any

import pytest
import torch
from torch import Tensor

from dinfer.engine.finite import FiniteCheck, NonFinite, largest_values
from dinfer.model.decoder import Decoder
from dinfer.plan.ops import Op, Value, recv
from dinfer.plan.partition import Shape
from tests.support.twin import prompt, twin

SHAPE = Shape(layers=4, tokens=7, chunk_size=4, starts=(0, 2))
LAYER = Op("layer", 1, 2)


class Noted:
    """What a check of rank 1 has recorded and reported."""

    def __init__(self) -> None:
        self.recorded: list[NonFinite] = []
        self.reported: list[NonFinite] = []
        cpu = torch.device("cpu")
        self.check = FiniteCheck(1, SHAPE, cpu, self.recorded.append, self.reported.append)


def made(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The hidden state and the block of chunk 1."""
    return torch.ones(1, 3, 8, dtype=dtype), torch.ones(3, 2, 2, 4, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("value", "name"), [(nan, "NaN"), (inf, "Inf"), (-inf, "Inf")])
@pytest.mark.parametrize("tensor", ["K", "V", "hidden"])
def test_one_value_is_named_with_tensor_token_and_rank(
    dtype: torch.dtype, value: float, name: Any, tensor: Any
) -> None:
    noted, (hidden, block) = Noted(), made(dtype)
    if tensor == "hidden":
        hidden[0, 1, 5] = value
    else:
        block[1, "KV".index(tensor), 1, 3] = value
    noted.check.made(LAYER, hidden, block)
    assert noted.recorded == noted.reported == [NonFinite(1, "layer", 1, 2, tensor, name, token=5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_largest_finite_values_are_no_inf(dtype: torch.dtype) -> None:
    """Their sum is one."""
    noted, (hidden, block) = Noted(), made(dtype)
    hidden[:], block[:, 1] = torch.finfo(dtype).max, torch.finfo(dtype).max
    noted.check.made(LAYER, hidden, block)
    assert noted.recorded == []


def test_inf_and_its_negative_do_not_cancel() -> None:
    noted, (hidden, block) = Noted(), made()
    hidden[0, 0, :2] = torch.tensor([inf, -inf])
    noted.check.made(LAYER, hidden, block)
    assert [found.value for found in noted.recorded] == ["Inf"]


def test_every_op_is_recorded_and_the_first_alone_reported_until_it_is_undone() -> None:
    noted, (hidden, block) = Noted(), made()
    hidden[0, 2] = nan
    ops = [LAYER, Op("layer", 1, 3)]
    for op in ops:
        noted.check.made(op, hidden, block)
    assert [found.layer for found in noted.recorded] == [2, 3]
    assert [found.layer for found in noted.reported] == [2]
    noted.check.rewound(ops[:1])  # the second is undone
    noted.check.made(ops[1], hidden, block)
    assert len(noted.reported) == 1
    noted.check.rewound([])
    noted.check.made(ops[1], hidden, block)
    assert [found.layer for found in noted.reported] == [2, 3]


def test_what_spreads_sorts_behind_what_it_came_from() -> None:
    hidden, order = made()[0], list[NonFinite]()
    hidden[0, 0, 0] = nan
    for op in (
        Op("embed", 1), Op("layer", 1, 0), recv(Value("hidden", 1, 1), 0, 3), Op("layer", 1, 1), Op("norm", 1, 2),
    ):  # fmt: skip
        noted = Noted()
        if op.kind == "layer":
            for spoilt in (made()[1], made()[1].fill_(nan)):
                noted = Noted()
                noted.check.made(op, hidden, spoilt)
                order += noted.recorded
            order[-2:] = order[:-3:-1]  # K before the hidden state after it
        else:
            noted.check.made(op, hidden)
            order += noted.recorded
    assert [found.tensor for found in order] == ["hidden", "K", "hidden", "hidden", "K", "hidden", "final"]
    assert sorted(order, key=lambda found: found.order) == order
    words = [
        "the embedding of c1",
        "K of c1 l0",
        "after c1 l0",
        "before c1 l1",
        "K of c1 l1",
        "after c1 l1",
        "final",
    ]
    for found, word in zip(order, words, strict=True):
        assert word in str(found)
        assert NonFinite.of(found.as_dict()) == found


def test_largest_values_are_by_token() -> None:
    hidden, block = made()
    hidden[0, 1, 3], block[2, 1, 0, 0], block[0, 0, 1, 1] = -7, nan, -inf
    largest = largest_values(hidden, block, torch.zeros((3, 3)))
    assert largest[:, 2].tolist() == [1, 7, 1]
    assert largest[:, 0].tolist() == [inf, 1, 1]
    assert largest[:2, 1].tolist() == [1, 1]
    assert largest[2, 1].isnan()


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_lanes_that_are_threads_or_streams_find_the_same(
    small: Decoder, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """Layer 0 spoils its output for chunk 1; rank 1 receives it, and rank 2 what comes of it."""
    layer = Decoder.layer

    def spoilt(self: Decoder, index: int, hidden: Tensor, cache: Any, position: int) -> Tensor:
        output = layer(self, index, hidden, cache, position)
        if (index, position) == (0, 4):
            output[0, 2, 3] = inf
        return output

    monkeypatch.setattr(Decoder, "layer", spoilt)
    found: dict[int, NonFinite] = {}
    with twin(small, world_size=3, chunk_size=4, backend=backend) as world:
        for engine in world.engines:
            engine._on_nonfinite = lambda one: found.update({one.rank: one})
        world.all(lambda engine: engine.prefill_phase(prompt(12)))
        events = [event for engine in world.engines if engine.recorder for event in engine.recorder.events()]
    where = {rank: (one.op, one.chunk, one.layer, one.tensor) for rank, one in found.items()}
    assert where[0] == ("layer", 1, 0, "hidden")
    assert where[1] == ("recv", 1, 1, "hidden")
    assert min(found.values(), key=lambda one: one.order) == found[0]
    assert (found[0].value, found[0].token) == ("Inf", 6)
    blocks = {(event.chunk, event.layer): event.what for event in events if event.kind == "nonfinite"}
    assert blocks[1, 0] == "hidden"
    assert blocks[1, 1] == blocks[2, 2] == "kv"
    assert (0, 0) not in blocks
