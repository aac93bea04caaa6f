"""Schedules as torch.distributed.pipelining itself prints them, of each class that it has: proved, and named once
something in them is wrong."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage

from dinfer.errors import DinferError
from dinfer.verdict.pipelining import ScheduleProof, is_schedule, parse_schedule, verify_schedule

torch_schedules = cast(Any, pytest.importorskip("torch.distributed.pipelining.schedules"))
fake_pg = cast(Any, pytest.importorskip("torch.testing._internal.distributed.fake_pg"))

RANKS, BATCHES = 4, 8
SHAPED_V = ("ScheduleZBVZeroBubble", "ScheduleDualPipeV")
"""whose ranks have a stage from each end"""
MULTI = sorted(
    name
    for name, kind in vars(torch_schedules).items()
    if inspect.isclass(kind)
    and name.startswith("Schedule")
    and issubclass(kind, torch_schedules.PipelineScheduleMulti)
)
SINGLE = ("ScheduleGPipe", "Schedule1F1B")


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    """A process group whose other ranks do not exist: schedules are made, not run."""
    assert not dist.is_initialized(), "a test before this one has left its process group"
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=fake_pg.FakeStore())
    yield
    dist.destroy_process_group()


def made(name: str) -> Any:
    kind, loss = getattr(torch_schedules, name), torch.nn.functional.mse_loss
    mine = {True: (0, 2 * RANKS - 1), False: (0, RANKS)}[name in SHAPED_V]
    model, device = torch.nn.Linear(1, 1), torch.device("cpu")
    if name in SINGLE:
        return kind(PipelineStage(model, 0, RANKS, device), BATCHES, loss_fn=loss)
    return kind([PipelineStage(model, at, 2 * RANKS, device) for at in mine], BATCHES, loss)


def order_of(schedule: Any) -> dict[int, list[Any]]:
    find = getattr(schedule, "_get_pipeline_order", None)
    return dict(schedule.pipeline_order if find is None else find())


def table_of(schedule: Any) -> str:
    return str(torch_schedules._format_pipeline_order(order_of(schedule)))


def judged(text: str) -> ScheduleProof:
    assert is_schedule(text)
    return verify_schedule(parse_schedule(text))


def lines_of(order: dict[int, list[Any]]) -> str:
    return "\n".join(",".join("" if one is None else str(one) for one in order[rank]) for rank in order)


def test_torch_has_schedules_here() -> None:
    assert {*SHAPED_V, "ScheduleInterleaved1F1B"} <= {*MULTI}


@pytest.mark.parametrize("name", ["ScheduleGPipe", *MULTI])
def test_what_torch_prints_is_proved_as_a_table_and_line_by_line(name: str) -> None:
    schedule = made(name)
    table, lines = judged(table_of(schedule)), judged(lines_of(order_of(schedule)))
    assert table.proved
    assert table == lines
    assert table.ranks == RANKS


@pytest.mark.parametrize("name", MULTI)
@pytest.mark.parametrize("format", ["compute_only", "compute_comms"])
def test_what_torch_dumps_is_proved(name: str, format: str, tmp_path: Path) -> None:
    schedule, path = made(name), tmp_path / "schedule.csv"
    if not schedule.pipeline_order_with_comms:
        schedule._prepare_schedule_with_comms(schedule.pipeline_order)
    schedule._dump_csv(str(path), format=format)
    text = path.read_text()
    assert judged(text).proved
    assert ("SEND" in text) == (format == "compute_comms")


@pytest.mark.parametrize("name", MULTI)
def test_a_send_that_is_taken_out_is_named(name: str, tmp_path: Path) -> None:
    schedule, path = made(name), tmp_path / "schedule.csv"
    if not schedule.pipeline_order_with_comms:
        schedule._prepare_schedule_with_comms(schedule.pipeline_order)
    schedule._dump_csv(str(path), format="compute_comms")
    rows = [line.split(",") for line in path.read_text().splitlines()]
    last = max(at for at, word in enumerate(rows[1]) if "SEND_F" in word)
    lost = rows[1].pop(last)
    proof = judged("\n".join(map(",".join, rows)))
    stage, _, batch = lost.partition("SEND_F")
    assert not proof.proved
    awaited = f"{int(stage) + 1}RECV_F{batch}"
    assert awaited in proof.flaw


@pytest.mark.parametrize("name", ["ScheduleGPipe", *MULTI])
def test_a_forward_that_is_taken_out_is_named_in_the_table(name: str) -> None:
    order = order_of(made(name))
    at = next(at for at, one in enumerate(order[2]) if one is not None and str(one) == "2F3")
    order[2][at] = None
    assert judged(str(torch_schedules._format_pipeline_order(order))).flaw.endswith(
        "needs `2F3`, which no rank does"
    )


def test_actions_that_change_places_hang() -> None:
    order = order_of(made("ScheduleGPipe"))
    words = [str(one) for one in order[0]]
    first, last = words.index("0F0"), words.index("0B7")
    order[0][first], order[0][last] = order[0][last], order[0][first]
    proof = judged(str(torch_schedules._format_pipeline_order(order, error_step_number=first)))
    assert "rank 0 stands before `0B7`, which needs `0F7`" in proof.flaw


def test_the_table_of_1f1b_is_wrong_in_the_last_rank_where_it_is() -> None:
    """Up to torch 2.13 its last rank counts micro-batches from 1 in the table. What runs is other code, and right."""
    order = order_of(made("Schedule1F1B"))
    proof, last = judged(lines_of(order)), {str(one) for one in order[RANKS - 1]}
    if f"{RANKS - 1}F0" in last:
        assert proof.proved
    else:
        assert proof.flaw == f"rank {RANKS - 1}'s `{RANKS - 1}B0` needs `{RANKS - 1}F0`, which no rank does"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("        Rank 0 Rank 1\nStep 0: 0F0    1X0\n", "'1X0' is no action"),
        ("Rank 0 Rank 1\n0F0 1F0\n", "'0F0 1F0' is no step of the schedule"),
        ("        Rank 0 Rank 1\n", "it has no actions"),
    ],
)
def test_a_table_that_is_none(text: str, words: str) -> None:
    with pytest.raises(DinferError, match=words):
        judged(text)
