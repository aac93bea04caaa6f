"""The table of faults: where each can strike, what must be said of it, what ranks are told, and the README's copy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from dinfer.lab.cells import LAYERS, TOKENS, graph_of, possible_cells
from dinfer.lab.faults import (
    RULES,
    SLOW_BITS_PER_S,
    Cell,
    Expected,
    expected,
    following,
    orders,
    pace,
    slowed,
    target,
    to_third,
)
from dinfer.lab.hosts import LabNetwork
from dinfer.lab.lab import IDS
from dinfer.messages import Misbehave
from dinfer.model.checkpoint import check
from dinfer.plan.graph import channel_of
from dinfer.plan.ops import parse_op
from dinfer.rank.faults import ACTS
from dinfer.verdict.waits import HangKind

ROOT = Path(__file__).parents[3]
DOCUMENTS = [ROOT / "README.md", *(ROOT / "notebooks").rglob("*.md")]


def cell(
    fault: str, rank: int, layer: int, chunk: int = 0, strategy: str = "pairwise", schedule: str = "lockstep"
) -> Cell:
    return Cell(fault, rank, layer, chunk, strategy, schedule)


def possible(fault: str) -> Cell:
    """A cell of rank 1 where it strikes."""
    wanted = (fault, 1, "pairwise", "pipelined")
    return next(c for c in possible_cells() if (c.fault, c.rank, c.strategy, c.schedule) == wanted)


def struck(given: Cell) -> str:
    return str(target(graph_of(given.strategy, given.schedule), given))


def test_the_labs_model_and_prompt_are_what_its_plans_say() -> None:
    assert (check("demo").layers, len(IDS)) == (LAYERS, TOKENS)


def test_a_fault_strikes_at_the_op_that_the_rank_has_for_the_block() -> None:
    assert struck(cell("skip a send", 0, 1)) == "send kv c0 l1 -> 1, 4 tokens"
    assert struck(cell("skip a send", 0, 2)) == "send hidden c0 l2 -> 1, 4 tokens"
    assert struck(cell("skip a send", 0, 5, strategy="ring")) == "send kv c0 l5 -> 1, 4 tokens"
    assert struck(cell("skip a send", 0, 5)) == "None"  # in pairwise only its owner sends it
    assert struck(cell("SIGKILL", 2, 4)) == "layer c0 l4"
    assert struck(cell("SIGKILL", 0, 4)) == "recv kv c0 l4 <- 2, 4 tokens"
    assert struck(cell("exception", 0, 4)) == "None"  # nor can it raise in a layer that it does not compute
    # Some need more than their op.
    assert struck(cell("reorder two", 2, 5, 3)) == "None"  # the last one of its link
    assert struck(cell("wrong peer", 2, 5, 3)) == "None"  # the other rank listens no more
    assert struck(cell("wrong peer", 2, 5, 3, strategy="ring")) == "send kv c3 l5 -> 0, 4 tokens"
    assert struck(cell("slow link", 1, 2)) != "None"
    assert struck(cell("slow link", 1, 2, 1)) == "None"  # slow from the beginning on


def test_what_must_be_said() -> None:
    graph = graph_of("pairwise", "lockstep")
    said = expected(graph, cell("skip a recv", 2, 1))
    block = ("block c0 l1", "block c0 l1")
    assert said == Expected("never received", 2, "recv kv c0 l1 <- 0, 4 tokens", block)
    assert said.is_met_by("never received", 2, "rank 2 has passed `recv kv c0 l1 <- 0, 4 tokens` and not")
    assert said.is_met_by("never received", 2, "it is about block c0 l1")
    assert not said.is_met_by("never received", 2, "it is about block c0 l2")
    assert not said.is_met_by("never received", 1, "block c0 l1")
    assert not said.is_met_by("never sent", 2, "block c0 l1")
    assert expected(graph, cell("exception", 0, 1)).op == "layer c0 l1"
    gil = "stall in C with the GIL"
    assert (expected(graph, cell(gil, 0, 1)).op, expected(graph, cell(gil, 0, 2)).op) == ("layer c0 l1", "")
    assert expected(graph, cell("duplicate", 0, 2)).also == ("hidden c0 l2", "hidden c0 before layer 2")
    assert expected(graph, cell("SIGKILL", 0, 1)) == Expected("dead", 0)
    assert expected(graph, cell("wrong peer", 0, 1)).kind == "wrong peer"
    graph = graph_of("ring", "lockstep")
    assert expected(graph, cell("wrong peer", 0, 1, strategy="ring")).kind == "stalled link"


def test_what_must_be_said_of_a_link_that_is_broken_in_the_network() -> None:
    both_ways, one_way = graph_of("pairwise", "lockstep"), graph_of("ring", "lockstep")
    cut = expected(both_ways, cell("link cut", 1, 3), in_network=True)
    assert cut.op == "send kv c0 l3 -> 2, 4 tokens"
    assert cut.is_met_by("stalled link", 1, "the link 1→2 has been carrying block c0 l3 for 5 s")
    assert cut.is_met_by("stalled link", 1, "the link 1→2 has been carrying hidden c0 before layer 4 for 5 s")
    assert not cut.is_met_by("stalled link", 2, "the link 2→1 has been carrying block c0 l4 for 5 s")
    assert not cut.is_met_by("stalled link", 1, "the link 1→0 has been carrying block c0 l2 for 5 s")
    slow = expected(both_ways, cell("slow link", 1, 2), in_network=True)
    assert [slow.is_met_by("slow link", rank, "") for rank in (None, 0, 1, 2)] == [False, False, True, True]
    slow = expected(one_way, cell("slow link", 1, 2, strategy="ring"), in_network=True)
    assert [slow.is_met_by("slow link", rank, "") for rank in (None, 0, 1, 2)] == [False, False, True, False]
    for fault in set(RULES) - {"link cut", "slow link"}:
        given, graph = possible(fault), graph_of("pairwise", "pipelined")
        assert expected(graph, given, in_network=True) == expected(graph, given)


def test_who_is_slow_is_not_hung_and_all_else_is() -> None:
    assert {rule.kind for rule in RULES.values()} <= set(get_args(HangKind))
    slow = {fault for fault, rule in RULES.items() if rule.is_slow}
    assert slow == {"slow rank 2x", "slow rank 10x", "slow link"}


def test_every_cell_that_is_possible_gives_orders_that_ranks_can_follow() -> None:
    for given in possible_cells():
        graph = graph_of(given.strategy, given.schedule)
        for rank, messages in orders(graph, given).items():
            mine = {str(op) for lane in graph.plan.lanes[rank] for op in lane.ops}
            for message in messages:
                assert message.act in ACTS
                assert set(message.ops) <= mine, (given, message)


@pytest.mark.parametrize("fault", ["link cut", "slow link"])
def test_links_break_in_the_network_where_there_is_one(fault: str) -> None:
    """By the rank that sends over it, when it comes to its op; other ranks only keep their pace."""
    graph, network = graph_of("pairwise", "pipelined"), LabNetwork("hub", (), "10.77.0.1")
    given = possible(fault)
    op = target(graph, given)
    assert op
    broken = network.cut(1, op.peer) if fault == "link cut" else network.slow(1, op.peer, SLOW_BITS_PER_S)
    order = Misbehave(act="command", ops=(str(op),), command=broken)
    paced = pace(0.04 if fault == "slow link" else 0.02)
    assert orders(graph, given, network) == {0: [paced], 1: [paced, order], 2: [paced]}
    other = given._replace(fault="skip a send")
    assert orders(graph, other, network) == orders(graph, other)


@pytest.mark.parametrize("fault", [fault for fault, rule in RULES.items() if rule.act is None])
def test_orders_that_need_the_plan(fault: str) -> None:
    graph, given = graph_of("pairwise", "pipelined"), possible(fault)
    paced = {rank: messages[0].seconds for rank, messages in orders(graph, given).items()}
    more = [(rank, message) for rank, messages in orders(graph, given).items() for message in messages[1:]]
    if fault.startswith("slow rank"):
        assert not more
        assert paced[1] >= 2 * paced[0] == 2 * paced[2]
        return
    (rank, message), op = more[0], target(graph, given)
    assert op
    if fault == "reorder two":
        after = parse_op(message.ops[1])
        assert (rank, after, channel_of(1, after)) == (1, following(graph, 1, op), channel_of(1, op))
    elif fault == "wrong peer":
        assert (rank, message.wire) == (1, (to_third(graph, 1, op).peer,))
        assert message.wire[0] not in (1, op.peer)
    else:  # the link's other end is told
        assert rank == op.peer
        assert message.peer in (None, 1)


def test_slowed_runs_are_repeatable_and_slow_two_to_ten_times() -> None:
    assert slowed(1, 3) == slowed(1, 3) != slowed(2, 3)
    seconds = [messages[0].seconds for seed in range(50) for messages in slowed(seed, 3).values()]
    assert min(seconds) >= 0.02
    assert max(seconds) <= 1.0


def test_the_documentation_has_the_table() -> None:
    texts = [path.read_text(encoding="utf-8") for path in DOCUMENTS]
    found = [re.search(r"^\| fault \|.*?(?=^(?!\|))", text, re.MULTILINE | re.DOTALL) for text in texts]
    (table,) = [match[0] for match in found if match]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    told = {fault.replace(" ×", "x"): (kind.split("`")[1], who) for fault, kind, who in rows}
    assert told == {fault: (rule.kind, rule.who) for fault, rule in RULES.items()}
