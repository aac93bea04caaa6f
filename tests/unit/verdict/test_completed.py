"""Findings: what ended and is wrong all the same."""

from dinfer.verdict.completed import OpFinding, findings_of_events
from tests.support.made_ops import MadeOps


def found(ops: MadeOps, ended: tuple[int, ...] = (0, 1)) -> list[OpFinding]:
    return findings_of_events(ops.events, ops.groups, ended)


def test_nothing_is_found_where_all_is_right() -> None:
    ops = MadeOps(2)
    for layer in range(3):
        ops.message(0, 1, layer=layer)
        ops.all("all_reduce", 0, 1)
        ops.message(1, 0, shape=(2, 2), is_async=True)
    assert found(ops) == []


def test_a_message_that_another_size_has_received() -> None:
    ops = MadeOps(2, "nccl")
    ops.send(0, 1, shape=(128, 64), layer=3, chunk=1)
    ops.recv(1, 0, shape=(64, 64), layer=3, chunk=1)
    (one,) = found(ops)
    assert (one.kind, one.ranks, one.layer, one.chunk, one.line) == ("other size", (0, 1), 3, 1, "rank0.py:1")
    assert "[64, 64] float32) at rank1.py:1" in one.text
    assert "32,768 bytes for 16,384" in one.text


def test_another_dtype() -> None:
    ops = MadeOps(2)
    ops.send(0, 1, dtype="bfloat16", bytes=16)
    ops.recv(1, 0, bytes=16)
    assert [one.kind for one in found(ops)] == ["other size"]


def test_a_shape_that_differs_where_others_do_not() -> None:
    ops = MadeOps(2)
    for _ in range(3):
        ops.message(0, 1, shape=(4, 2))
    ops.send(0, 1, shape=(4, 2))
    ops.recv(1, 0, shape=(8, 1))
    assert [(one.kind, one.ranks) for one in found(ops)] == [("other shape", (1, 0))]


def test_shapes_that_always_differ_are_meant() -> None:
    ops = MadeOps(2)
    for _ in range(3):
        ops.send(0, 1, shape=(4, 2))
        ops.recv(1, 0, shape=(8,))
    assert found(ops) == []


def test_two_messages_that_changed_places() -> None:
    ops = MadeOps(2)
    ops.send(0, 1, layer=0, shape=(4, 1))
    ops.send(0, 1, layer=1, shape=(2, 2))
    ops.recv(1, 0, layer=1, shape=(2, 2))
    ops.recv(1, 0, layer=0, shape=(4, 1))
    (one,) = found(ops)
    assert (one.kind, one.ranks, one.line) == ("crossed", (1, 0), "rank1.py:1")


def test_blocks_of_equal_shape_that_changed_places() -> None:
    ops = MadeOps(2)
    ops.send(0, 1, layer=0)
    ops.send(0, 1, layer=1)
    ops.recv(1, 0, layer=1)
    ops.recv(1, 0, layer=0)
    assert [one.kind for one in found(ops)] == ["crossed"]


def test_layers_that_a_pipeline_counts_differently_are_meant() -> None:
    """What leaves after layer 3 enters before layer 4."""
    ops = MadeOps(2)
    for layer in range(3):
        ops.send(0, 1, layer=layer)
        ops.recv(1, 0, layer=layer + 1)
    assert found(ops) == []


def test_a_wait_that_nobody_made() -> None:
    ops = MadeOps(2)
    for _ in range(2):
        ops.send(0, 1, is_async=True, is_waited=False)
        ops.recv(1, 0)
    kinds = [(one.kind, one.ranks, one.line) for one in found(ops)]
    assert kinds == [("never waited", (0,), "rank0.py:1"), ("never waited", (0,), "rank0.py:2")]
    assert found(ops, ended=()) == []  # it may still come


def test_a_message_that_was_never_received() -> None:
    ops = MadeOps(2)
    ops.message(0, 1)
    ops.send(0, 1, is_async=True, open=True)
    (one,) = found(ops)
    assert (one.kind, one.ranks) == ("never received", (1, 0))
    assert "2 messages" in one.text
    assert found(ops, ended=(0,)) == []


def test_collectives_that_differ_and_ended() -> None:
    ops = MadeOps(2)
    ops.add(0, "all_gather", shape=(4,))
    ops.add(1, "all_gather", shape=(8,))
    assert [(one.kind, one.ranks) for one in found(ops)] == [("other size", (1, 0))]


def test_a_rank_that_always_comes_last() -> None:
    ops = MadeOps(3)
    for step in range(10):
        for rank in range(3):
            ops.add(rank, "all_reduce", at=step + 0.5 * (rank == 2))
    (one,) = found(ops)
    assert (one.kind, one.ranks) == ("slow rank", (2,))
    even = MadeOps(3)
    for step in range(12):
        for rank in range(3):
            even.add(rank, "all_reduce", at=step + 0.5 * (rank == step % 3))
    assert found(even) == []


def test_a_rank_that_comes_last_in_the_last_minute_of_a_long_session() -> None:
    """What went well before, of which there may be much, does not hide it."""
    ops = MadeOps(2)
    for step in range(100):
        for rank in range(2):
            ops.add(rank, "all_reduce", at=step / 10 + 0.01 * (rank == step % 2))
    for step in range(10):
        for rank in range(2):
            ops.add(rank, "all_reduce", at=1000 + step + 0.5 * (rank == 1))
    (one,) = found(ops)
    assert (one.kind, one.ranks) == ("slow rank", (1,))
    assert one.text.startswith(
        "rank 1 is slow: it came last to 10 of 10 collectives of the last minute, in the "
    )
    for rank in range(2):
        ops.add(rank, "all_reduce", at=2000)
    (one,) = found(ops)
    assert one.text.startswith(
        "rank 1 is slow: it came last to 10 of 10 collectives of a minute that ended 990 s before the last one, in the "
    )


def test_ranks_that_take_turns_to_come_last_are_not_slow_in_any_minute() -> None:
    ops = MadeOps(2)
    for step in range(300):
        for rank in range(2):
            ops.add(rank, "all_reduce", at=step + 0.5 * (rank == step % 2))
    assert found(ops) == []
