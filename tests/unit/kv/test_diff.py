"""Every change of KV is found and named exactly, on KV made up of random numbers, and nothing else is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from dinfer.kv.diff import diff_ranks, diff_sources
from dinfer.kv.difference import Diff
from dinfer.kv.source import Selection, Source
from dinfer.plan.ops import PlanError
from tests.support.held_kv import HeldHere, plan_of

INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


class Place(NamedTuple):
    rank: int
    chunk: int
    layer: int
    tensor: int
    head: int
    token: int
    dim: int


def whole(source: Source, ranks: Sequence[int] | None = None) -> Selection:
    subject = source.subject
    return Selection(
        tuple(source.ranks if ranks is None else ranks),
        tuple(range(subject.plan.shape.layers)),
        tuple(range(len(subject.spans))),
    )


def diff(source: HeldHere, ranks: Sequence[int] | None = None, values: int | None = 256) -> Diff:
    return diff_ranks(source, whole(source, ranks), values)


@st.composite
def sources(
    draw: st.DrawFn, world_sizes: tuple[int, int] = (2, 4), heads: tuple[int, int] = (1, 3)
) -> HeldHere:
    plan = plan_of(
        layers=4, tokens=draw(st.integers(3, 12)), world_size=draw(st.integers(*world_sizes)),
        chunk_size=draw(st.integers(1, 5)), strategy=draw(st.sampled_from(("ring", "pairwise"))),
    )  # fmt: skip
    return HeldHere(
        plan, heads=draw(st.integers(*heads)), dims=draw(st.sampled_from((2, 4))),
        dtype=draw(st.sampled_from(tuple(INTEGERS))), seed=draw(st.integers(0, 99)), new=draw(st.integers(0, 3)),
    )  # fmt: skip


@st.composite
def places(draw: st.DrawFn, source: HeldHere, *, new: bool = False) -> Place:
    subject = source.subject
    chunk = draw(st.integers(0, (len(subject.spans) if new else len(subject.plan.shape.chunks)) - 1))
    return Place(
        draw(st.sampled_from(list(source.kv))), chunk, draw(st.integers(0, 3)), draw(st.integers(0, 1)),
        draw(st.integers(0, subject.kv_heads - 1)), draw(st.sampled_from(subject.spans[chunk])),
        draw(st.integers(0, subject.head_dim - 1)),
    )  # fmt: skip


def flip(source: HeldHere, at: Place, block: Tensor, bit: int = 3) -> None:
    row = at.token - source.subject.spans[at.chunk].start
    words = block.view(INTEGERS[block.dtype])
    words[row, at.tensor, at.head, at.dim] ^= 1 << bit


def is_at(found: Diff, at: Place) -> bool:
    one = found.first
    return one is not None and (one.layer, one.tensor, one.head, one.token, one.dim, one.kind) == (
        at.layer, "KV"[at.tensor], at.head, at.token, at.dim, "value",
    )  # fmt: skip


@given(sources(world_sizes=(1, 4)))
def test_equal_kv_is_equal(source: HeldHere) -> None:
    found = diff(source)
    assert found.equal
    assert found.first is None
    assert "bit for bit" in str(found)
    assert not source.fetched


@given(st.data(), sources(), st.integers(0, 15))
def test_one_bit_in_memory_is_located_exactly(data: st.DataObject, source: HeldHere, bit: int) -> None:
    at = data.draw(places(source))
    before = source.kv[at.rank][at.layer][at.token, at.tensor, at.head, at.dim].item()
    flip(source, at, source.block(at.rank, at.chunk, at.layer), bit if bit < 15 else 0)
    found = diff(source)
    assert [one.rank for one in found.differences] == [at.rank]
    assert is_at(found, at)
    one = found.first
    assert one
    assert one.values
    assert one.chunk == at.chunk
    assert one.values[1] == before
    assert one.op == f"after `{source.way.op(at.rank, at.chunk, at.layer)}` in rank {at.rank}'s memory"
    assert one.where == "memory"
    assert source.fetched == 2


@given(st.data(), sources())
def test_bytes_that_change_on_the_wire_are_named_by_the_first_hop(
    data: st.DataObject, source: HeldHere
) -> None:
    at = data.draw(places(source))
    owner = source.subject.plan.shape.owners[at.layer]
    assume(at.rank != owner)
    behind = source.wire(at.rank, at.chunk, at.layer, lambda block: flip(source, at, block))
    found = diff(source)
    assert [one.rank for one in found.differences] == behind
    op = source.way.op(at.rank, at.chunk, at.layer)
    for one in found.differences:
        assert one.where == "wire"
        assert one.op == (op if one.rank == at.rank else f"{op} on rank {at.rank}")
    assert is_at(found, at)


@given(st.data(), sources())
def test_bytes_that_change_before_they_are_passed_on_are_named_by_whose_memory(
    data: st.DataObject, source: HeldHere
) -> None:
    at = data.draw(places(source))
    behind = source.before_sending(at.rank, at.chunk, at.layer, lambda block: flip(source, at, block))
    found = diff(source)
    assert [one.rank for one in found.differences] == behind
    op = f"after `{source.way.op(at.rank, at.chunk, at.layer)}` in rank {at.rank}'s memory"
    assert {(one.op, one.where) for one in found.differences} == {(op, "memory")}
    one = found.first
    assert one
    assert (one.layer, one.tensor, one.head, one.token) == (at.layer, "KV"[at.tensor], at.head, at.token)
    nobody = len(behind) == len(source.kv)  # holds what was computed
    assert one.dim == (None if nobody else at.dim)
    assert ("no rank holds what was computed" in str(found)) == nobody


@given(st.data(), sources(world_sizes=(3, 4)))
def test_without_a_ledger_the_majority_is_right(data: st.DataObject, source: HeldHere) -> None:
    source.ledgers = {rank: {} for rank in source.kv}
    at = data.draw(places(source, new=True))
    flip(source, at, source.block(at.rank, at.chunk, at.layer))
    found = diff(source)
    assert [one.rank for one in found.differences] == [at.rank]
    assert is_at(found, at)
    assert found.first
    assert found.first.where == ("" if at.chunk < len(source.subject.plan.shape.chunks) else "compute")


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("by_owner", [True, False])
def test_what_was_edited_by_hand_is_told_as_that(world_size: int, by_owner: bool) -> None:
    source = HeldHere(plan_of(world_size=world_size))
    owner = source.subject.plan.shape.owners[1]
    rank = owner if by_owner else (owner + 1) % world_size
    source.kv[rank][1][2, 1, 0, 3] = 8
    source.note(rank, 0, 1, None)
    rows, noted = source.ledgers[rank][0, 1]
    source.ledgers[rank][0, 1] = rows, noted._replace(edited=True)
    found = diff(source)
    assert [(one.rank, one.token, one.dim, one.where) for one in found.differences] == [
        (rank, 2, 3, "memory")
    ]
    assert "edited by hand in its memory" in found.verdict


def test_without_a_ledger_the_owner_is_right_between_two() -> None:
    source = HeldHere(plan_of(world_size=2), ledger=False)
    owner = source.subject.plan.shape.owners[1]
    source.kv[owner][1][3, 0, 0, 0] = 7
    assert [one.rank for one in diff(source).differences] == [1 - owner]


CHANGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "empty": lambda part, _: part.zero_(),
    "heads": lambda part, _: part.copy_(part.roll(1, dims=2)),
    "stale": lambda part, before: part.copy_(before[: len(part)]),
    "permuted": lambda part, _: part.copy_(part[[*range(1, len(part)), 0]]),
}


@pytest.mark.parametrize("kind", CHANGES)
@given(data=st.data(), source=sources(heads=(2, 3)), tensor=st.sampled_from(("K", "V", None)))
def test_rows_that_are_other_rows_are_named_as_that(
    kind: str, data: st.DataObject, source: HeldHere, tensor: str | None
) -> None:
    at = data.draw(places(source))
    block, span = (
        source.block(at.rank, at.chunk, at.layer),
        {"K": slice(0, 1), "V": slice(1, 2), None: slice(0, 2)},
    )
    assume(kind != "stale" or at.chunk)
    assume(kind != "permuted" or len(block) > 1)
    before = source.block(at.rank, max(0, at.chunk - 1), at.layer)[:, span[tensor]].clone()
    CHANGES[kind](block[:, span[tensor]], before)
    found = diff(source)
    assert {(one.rank, one.layer, one.chunk, one.kind, one.where) for one in found.differences} == {
        (at.rank, at.layer, at.chunk, kind, "memory")
    }
    assert [one.tensor for one in found.differences] == [tensor] if tensor else ["K", "V"]
    assert found.rows == block.shape[0] * block.shape[2] * (1 if tensor else 2)
    assert not source.fetched
    assert str(found).startswith(f"rank {at.rank}, layer {at.layer}, chunk {at.chunk}: ")


@given(st.data(), sources())
def test_k_for_v_is_named_as_that(data: st.DataObject, source: HeldHere) -> None:
    at = data.draw(places(source))
    block = source.block(at.rank, at.chunk, at.layer)
    block.copy_(block.flip(1))
    found = diff(source)
    assert [(one.kind, one.tensor) for one in found.differences] == [("swapped", "K"), ("swapped", "V")]
    assert "K holds V's rows and V holds K's rows" in str(found)


def test_two_faults_in_one_block_are_told_apart() -> None:
    source = HeldHere(plan_of(), heads=2)
    block = source.block(2, 1, 0)
    block[:, 0] = block[:, 0].flip(0).clone()
    block[2, 1, 1, 3] = 5
    found = diff(source)
    assert [(one.kind, one.tensor, one.head, one.token, one.dim) for one in found.differences] == [
        ("permuted", "K", None, 4, None),
        ("value", "V", 1, 6, 3),
    ]


@pytest.mark.parametrize(("value", "other"), [(0.0, -0.0), (math.nan, 1.0)])
def test_values_are_compared_by_their_bits(value: float, other: float) -> None:
    source = HeldHere(plan_of())
    for rank in source.kv:
        source.kv[rank][0][1, 0, 0, 2] = value
        source.note(rank, 0, 0, None)
    assert diff(source).equal
    source.kv[1][0][1, 0, 0, 2] = other
    found = diff(source)
    assert found.first
    assert (found.first.rank, found.first.token, found.first.dim) == (1, 1, 2)
    assert f"{other:g} against {value:g}".replace("-", "−") in str(found)


def test_a_value_in_a_sentence() -> None:
    source = HeldHere(plan_of(tokens=10), heads=2, dims=4, dtype=torch.bfloat16)
    for rank, value in ((0, -1.75), (1, -1.75), (2, 0.0312)):
        source.kv[rank][1][5, 0, 1, 3] = value
        source.note(rank, 1, 1, None)
    source.ledgers[2][1, 1] = source.ledgers[0][1, 1]
    assert str(diff(source)) == (
        "rank 2 differs at layer 1, K, head 1, token 5 ('t5'), dim 3: 0.0312 against −1.75; 1 of 640 values; "
        "received by ring hop 1→2 in chunk 1, changed afterwards in its memory"
    )


def test_more_rows_than_are_fetched_are_counted() -> None:
    source = HeldHere(plan_of(tokens=12, chunk_size=4), heads=2)
    source.kv[1][2] += 1
    found = diff(source, values=5)
    assert (found.rows, found.unfetched) == (12 * 2 * 2, 7 * 2 * 2)
    assert source.fetched == 10
    assert "the values of 28 of them were not fetched" in str(found)
    assert "at least 80 of 768 values" in found.verdict
    assert {one.chunk for one in found.differences} == {0, 1, 2}
    assert diff(source, values=None).unfetched == 0


# -- lengths


def test_a_rank_that_holds_a_layer_twice_is_named_in_the_first_line() -> None:
    """A real fault: one rank held 52 tokens of layer 0 where the others held 26, the second half the first again."""
    source = HeldHere(plan_of(tokens=26, chunk_size=26))
    source.kv[0][0] = torch.cat([source.kv[0][0]] * 2)
    found = diff(source)
    first = str(found).splitlines()[0]
    assert first == "rank 0 holds 52 tokens of layer 0, the others 26; rows 26–51 repeat rows 0–25"
    assert [(one.rank, one.layer, one.chunk, one.kind, one.token) for one in found.differences] == [
        (0, 0, 0, "repeated", 26)
    ]


def test_a_block_appended_twice_moves_what_is_behind_it() -> None:
    source = HeldHere(plan_of(tokens=12, chunk_size=4))
    rows = source.kv[2][3]
    source.kv[2][3] = torch.cat([rows[:8], rows[4:8], rows[8:]])
    found = diff(source)
    assert found.verdict == (
        "rank 2 holds 16 tokens of layer 3, the others 12; rows 8–11 repeat rows 4–7; "
        "rows 12–15 should be rows 8–11: shifted, 4 later"
    )
    assert [(one.rank, one.layer, one.chunk, one.kind) for one in found.differences] == [
        (2, 3, 1, "repeated")
    ]


def test_a_wrong_value_in_a_layer_that_is_too_long_is_found_too() -> None:
    source = HeldHere(plan_of(tokens=12, chunk_size=4))
    source.kv[2][3] = torch.cat([source.kv[2][3], source.kv[2][3][8:]])
    source.kv[2][3][5, 1, 0, 2] = 9
    assert [(one.kind, one.token, one.dim) for one in diff(source).differences] == [
        ("repeated", 12, None),
        ("value", 5, 2),
    ]


def test_rows_that_are_missing_are_named() -> None:
    source = HeldHere(plan_of(tokens=12, chunk_size=4))
    rows = source.kv[1][0]
    source.kv[1][0] = torch.cat([rows[:4], rows[8:]])
    found = diff(source)
    assert found.verdict == (
        "rank 1 holds 8 tokens of layer 0, the others 12; rows 4–7 should be rows 8–11: shifted, 4 earlier; "
        "rows 4–7 of the others are missing"
    )
    assert found.first
    assert found.first.kind == "missing"


def test_rows_that_all_ranks_have_repeated_are_named_though_they_agree() -> None:
    """A real fault: decode appended each row twice on all ranks alike."""
    source = HeldHere(plan_of(tokens=12, chunk_size=4), new=3)
    for rank in source.kv:
        rows = [[*layer[:12], layer[12], layer[12], layer[13], layer[13]] for layer in source.kv[rank]]
        source.kv[rank] = [torch.stack(layer) for layer in rows]
    found = diff(source)
    assert found.verdict == (
        "all 3 ranks hold 16 tokens of layers 0–3, it should be 14; row 13 repeats row 12; row 15 repeats row 14"
    )
    assert {(one.kind, one.op) for one in found.differences} == {("repeated", "decode")}


# -- what is there


def test_blocks_that_are_not_everywhere_yet_are_left_out_and_counted() -> None:
    source = HeldHere(plan_of(tokens=12, chunk_size=4))
    for rank in source.kv:
        source.spans[rank] = [2, 1, 1, 1]
        source.kv[rank] = [source.kv[rank][layer][: 4 * n] for layer, n in enumerate(source.spans[rank])]
    assert (
        str(diff(source)) == "all 3 ranks hold the same 5 blocks, bit for bit (7 are not on all of them yet)"
    )
    source.spans[1] = [0, 0, 0, 0]
    source.kv[1] = [layer[:0] for layer in source.kv[1]]
    with pytest.raises(PlanError, match="no block is on ranks 0–2 yet; the run stands at its end"):
        diff(source)


def test_chosen_ranks_alone_are_compared() -> None:
    source = HeldHere(plan_of())
    source.kv[1][0][0] = 1
    assert str(diff(source, (0, 2))) == "ranks 0 and 2 hold the same 4 × 3 blocks, bit for bit"
    assert {one.rank for one in diff(source, (0, 1)).differences} == {1}


# -- two sources


@given(sources(), st.integers(1, 5), st.sampled_from(("ring", "pairwise")), st.integers(1, 4), st.data())
def test_runs_of_one_prompt_are_compared_whatever_their_plans(
    one: HeldHere, chunk_size: int, strategy: str, world_size: int, data: st.DataObject
) -> None:
    subject = one.subject
    plan = plan_of(4, subject.plan.shape.tokens, world_size, chunk_size, strategy)
    rows = one.kv[0][0].shape[0]
    other = HeldHere(
        plan, heads=subject.kv_heads, dims=subject.head_dim, dtype=subject.dtype,
        new=len(subject.ids) - len(subject.prompt), seed=int(subject.name.split()[1]),
    )  # fmt: skip
    other.rename(name="the other")
    assert diff_sources(one, other, whole(one)).equal
    at = data.draw(places(one, new=True))
    assert at.token < rows
    flip(one, at, one.block(at.rank, at.chunk, at.layer))
    found = diff_sources(one, other, whole(one))
    assert [one.rank for one in found.differences] == [at.rank]
    assert is_at(found, at)


def test_the_side_whose_bytes_have_changed_is_named() -> None:
    one, other = HeldHere(plan_of()), HeldHere(plan_of(strategy="pairwise"))
    other.rename(name="the other")
    other.kv[1][2][5, 0, 0, 0] = 3
    found = diff_sources(one, other, whole(one))
    assert found.first
    assert (found.first.rank, found.first.op) == (1, "after `layer c1 l2` in rank 1's memory")
    assert "in the other: computed there in chunk 1, changed afterwards in its memory" in str(found)


def test_what_was_computed_otherwise_is_named_as_that() -> None:
    one, other = HeldHere(plan_of()), HeldHere(plan_of())
    other.rename(name="the other")
    for rank in one.kv:
        one.kv[rank][1][2] += 1
        one.note(rank, 0, 1, None)
    found = diff_sources(one, other, whole(one))
    assert {(d.layer, d.token, d.where, d.op) for d in found.differences} == {
        (1, 2, "compute", "layer c0 l1")
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ids": tuple(range(1, 11))}, r"run 0 and the other are of different prompts \(first at token 0\)"),
        ({"checkpoint": "b"}, "of different checkpoints: compare runs of one model"),
        ({"dtype": torch.bfloat16}, "hold float32 and bfloat16: every value differs"),
        ({"kv_heads": 4}, "hold KV of different shapes"),
    ],
)
def test_what_cannot_be_compared_is_refused(changes: dict[str, object], said: str) -> None:
    one, other = HeldHere(plan_of()), HeldHere(plan_of())
    other.rename(name="the other", **changes)
    with pytest.raises(PlanError, match=said):
        diff_sources(one, other, whole(one))


# -- forms


def test_text_and_html_show_the_verdict_and_escape_what_a_token_says() -> None:
    source = HeldHere(plan_of())
    source.rename(texts=("<script>",) * 10)
    source.kv[1][0][2, 0, 0, 0] = 1
    source.kv[1][0][3, 0, 0, 0] = 1
    found = diff(source)
    html = found._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert str(found).splitlines()[0] == found.verdict
    assert len(found.table()) == 2
    assert str(found.table(1)).endswith("and 1 more: .table(None) shows all")
    assert "<td>value</td>" in html
