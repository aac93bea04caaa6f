"""verify: proofs, every flaw with rank and op, and agreement with a naive simulator."""

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinfer.config import Schedule, SyncStrategy
from dinfer.plan.ops import Op
from dinfer.plan.partition import Shape, partition
from dinfer.plan.plan import Lane, Plan, parse_plan
from dinfer.plan.schedule import build
from dinfer.plan.verify import Counterexample, Flaw, Proof, shortest_cycle, verify
from tests.support.facts import has_facts
from tests.support.plan_game import Game, finishes, waits
from tests.support.plan_strategies import mutated_plans, plans, reordered_plans, shapes

# Two ranks, two layers, chunks of two tokens and of one: by hand, so that nothing here depends on a schedule.
GOOD = """\
dinfer plan 1
layers 2, tokens 3, chunk_size 2
stages start at 0 1
schedule lockstep, sync_strategy pairwise
rank 0 lane main
  embed c0
  layer c0 l0
  send kv c0 l0 -> 1, 2 tokens
  send hidden c0 l1 -> 1, 2 tokens
  recv kv c0 l1 <- 1, 2 tokens
  embed c1
  layer c1 l0
  send kv c1 l0 -> 1, 1 token
  send hidden c1 l1 -> 1, 1 token
  recv kv c1 l1 <- 1, 1 token
  recv final <- 1, 1 token
rank 1 lane main
  recv kv c0 l0 <- 0, 2 tokens
  recv hidden c0 l1 <- 0, 2 tokens
  layer c0 l1
  send kv c0 l1 -> 0, 2 tokens
  recv kv c1 l0 <- 0, 1 token
  recv hidden c1 l1 <- 0, 1 token
  layer c1 l1
  send kv c1 l1 -> 0, 1 token
  norm c1 l2
  send final -> 0, 1 token
"""


def edited(*edits: tuple[str, str]) -> Counterexample:
    """What verify says of the good plan with each `old` line replaced by `new`."""
    text = GOOD
    for old, new in edits:
        assert text.count(f"  {old}\n") == 1, old
        text = text.replace(f"  {old}\n", "".join(f"  {line}\n" for line in new.split("\n") if line))
    verdict = verify(parse_plan(text))
    assert isinstance(verdict, Counterexample)
    return verdict


def moved(line: str, *, before: str) -> Counterexample:
    return edited((line, ""), (before, f"{line}\n{before}"))


def test_a_good_plan_is_proved() -> None:
    assert verify(parse_plan(GOOD)) == Proof(ranks=2, lanes=2, ops=21, transfers=7, blocks=4, levels=4)


def test_a_proof_says_what_was_proved() -> None:
    assert str(verify(parse_plan(GOOD))) == (
        "proved: 2 ranks, 2 lanes, 21 ops; each of 7 sends meets one recv; "
        "all ranks end with the same 4 blocks; no deadlock with rendezvous or buffered sends; "
        "4 layers on the longest path"
    )


@pytest.mark.parametrize("strategy", ["pairwise", "ring"])
@pytest.mark.parametrize("schedule", ["pipelined", "lockstep"])
@pytest.mark.parametrize("world_size", [*range(1, 17)])
def test_one_to_sixteen_ranks_are_proved(world_size: int, schedule: Schedule, strategy: SyncStrategy) -> None:
    shape = partition(layers=19, tokens=7, world_size=world_size, chunk_size=3)
    assert verify(build(shape, schedule, strategy)).proved


@given(plans(shapes(ranks=6, layers=9, chunks=5)))
def test_any_shape_is_proved_but_for_batched_on_several_ranks(plan: Plan) -> None:
    verdict = verify(plan)
    assert verdict.proved is (plan.schedule != "batched" or plan.world_size == 1), str(verdict)


@pytest.mark.parametrize("strategy", ["pairwise", "ring"])
def test_batched_is_refuted_under_rendezvous_in_plain_words(strategy: SyncStrategy) -> None:
    plan = build(partition(layers=4, tokens=5, world_size=3, chunk_size=2), "batched", strategy)
    assert str(verify(plan)) == (
        "refuted: deadlock with rendezvous sends: "
        "rank 0 sends block c0 l0 to rank 1 and waits; "
        "rank 1 sends block c0 l2 to rank 2 and waits; "
        "rank 2 sends block c0 l3 to rank 0 and waits"
    )


@pytest.mark.parametrize("strategy", ["pairwise", "ring"])
@pytest.mark.parametrize("world_size", [2, 3, 8, 16])
def test_batched_hangs_with_rendezvous_and_not_with_buffered_sends(
    world_size: int, strategy: SyncStrategy
) -> None:
    plan = build(partition(layers=17, tokens=3, world_size=world_size, chunk_size=2), "batched", strategy)
    verdict = verify(plan)
    assert isinstance(verdict, Counterexample)
    assert (verdict.flaw, verdict.sends) == ("cycle", "rendezvous")
    assert not finishes(plan, rendezvous=True, seed=0)
    assert finishes(plan, rendezvous=False, seed=0)


def test_a_plan_that_hangs_even_with_buffered_sends_does_not_blame_rendezvous() -> None:
    verdict = moved("recv kv c0 l1 <- 1, 2 tokens", before="send hidden c0 l1 -> 1, 2 tokens")
    assert str(verdict) == (
        "refuted: deadlock even with buffered sends: "
        "rank 0 waits to receive block c0 l1 from rank 1; "
        "rank 1 waits to receive hidden c0 l1 from rank 0"
    )
    assert verdict.sends == "buffered"


def test_a_lane_that_waits_for_itself() -> None:
    verdict = moved("layer c0 l0", before="embed c0")
    assert verdict.steps == (
        "rank 0 cannot start `layer c0 l0` before hidden c0 l0, which `embed c0` makes later",
    )
    assert [parse_plan(GOOD).lanes[p.rank][p.lane].name for p in verdict.places] == ["main"]


def test_a_cycle_names_the_need_that_closes_it_and_not_another_one() -> None:
    # `layer c1 l0` lacks hidden c1 l0, from lane b, as well; but what it waits for in vain is its own lane.
    lane_a = (Op("layer", 1, 0), Op("layer", 0, 0))
    lane_b = (Op("embed", 0), Op("norm", 1, 1), Op("embed", 1))
    verdict = verify(Plan(Shape(1, 2, 1, (0,)), "own", "none", ((Lane("a", lane_a), Lane("b", lane_b)),)))
    assert isinstance(verdict, Counterexample)
    assert verdict.steps == (
        "rank 0 cannot start `layer c1 l0` before block c0 l0, which `layer c0 l0` makes later",
    )


FLAWS: dict[str, tuple[list[tuple[str, str]], Flaw, str]] = {
    "unknown peer": ([("send final -> 0, 1 token", "send final -> 2, 1 token")],
        "out of range", "rank 1 … `send final -> 2, 1 token` … rank 2 … 2 ranks"),
    "its own peer": ([("send final -> 0, 1 token", "send final -> 1, 1 token")],
        "out of range", "rank 1 … `send final -> 1, 1 token` … 2 ranks"),
    "unknown chunk": ([("embed c1", "embed c2")], "out of range", "rank 0 … `embed c2` … chunk 2 … 2 chunks"),
    "unknown layer": ([("layer c1 l1", "layer c1 l2")],
        "out of range", "rank 1 … `layer c1 l2` … layer 2 … 2 layers"),
    "unknown block": ([("send kv c1 l1 -> 0, 1 token", "send kv c1 l2 -> 0, 1 token")],
        "out of range", "rank 1 … `send kv c1 l2 -> 0, 1 token` … layer 2 … 2 layers"),
    "norm of another state": ([("norm c1 l2", "norm c1 l1")], "out of range", "rank 1 … `norm c1 l1` … c1 l2"),
    "send without recv": ([("recv final <- 1, 1 token", "")],
        "unmatched", "rank 1 … `send final -> 0, 1 token` … no recv on rank 0"),
    "recv without send": ([("send final -> 0, 1 token", "")],
        "unmatched", "rank 0 … `recv final <- 1, 1 token` … no send on rank 1"),
    "blocks in another order": ([
            ("recv kv c1 l0 <- 0, 1 token", ""),
            ("recv kv c0 l0 <- 0, 2 tokens", "recv kv c1 l0 <- 0, 1 token\nrecv kv c0 l0 <- 0, 2 tokens"),
        ], "mismatch",
        "rank 0 … `send kv c0 l0 -> 1, 2 tokens` … rank 1 … `recv kv c1 l0 <- 0, 1 token` … block c1 l0"),
    "wrong size of a send": ([("send kv c1 l1 -> 0, 1 token", "send kv c1 l1 -> 0, 2 tokens")],
        "size", "rank 1 … `send kv c1 l1 -> 0, 2 tokens` … block c1 l1 has 1 token"),
    "wrong size of a recv": ([("recv kv c0 l1 <- 1, 2 tokens", "recv kv c0 l1 <- 1, 1 token")],
        "size", "rank 0 … `recv kv c0 l1 <- 1, 1 token` … block c0 l1 has 2 tokens"),
    "made twice": ([("embed c0", "embed c0\nembed c0")],
        "made twice", "rank 0 makes hidden c0 l0 twice … `embed c0` … `embed c0`"),
    "received and computed": ([("layer c0 l1", "embed c0\nlayer c0 l0\nlayer c0 l1")],
        "made twice", "rank 1 makes block c0 l0 twice … `recv kv c0 l0 <- 0, 2 tokens` … `layer c0 l0`"),
    "no op makes it": ([("embed c1", "")], "missing", "rank 0 … `layer c1 l0` needs hidden c1 l0"),
    "a block is not synced": ([("send kv c1 l1 -> 0, 1 token", ""), ("recv kv c1 l1 <- 1, 1 token", "")],
        "missing", "rank 0 ends without block c1 l1"),
    "the final state is not sent": ([("send final -> 0, 1 token", ""), ("recv final <- 1, 1 token", "")],
        "missing", "rank 0 ends without final"),
}  # fmt: skip


@pytest.mark.parametrize("name", FLAWS)
def test_each_flaw_names_rank_and_op(name: str) -> None:
    edits, flaw, facts = FLAWS[name]
    verdict = edited(*edits)
    assert isinstance(verdict, Counterexample)
    assert verdict.flaw == flaw
    assert has_facts(str(verdict), f"refuted ({flaw}): {facts}"), str(verdict)


def test_a_channel_used_from_two_lanes() -> None:
    text = GOOD.replace("  send final -> 0, 1 token\n", "  send final -> 0, 1 token\nrank 1 lane side\n")
    text = text.replace("  send kv c1 l1 -> 0, 1 token\n", "") + "  send kv c1 l1 -> 0, 1 token\n"
    assert str(verify(parse_plan(text))) == (
        "refuted (shared channel): rank 1 sends on the kv channel 1→0 from two lanes, main "
        "(`send kv c0 l1 -> 0, 2 tokens`) and side (`send kv c1 l1 -> 0, 1 token`), "
        "so their order is not fixed"
    )


def test_a_channel_received_on_two_lanes() -> None:
    text = GOOD.replace("  recv kv c1 l0 <- 0, 1 token\n", "")
    verdict = verify(parse_plan(text + "rank 1 lane side\n  recv kv c1 l0 <- 0, 1 token\n"))
    facts = (
        "rank 1 receives … 0→1 … main … `recv kv c0 l0 <- 0, 2 tokens` … side … `recv kv c1 l0 <- 0, 1 token`"
    )
    assert has_facts(str(verdict), f"refuted (shared channel) … {facts}"), str(verdict)


def test_a_plan_in_which_every_rank_computes_all_needs_no_transfer() -> None:
    ops = (Op("embed", 0), Op("layer", 0, 0), Op("layer", 0, 1), Op("norm", 0, 2))
    plan = Plan(Shape(2, 1, 1, (0, 1)), "own", "none", 2 * ((Lane("main", ops),),))
    assert verify(plan) == Proof(ranks=2, lanes=2, ops=8, transfers=0, blocks=2, levels=2)


def test_a_plan_with_lanes_for_fewer_ranks_is_refuted() -> None:
    alone = build(partition(layers=2, tokens=3, world_size=1, chunk_size=2), "lockstep", "pairwise")
    two = partition(layers=2, tokens=3, world_size=2, chunk_size=2)
    assert str(verify(Plan(two, "own", "pairwise", alone.lanes))) == (
        "refuted (missing): rank 1 ends without block c0 l0: no op there makes or receives it"
    )


def test_a_plan_without_ops_is_refuted() -> None:
    verdict = verify(Plan(Shape(1, 1, 1, (0,)), "none", "none", ((),)))
    assert (
        str(verdict) == "refuted (missing): rank 0 ends without block c0 l0: no op there makes or receives it"
    )


@given(mutated_plans(), st.integers(0, 99))
def test_verify_agrees_with_the_naive_game(plan: Plan, seed: int) -> None:
    ways = {
        mode: finishes(plan, rendezvous=mode == "rendezvous", seed=seed)
        for mode in ("rendezvous", "buffered")
    }
    verdict = verify(plan)
    assert verdict.proved is all(ways.values()), str(verdict)
    if isinstance(verdict, Counterexample) and verdict.flaw == "cycle":
        assert not ways[verdict.sends]
        assert ways["buffered"] is (verdict.sends == "rendezvous")


@given(reordered_plans(), st.integers(0, 99))
def test_the_cycle_is_one_of_waiting_lanes_and_none_is_shorter(plan: Plan, seed: int) -> None:
    verdict = verify(plan)
    if not isinstance(verdict, Counterexample) or verdict.flaw != "cycle":
        return
    game = Game(plan, rendezvous=verdict.sends == "rendezvous", seed=seed)
    game.play()
    waiting = waits(game)
    lanes = [(place.rank, place.lane) for place in verdict.places]
    assert [place.index for place in verdict.places] == [game.at[lane] for lane in lanes]
    assert all(after in waiting[lane] for lane, after in zip(lanes, lanes[1:] + lanes[:1], strict=True))
    graph = nx.DiGraph([(lane, other) for lane, others in waiting.items() for other in others])
    assert len(lanes) == min(map(len, nx.simple_cycles(graph)))


@given(st.dictionaries(st.integers(0, 7), st.lists(st.integers(0, 7), max_size=3, unique=True)))
def test_shortest_cycle_against_all_cycles(edges: dict[int, list[int]]) -> None:
    graph = nx.DiGraph([(node, other) for node, others in edges.items() for other in others])
    found = shortest_cycle(edges)
    assert len(found) == min(map(len, nx.simple_cycles(graph)), default=0)
    assert all(graph.has_edge(a, b) for a, b in zip(found, found[1:] + found[:1], strict=True))
    assert found[:1] == sorted(found)[:1]
