"""Cuts: consistency, chains, stopping, and what each unit of stepping means."""

from collections import defaultdict
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinfer.plan.cut import UNITS, Cut, Cuts, is_inside, join, meet
from dinfer.plan.ops import Op, PlanError, Value
from dinfer.plan.partition import Shape
from dinfer.plan.plan import Lane, OpPlace, Plan
from dinfer.plan.schedule import build
from tests.support.facts import has_facts
from tests.support.plan_game import Game, channel
from tests.support.plan_strategies import safe_plans

CHAINS = ("layer", "wave", "chunk")
LOCKSTEP = build(Shape(2, 3, 2, (0, 1)), "lockstep", "pairwise")
PIPELINED = build(Shape(2, 3, 2, (0, 1)), "pipelined", "pairwise")
SEEDS = st.integers(0, 999)
MODES = st.booleans()


@st.composite
def stopped_games(draw: st.DrawFn) -> tuple[Game, set[OpPlace]]:
    """A run somewhere on its way, and the ops that have begun there."""
    plan = draw(safe_plans(ranks=3))
    game = Game(plan, rendezvous=draw(MODES), seed=draw(SEEDS))
    game.play(steps=draw(st.integers(0, sum(1 for _ in plan.places()))))
    return game, game.begun()


# -- cuts as sets


@given(safe_plans(), SEEDS, SEEDS, SEEDS)
def test_join_and_meet_are_a_lattice(plan: Plan, first: int, second: int, third: int) -> None:
    a, b, c = (random_positions(plan, seed) for seed in (first, second, third))
    assert meet(a, b) == meet(b, a)
    assert join(a, b) == join(b, a)
    assert meet(a, join(a, b)) == a == join(a, meet(a, b))
    assert meet(a, meet(b, c)) == meet(meet(a, b), c)
    assert join(a, join(b, c)) == join(join(a, b), c)
    assert meet(a, join(b, c)) == join(meet(a, b), meet(a, c))
    assert is_inside(a, b) is (join(a, b) == b) is (meet(a, b) == a)


@given(safe_plans(ranks=3), SEEDS, SEEDS)
def test_join_and_meet_of_consistent_cuts_are_consistent(plan: Plan, first: int, second: int) -> None:
    cuts = Cuts(plan)
    one, other = (cuts.stop(random_positions(plan, seed), set())[0] for seed in (first, second))
    assert cuts.is_consistent(meet(one, other))
    assert cuts.is_consistent(join(one, other))


@given(safe_plans(ranks=3), SEEDS)
def test_is_consistent_says_what_the_definition_says(plan: Plan, seed: int) -> None:
    cuts = Cuts(plan)
    cut = random_positions(plan, seed)
    assert cuts.is_consistent(cut) is (closed(plan, inside(cut)) == inside(cut))


@pytest.mark.parametrize("past", [((12,), (10,)), ((11,), (11,)), ((-1,), (0,))])
def test_positions_that_no_lane_has_are_no_cut(past: Cut) -> None:
    assert not Cuts(LOCKSTEP).is_consistent(past)


def test_start_and_end() -> None:
    cuts = Cuts(LOCKSTEP)
    assert (cuts.start, cuts.end) == (((0,), (0,)), ((11,), (10,)))
    assert cuts.is_consistent(cuts.start)
    assert cuts.is_consistent(cuts.end)


def test_a_plan_that_can_hang_has_no_cuts() -> None:
    with pytest.raises(PlanError, match="this plan can hang, so it has no cuts to step by"):
        Cuts(build(Shape(2, 3, 2, (0, 1)), "batched", "ring"))


# -- steps


@given(safe_plans(), st.sampled_from(CHAINS))
def test_links_are_consistent_and_grow_from_start_to_end(plan: Plan, unit: Any) -> None:
    cuts = Cuts(plan)
    chain = cuts.chain(unit)
    assert (chain[0], chain[-1]) == (cuts.start, cuts.end)
    assert all(cuts.is_consistent(link) for link in chain)
    assert all(is_inside(a, b) and a != b for a, b in pairwise(chain))


@given(safe_plans(ranks=3, layers=4), st.sampled_from(UNITS))
def test_steps_on_go_along_the_chain_and_steps_back_undo_them(plan: Plan, unit: Any) -> None:
    cuts = Cuts(plan)
    visited = [cuts.start]
    while visited[-1] != cuts.end:
        visited.append(cuts.next(visited[-1], unit))
        assert cuts.is_consistent(visited[-1])
        assert cuts.previous(visited[-1], unit) == visited[-2]
    if unit != "op":
        assert visited == cuts.chain(unit)


@pytest.mark.parametrize("unit", UNITS)
def test_past_either_end_a_step_does_nothing(unit: Any) -> None:
    cuts = Cuts(PIPELINED)
    assert cuts.next(cuts.end, unit) == cuts.end
    assert cuts.previous(cuts.start, unit) == cuts.start


@given(stopped_games(), st.sampled_from(UNITS))
def test_steps_from_anywhere_get_on_and_back(stopped: tuple[Game, set[OpPlace]], unit: Any) -> None:
    game, begun = stopped
    cuts = Cuts(game.plan)
    here, _ = cuts.stop(game.positions, begun)
    there, back = cuts.next(here, unit), cuts.previous(here, unit)
    assert is_inside(here, there)
    assert is_inside(back, here)
    assert cuts.is_consistent(there)
    assert cuts.is_consistent(back)
    assert (there == here) is (here == cuts.end)
    assert (back == here) is (here == cuts.start)


@given(stopped_games(), st.sampled_from(CHAINS))
def test_a_step_back_takes_out_the_last_unit_that_has_begun_and_nothing_else(
    stopped: tuple[Game, set[OpPlace]], unit: Any
) -> None:
    game, begun = stopped
    cuts = Cuts(game.plan)
    here, _ = cuts.stop(game.positions, begun)
    groups = [inside(after) - inside(before) for before, after in pairwise(cuts.chain(unit))]
    last = next((group for group in reversed(groups) if group & inside(here)), set())
    back = cuts.previous(here, unit)
    assert inside(back) == inside(here) - last
    assert cuts.is_consistent(back)


@given(safe_plans(ranks=3), st.sampled_from(CHAINS), st.sampled_from(CHAINS))
def test_after_steps_of_any_unit_a_step_back_undoes_one_unit(plan: Plan, unit: Any, other: Any) -> None:
    cuts = Cuts(plan)
    for cut in cuts.chain(other)[1:]:
        back = cuts.previous(cut, unit)
        undone = {plan.op(place) for place in inside(cut) - inside(back)}
        blocks = {(op.chunk, op.layer) for op in undone if op.kind == "layer"}
        link = next(n for n, link in enumerate(cuts.chain(unit)) if is_inside(cut, link))
        before, after = cuts.chain(unit)[link - 1 : link + 1]
        assert blocks <= layers_in(plan, after) - layers_in(plan, before)
        assert blocks == layers_in(plan, cut) - layers_in(plan, back)
        assert (
            undone
        )  # of a plan that sends blocks of several chunks in turn, the last unit may be a transfer alone
        assert is_inside(cut, cuts.next(back, unit)) or back != before


def test_going_back_in_a_large_plan_is_one_layer() -> None:
    """After a chunk of a pipeline, the waves of the next chunk have not begun: a layer back is that chunk's last."""
    plan = build(Shape(80, 64 * 4, 4, tuple(range(0, 80, 10))), "pipelined", "pairwise")
    cuts = Cuts(plan)
    cut = cuts.next(cuts.start, "chunk")
    for layer in (79, 78, 77):
        cut, before = cuts.previous(cut, "layer"), cut
        assert layers_in(plan, before) - layers_in(plan, cut) == {(0, layer)}


@given(safe_plans(ranks=3))
def test_a_step_by_op_is_one_op_or_one_transfer(plan: Plan) -> None:
    cuts = Cuts(plan)
    cut = cuts.start
    while cut != cuts.end:
        cut, before = cuts.next(cut, "op"), cut
        added = [plan.op(place) for place in inside(cut) - inside(before)]
        assert sorted(op.kind for op in added) in ([added[0].kind], ["recv", "send"])


@pytest.mark.parametrize("unit", ["block", ""])
def test_an_unknown_unit(unit: Any) -> None:
    for ask in (lambda: Cuts(LOCKSTEP).chain(unit), lambda: Cuts(LOCKSTEP).next(Cuts(LOCKSTEP).start, unit)):
        with pytest.raises(PlanError) as caught:
            ask()
        assert str(caught.value) == f"{unit!r} is not a unit to step by; use one of op, layer, wave, chunk."


# -- what a unit means, worked by hand: 2 ranks, 2 layers, chunks of 2 tokens and of 1


def test_layers_in_lockstep() -> None:
    assert Cuts(LOCKSTEP).blocks == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert Cuts(LOCKSTEP).chain("layer") == [
        ((0,), (0,)),
        ((3,), (1,)),  # embed c0, layer c0 l0, its send; its recv
        ((5,), (4,)),  # the hidden state goes on, layer c0 l1 is computed and synced
        ((8,), (5,)),  # embed c1, layer c1 l0, its sync
        ((11,), (10,)),  # hidden state, layer c1 l1, its sync; norm and final state
    ]


def test_in_lockstep_a_wave_is_a_layer() -> None:
    assert Cuts(LOCKSTEP).chain("wave") == Cuts(LOCKSTEP).chain("layer")


def test_chunks_in_lockstep() -> None:
    assert Cuts(LOCKSTEP).chain("chunk") == [((0,), (0,)), ((5,), (4,)), ((11,), (10,))]


def test_waves_in_a_pipeline() -> None:
    start, first, second, end = Cuts(PIPELINED).chain("wave")
    assert not any(map(any, start))
    assert named(first) == [{"compute": 2, "kv-out:1": 1}, {"kv-in:0": 1}]
    assert named(second) == [
        {"compute": 4, "hidden-out": 1, "kv-out:1": 2, "kv-in:1": 1},
        {"hidden-in": 1, "compute": 1, "kv-in:0": 2, "kv-out:0": 1},
    ]
    assert end == Cuts(PIPELINED).end


def test_layers_in_a_pipeline_go_one_after_another() -> None:
    cuts = Cuts(PIPELINED)
    assert cuts.blocks == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert named(cuts.chain("layer")[2]) == [
        {"compute": 2, "hidden-out": 1, "kv-out:1": 1, "kv-in:1": 1},
        {"hidden-in": 1, "compute": 1, "kv-in:0": 1, "kv-out:0": 1},
    ]


def test_chunks_in_a_pipeline() -> None:
    _, first, end = Cuts(PIPELINED).chain("chunk")
    assert named(first) == [
        {"compute": 2, "hidden-out": 1, "kv-out:1": 1, "kv-in:1": 1},
        {"hidden-in": 1, "compute": 1, "kv-in:0": 1, "kv-out:0": 1},
    ]
    assert end == Cuts(PIPELINED).end


def test_ops_in_a_pipeline_take_turns() -> None:
    cuts = Cuts(PIPELINED)
    steps = []
    cut = cuts.start
    for _ in range(7):
        cut, before = cuts.next(cut, "op"), cut
        steps.append({str(PIPELINED.op(place)) for place in inside(cut) - inside(before)})
    assert steps[:2] == [{"embed c0"}, {"layer c0 l0"}]
    assert {"send hidden c0 l1 -> 1, 2 tokens", "recv hidden c0 l1 <- 0, 2 tokens"} in steps[2:4]
    assert {"send kv c0 l0 -> 1, 2 tokens", "recv kv c0 l0 <- 0, 2 tokens"} in steps[2:4]
    assert {"layer c0 l1"} in steps[4:]


@given(safe_plans(), st.data())
def test_after_a_block_every_rank_holds_it_and_all_before_it(plan: Plan, data: st.DataObject) -> None:
    cuts = Cuts(plan)
    last = data.draw(st.integers(0, len(cuts.blocks) - 1))
    cut = cuts.after_block(*cuts.blocks[last])
    wanted = {Value("kv", *block) for block in cuts.blocks[: last + 1]}
    assert all(held >= wanted for held in held_by_rank(plan, cut))


@given(safe_plans(), st.data())
def test_after_a_chunk_every_rank_holds_all_its_blocks(plan: Plan, data: st.DataObject) -> None:
    chunk = data.draw(st.integers(0, len(plan.shape.chunks) - 1))
    cut = Cuts(plan).chain("chunk")[chunk + 1]
    wanted = {Value("kv", c, n) for c in range(chunk + 1) for n in range(plan.shape.layers)}
    assert all(held >= wanted for held in held_by_rank(plan, cut))


@given(safe_plans())
def test_a_wave_brings_each_rank_one_layer_at_most(plan: Plan) -> None:
    for before, after in pairwise(Cuts(plan).chain("wave")):
        new = [place.rank for place in inside(after) - inside(before) if plan.op(place).kind == "layer"]
        assert new
        assert len(new) == len(set(new))


@pytest.mark.parametrize("block", [(2, 0), (0, 2), (-1, 0), (0, -1)])
def test_there_is_no_such_block(block: tuple[int, int]) -> None:
    with pytest.raises(PlanError) as caught:
        Cuts(LOCKSTEP).after_block(*block)
    assert has_facts(
        str(caught.value), f"c{block[0]} l{block[1]} … chunks go from 0 to 1 … layers from 0 to 1"
    )


def test_a_block_that_two_ranks_compute_is_one_block() -> None:
    ops = [op for c in range(2) for op in (Op("embed", c), Op("layer", c, 0), Op("layer", c, 1))]
    lane = Lane("main", (*ops, Op("norm", 1, 2)))
    cuts = Cuts(Plan(Shape(2, 2, 1, (0, 1)), "own", "none", ((lane,), (lane,))))
    assert cuts.blocks == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert len(cuts.chain("layer")) == 5


# -- stopping


@given(stopped_games())
def test_a_stop_takes_in_all_that_has_begun_but_recvs_without_send(
    stopped: tuple[Game, set[OpPlace]],
) -> None:
    game, begun = stopped
    cuts = Cuts(game.plan)
    cut, void = cuts.stop(game.positions, begun)
    assert cuts.is_consistent(cut)
    assert is_inside(game.positions, cut)
    must_end = {place for place in begun if game.plan.op(place).kind != "recv"}
    assert must_end <= inside(cut)
    assert void == sorted(begun - inside(cut))
    assert len(set(void)) == len(void)


@given(stopped_games())
def test_a_stop_goes_no_further_than_it_must(stopped: tuple[Game, set[OpPlace]]) -> None:
    game, begun = stopped
    cut, _ = Cuts(game.plan).stop(game.positions, begun)
    bound = {place for place in begun if game.plan.op(place).kind != "recv"}
    assert inside(cut) == closed(game.plan, inside(game.positions) | bound)


@given(stopped_games())
def test_lanes_limited_to_the_stop_arrive_there(stopped: tuple[Game, set[OpPlace]]) -> None:
    game, begun = stopped
    game.limits, _ = Cuts(game.plan).stop(game.positions, begun)
    game.play()
    assert game.positions == game.limits
    assert not any(game.queues.values())


@given(stopped_games(), SEEDS, MODES)
def test_a_run_goes_on_from_where_it_stopped(
    stopped: tuple[Game, set[OpPlace]], seed: int, rendezvous: bool
) -> None:
    game, begun = stopped
    cut, _ = Cuts(game.plan).stop(game.positions, begun)
    again = Game(game.plan, rendezvous=rendezvous, seed=seed, positions=cut)
    again.play()
    assert again.is_complete()


@given(safe_plans(ranks=3), SEEDS, MODES, st.sampled_from(CHAINS))
def test_a_step_never_blocks(plan: Plan, seed: int, rendezvous: bool, unit: Any) -> None:
    for before, after in pairwise(Cuts(plan).chain(unit)):
        game = Game(plan, rendezvous=rendezvous, seed=seed, positions=before, limits=after)
        game.play()
        assert game.positions == after


def test_a_recv_without_its_send_is_released() -> None:
    # Rank 0 computes layer c0 l0; rank 1 has posted the recv of its block.
    cut, void = Cuts(LOCKSTEP).stop(((1,), (0,)), {OpPlace(0, 0, 1), OpPlace(1, 0, 0)})
    assert cut == ((2,), (0,))
    assert void == [OpPlace(1, 0, 0)]


def test_a_send_that_has_begun_brings_its_recv() -> None:
    cut, void = Cuts(LOCKSTEP).stop(((2,), (0,)), {OpPlace(0, 0, 2), OpPlace(1, 0, 0)})
    assert cut == ((3,), (1,))
    assert void == []


def test_a_buffered_send_that_has_ended_brings_its_recv() -> None:
    assert Cuts(LOCKSTEP).stop(((4,), (0,)), set()) == (((4,), (2,)), [])


# -- the same things, said naively


def inside(cut: Cut) -> set[OpPlace]:
    return {OpPlace(r, k, i) for r, lanes in enumerate(cut) for k, at in enumerate(lanes) for i in range(at)}


def closed(plan: Plan, places: set[OpPlace]) -> set[OpPlace]:
    """The fewest places that hold `places` and all that those need: added until nothing is missing."""
    ends: dict[Any, tuple[list[OpPlace], list[OpPlace]]] = defaultdict(lambda: ([], []))
    makers: dict[tuple[int, Value], OpPlace] = {}
    for place, op in plan.places():
        makers.update({(place.rank, value): place for value in op.makes()})
        if op.is_transfer:
            ends[channel(place.rank, op)][op.kind == "recv"].append(place)
    partner = {a: b for sends, recvs in ends.values() for a, b in zip(sends, recvs, strict=True)}
    partner |= {b: a for a, b in partner.items()}
    found: set[OpPlace] = set()
    todo = set(places)
    while todo:
        found |= todo
        needed = {makers[p.rank, value] for p in todo for value in plan.op(p).needs()}
        needed |= {partner[p] for p in todo if p in partner}
        needed |= {p._replace(index=p.index - 1) for p in todo if p.index}
        todo = needed - found
    return found


def layers_in(plan: Plan, cut: Cut) -> set[tuple[int, int]]:
    """The blocks whose layer op is in the cut."""
    ops = (
        op
        for rank, lanes in zip(plan.lanes, cut, strict=True)
        for lane, at in zip(rank, lanes, strict=True)
        for op in lane.ops[:at]
    )
    return {(op.chunk, op.layer) for op in ops if op.kind == "layer"}


def random_positions(plan: Plan, seed: int) -> Cut:
    """Positions in the middle of a run with buffered sends: few of them are consistent."""
    game = Game(plan, rendezvous=False, seed=seed)
    game.play(steps=seed % (1 + sum(1 for _ in plan.places())))
    return game.positions


def held_by_rank(plan: Plan, cut: Cut) -> list[set[Value]]:
    return Game(plan, rendezvous=True, seed=0, positions=cut).held


def named(cut: Cut) -> list[dict[str, int]]:
    """The positions of a cut of PIPELINED by lane name, but for lanes that have not begun."""
    ranks = zip(PIPELINED.lanes, cut, strict=True)
    return [{lane.name: at for lane, at in zip(lanes, ats, strict=True) if at} for lanes, ats in ranks]
