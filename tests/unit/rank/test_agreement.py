"""Ranks compare what they run, and name what differs and where."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dinfer.config import Config
from dinfer.model.checkpoint import check
from dinfer.rank.agreement import RanksDisagree, agree, facts_of
from dinfer.transport.gate import Gate
from dinfer.transport.in_process import Exchange
from tests.support.tiny import tiny_checkpoint

Facts = dict[str, str]
FACTS = {"dinfer": "0.1.0", "checkpoint": "aaaa", "chunk_size": "4", "plan": "1"}


def verdicts(*facts: Facts) -> list[str]:
    """What each rank is told; "" where all agree."""
    exchange = Exchange(len(facts), Gate())

    def one(rank: int) -> str:
        try:
            agree(exchange.comm(rank), facts[rank])
        except RanksDisagree as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(facts)) as pool:
        return list(pool.map(one, range(len(facts))))


def test_ranks_that_agree_go_on() -> None:
    assert verdicts(FACTS, FACTS, FACTS) == [""] * 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dinfer": "0.2.0"}, "dinfer: ranks 0, 2 0.1.0; rank 1 0.2.0."),
        ({"checkpoint": "bbbb", "plan": "2"}, "checkpoint: ranks 0, 2 aaaa; rank 1 bbbb."),
        ({"plan": "2"}, "plan: ranks 0, 2 1; rank 1 2."),
        (
            {"chunk_size": "8", "new": "1"},
            "chunk_size: ranks 0, 2 4; rank 1 8. new: ranks 0, 2 nothing; rank 1 1.",
        ),
    ],
)
def test_what_differs_is_named_on_every_rank_alike(changes: Facts, words: str) -> None:
    told = verdicts(FACTS, {**FACTS, **changes}, FACTS)
    assert told == [f"the ranks do not run the same thing. {words} Start all ranks alike."] * 3


def test_long_values_differ_too_and_are_equally_many_bytes() -> None:
    told = verdicts({"layer_split": "1, " * 9000}, {"layer_split": "2, " * 9000})
    assert told[0].startswith("the ranks do not run the same thing. layer_split: rank 0 ")


def test_facts_see_weights_flags_and_prompt_but_not_where_things_lie(tmp_path: Path) -> None:
    one, copy, other = (
        check(str(tiny_checkpoint(tmp_path / name, seed=seed)))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    config, ids = Config(prompt_ids=(1, 2), log_dir="x"), (1, 2)
    facts = facts_of(config, one, ids, 7)
    assert facts_of(config.with_(log_dir="y", master_port=9, prompt_ids=()), copy, ids, 7) == facts
    assert different(facts, facts_of(config, other, ids, 7)) == {"checkpoint"}
    assert different(facts, facts_of(config, one, (1, 3), 7)) == {"prompt"}
    assert different(facts, facts_of(config.with_(seed=1), one, ids, 7)) == {"seed"}


def different(one: Facts, other: Facts) -> set[str]:
    """The names whose values differ."""
    return {name for name in one if one[name] != other[name]}


def test_ranks_gather_in_order_and_nothing_of_it_stays() -> None:
    exchange = Exchange(3, Gate())

    def gathers(rank: int) -> list[list[bytes]]:
        comm = exchange.comm(rank)
        return [comm.all_gather(bytes([rank, n])) for n in range(50)]

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(gathers, range(3)))
    assert found == [[[bytes([rank, n]) for rank in range(3)] for n in range(50)]] * 3
    assert not exchange.gathered
