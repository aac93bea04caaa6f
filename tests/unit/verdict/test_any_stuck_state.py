"""For any plan and any state in which it can get stuck, the verdict names the root; and none while it moves."""

from __future__ import annotations

import networkx as nx
from hypothesis import assume, given
from hypothesis import strategies as st

from dinfer.plan.graph import channel_of
from dinfer.plan.plan import OpPlace, Plan
from dinfer.plan.verify import Counterexample, verify
from dinfer.verdict.judge import explain
from dinfer.verdict.signs import Came, Raised, Signs
from tests.support.plan_game import Broken, Game, waits
from tests.support.plan_strategies import plans, reordered_plans, safe_plans
from tests.support.stuck_states import CALLS_C, SLEEPS, WAITS, FaultyGame, changed, signs_of

SEEDS = st.integers(0, 999)


@st.composite
def places(draw: st.DrawFn, *, transfer: bool = False, compute: bool = False) -> tuple[Plan, OpPlace]:
    """A plan that verify proves, and one of its ops."""
    plan = draw(safe_plans())
    found = [
        place
        for place, op in plan.places()
        if (not transfer or op.kind == "send") and (not compute or not op.is_transfer)
    ]
    assume(found)
    return plan, draw(st.sampled_from(found))


@given(plan=reordered_plans() | plans(schedules=("batched",)), seed=SEEDS)
def test_ranks_that_wait_for_one_another_in_a_circle(plan: Plan, seed: int) -> None:
    proof = verify(plan)
    assume(isinstance(proof, Counterexample) and proof.flaw == "cycle")
    game = Game(plan, rendezvous=True, seed=seed)
    game.play()
    verdict = explain(plan, signs_of(game))
    assert verdict.kind == "cycle", verdict
    graph: nx.DiGraph[tuple[int, int]] = nx.DiGraph((a, b) for a, to in waits(game).items() for b in to)
    found = [(wait.node.rank, wait.node.lane) for wait in verdict.chain]
    assert all(graph.has_edge(a, b) for a, b in zip(found, [*found[1:], found[0]], strict=True))
    assert len(found) == min(map(len, nx.simple_cycles(graph)))
    assert set(verdict.ranks) == {rank for rank, _ in found}


@given(chosen=places(), seed=SEEDS, what=st.sampled_from(["Python", "C", "GIL", "nothing"]))
def test_a_lane_that_is_stuck_in_an_op(chosen: tuple[Plan, OpPlace], seed: int, what: str) -> None:
    """Whatever the op, computing or a transfer, and whoever waits for it."""
    plan, place = chosen
    game = FaultyGame(plan, seed=seed, frozen={place})
    game.play()
    name, op = plan.lanes[place.rank][place.lane].name, plan.op(place)
    signs = signs_of(game)
    for rank, lanes in enumerate(plan.lanes):
        signs = changed(signs, rank, answers=True, frames={lane.name: WAITS for lane in lanes})
    if what == "GIL":
        signs = changed(signs, place.rank, answers=False, frames={}, holder=name)
    elif what == "nothing":
        assume(not op.is_transfer)
        signs = changed(signs, place.rank, answers=True, frames={})
    else:
        frame = SLEEPS if what == "Python" else CALLS_C
        signs = changed(signs, place.rank, frames={**signs[place.rank].frames, name: frame})
    verdict = explain(plan, signs)
    wanted = {"Python": "stuck in Python", "C": "stuck in C", "GIL": "stuck in C", "nothing": "stuck"}[what]
    assert (verdict.kind, verdict.rank) == (wanted, place.rank), verdict
    assert f"`{op}`" in verdict.sentence
    assert set(verdict.blocked) == blocked_ranks(game) - {place.rank}


@given(plan=safe_plans(), seed=SEEDS, moves=st.integers(0, 60), data=st.data())
def test_a_rank_that_is_lost_or_stopped_or_has_raised(
    plan: Plan, seed: int, moves: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, plan.world_size - 1))
    game = FaultyGame(plan, seed=seed)
    game.play(moves)
    assume(not game.is_complete())
    game.dead = rank
    game.play()
    ways: dict[str, dict[str, object]] = {
        "dead": {"ended": "was killed by SIGKILL"},
        "stopped": {"process": "T"},
        "exception": {"raised": Raised("RuntimeError: boom", "layer c0 l0", "compute")},
        "another plan": {"plan_id": 1},
    }
    kind = data.draw(st.sampled_from(sorted(ways)))
    signs = signs_of(game)
    for other in range(plan.world_size):  # what a lost peer does to them
        if kind in ("dead", "exception") and other != rank and data.draw(st.booleans()):
            signs = changed(signs, other, raised=Raised("CommError: closed", secondary=True))
    verdict = explain(plan, changed(signs, rank, **ways[kind]))
    assert (verdict.kind, verdict.rank) == (kind, rank), verdict


@given(chosen=places(transfer=True), seed=SEEDS)
def test_a_message_that_is_never_sent(chosen: tuple[Plan, OpPlace], seed: int) -> None:
    """Its rank goes on as if it were. The next message of the link, if one comes, is not the one expected."""
    plan, place = chosen
    game = FaultyGame(plan, seed=seed, dropped=place)
    try:
        game.play()
        signs = signs_of(game)
    except Broken:
        signs = received_another(game, place)
    verdict = explain(plan, signs)
    assert (verdict.kind, verdict.rank) == ("never sent", place.rank), verdict
    assert verdict.peer == plan.op(place).peer
    assert f"`{plan.op(place)}`" in verdict.sentence


def received_another(game: FaultyGame, place: OpPlace) -> list[Signs]:
    """The receiver has raised at the recv of the lost message; the sender's next send has ended."""
    plan, op = game.plan, game.plan.op(place)
    channel = channel_of(place.rank, op)
    sender = next(
        lane
        for lane in game.at
        if (head := game.head(lane)) and head.kind == "send" and channel_of(lane[0], head) == channel
    )
    receiver = next(
        lane
        for lane in game.at
        if (head := game.head(lane)) and head.kind == "recv" and channel_of(lane[0], head) == channel
    )
    came, expected = game.head(sender), game.head(receiver)
    assert came
    assert expected
    game.at[sender] += 1
    raised = Raised("TransferError: …", str(expected), "", came=Came(came.value, came.tokens, 1, plan.id))
    return changed(signs_of(game), receiver[0], raised=raised)


def blocked_ranks(game: Game) -> set[int]:
    """Those that have not done all."""
    return {rank for rank, lane in game.at if game.head((rank, lane)) is not None}


@given(
    plan=plans(schedules=("pipelined", "lockstep")),
    seed=SEEDS,
    moves=st.integers(0, 200),
    still=st.floats(0, 0.9),
    medians=st.floats(0, 2),
)
def test_no_alarm_while_it_moves(plan: Plan, seed: int, moves: int, still: float, medians: float) -> None:
    game = Game(plan, rendezvous=True, seed=seed)
    game.play(moves)
    signs = signs_of(game, still)
    for rank in range(plan.world_size):
        signs = changed(signs, rank, medians={"layer": medians})
    verdict = explain(plan, signs)
    assert not verdict.is_hung, verdict
    assert verdict.kind == ("done" if game.is_complete() else "moving")


@given(plan=safe_plans(), seed=SEEDS, moves=st.integers(0, 100), still=st.floats(0, 1e4))
def test_no_alarm_while_cpu_time_moves(plan: Plan, seed: int, moves: int, still: float) -> None:
    """Ops that take for ever are called that, and never hung."""
    game = Game(plan, rendezvous=True, seed=seed)
    game.play(moves)
    signs = signs_of(game, still)
    for rank in range(plan.world_size):
        signs = changed(signs, rank, cpu_moves=True)
    assert not explain(plan, signs).is_hung


@given(plan=safe_plans(), seed=SEEDS, data=st.data())
def test_who_was_told_to_stop_is_not_stuck(plan: Plan, seed: int, data: st.DataObject) -> None:
    """Limits that are no consistent cut, as where one rank alone is stepped."""
    limits = tuple(tuple(data.draw(st.integers(0, len(lane.ops))) for lane in rank) for rank in plan.lanes)
    game = Game(plan, rendezvous=True, seed=seed, limits=limits)
    game.play()
    verdict = explain(plan, signs_of(game))
    assert verdict.kind in ("held", "paused", "done"), verdict
    if verdict.kind == "held":
        rank = verdict.rank
        assert any(game.head((r, n)) is None for r, n in game.at if r == rank)
