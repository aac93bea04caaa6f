"""Each kind of root by one example: who, what, and the sentence that says so."""

from __future__ import annotations

import re

import pytest

from dinfer.plan.cut import UNITS, Cuts, Unit
from dinfer.plan.ops import Value, parse_op
from dinfer.plan.plan import OpPlace, Plan, parse_plan
from dinfer.verdict.judge import TERMS, explain
from dinfer.verdict.signs import Came, KvBytes, Raised, Signs, StackFrame
from dinfer.verdict.verdict import Verdict
from dinfer.verdict.waits import HangKind
from dinfer.verdict.where import where_text
from tests.support.stuck_states import (
    CALLS_C,
    SLEEPS,
    WAITS,
    FaultyGame,
    changed,
    lockstep,
    pipelined,
    signs_of,
)

PLAN = pipelined()
SIZES = KvBytes(512, 256)


def place_of(plan: Plan, rank: int, op: str) -> OpPlace:
    return next(place for place, one in plan.places() if place.rank == rank and str(one) == op)


def frozen_at(rank: int, op: str, plan: Plan = PLAN) -> FaultyGame:
    """A run that has gone as far as it can while that op does not end."""
    game = FaultyGame(plan, seed=0, frozen={place_of(plan, rank, op)})
    game.play()
    return game


def stuck(rank: int = 1, op: str = "layer c1 l2", still_s: float = 60.0, **signs: object) -> list[Signs]:
    return changed(signs_of(frozen_at(rank, op), still_s), rank, **signs)


def told(signs: list[Signs], kind: str, rank: int | None, plan: Plan = PLAN) -> str:
    """The first sentence; kind and culprit must be these."""
    verdict = explain(plan, signs, SIZES)
    assert (verdict.kind, verdict.rank) == (kind, rank), verdict
    return verdict.sentence


def test_a_line_and_its_median_are_in_the_sentence() -> None:
    signs = stuck(frames={"compute": SLEEPS}, medians={"layer": 0.005}, answers=True)
    assert told(signs, "stuck in Python", 1) == (
        "rank 1 is in `layer c1 l2` and stuck in Python (60 s, 12,000 × its median), at `time.sleep(60)` in forward "
        "(model.py:12); ranks 0 and 2 wait for it"
    )
    assert "stuck in C (60 s), at `library.wait()`" in told(
        stuck(frames={"compute": CALLS_C}), "stuck in C", 1
    )
    held = "stuck in C code that holds the interpreter (the GIL) (60 s), at forward (model.py:14)"
    frame = StackFrame("/models/model.py", 14, "forward")
    assert held in told(stuck(frames={"busy": frame}, answers=False), "stuck in C", 1)
    assert "stuck at an unknown line" in told(stuck(), "stuck", 1)


def test_it_takes_both_time_and_a_still_cpu_to_be_stuck() -> None:
    assert told(stuck(still_s=4.9), "moving", None) == "the run moves"
    assert told(stuck(still_s=60, medians={"layer": 13.0}), "moving", None)
    said = told(stuck(cpu_moves=True, medians={"layer": 2.0}), "computing", 1)
    assert said.startswith("rank 1 is in `layer c1 l2` and still computing (60 s, 30 × its median)")
    assert told(stuck(cpu_moves=None, process="R"), "computing", 1)


def test_an_op_that_a_rank_has_never_done_is_measured_by_the_others() -> None:
    signs = changed(stuck(still_s=30), 0, medians={"layer": 7.0})
    assert told(signs, "moving", None)


def test_every_line_says_op_layer_chunk_bytes_peer_and_link() -> None:
    verdict = explain(PLAN, stuck(process="T"), SIZES)
    assert verdict.lines == (
        "rank 0: waits for final from rank 2 (1 token, 256 bytes, link 2→0 (hidden)), for 60.0 s; 2 more of its lanes "
        "wait",
        "rank 1: is stopped by a signal or a debugger in `layer c1 l2`",
        "rank 2: waits for hidden c1 before layer 4 from rank 1 (4 tokens, 1,024 bytes, link 1→2 (hidden)), for "
        "60.0 s; 5 more of its lanes wait",
    )
    assert verdict.blocked == (0, 2)
    assert [wait.node.rank for wait in verdict.chain] == [0, 2, 2, 2, 1]
    assert any("K and V, 4 tokens, 2,048 bytes, link 1→2 (kv)" in str(w) for w in stuck_waits(verdict))


def stuck_waits(verdict: Verdict) -> list[object]:
    return [wait for wait in verdict.waits.values() if wait.on]


def test_an_exception_ranks_above_waiting_death_and_what_it_does_to_others() -> None:
    signs = stuck(raised=Raised("RuntimeError: boom", "layer c1 l2", "compute"))
    signs = changed(signs, 0, ended="is gone", raised=Raised("CommError: closed", secondary=True))
    signs = changed(signs, 2, process="T")
    assert told(signs, "exception", 1).startswith(
        "rank 1 raised RuntimeError: boom at `layer c1 l2` and now waits in its own handler"
    )
    assert "handler" not in told(changed(signs, 1, ended="is gone"), "exception", 1)


def test_a_death_ranks_above_what_the_others_say_of_it() -> None:
    signs = stuck(ended="was killed by SIGKILL")
    signs = changed(signs, 0, raised=Raised("CommError: closed", secondary=True))
    assert told(signs, "dead", 1) == (
        "rank 1 was killed by SIGKILL; it stood in `layer c1 l2`; rank 2 waits for it"
    )
    alone = changed(stuck(), 0, raised=Raised("CommError: closed", secondary=True))
    assert told(changed(alone, 1, cpu_moves=True), "lost peer", 0) == (
        "rank 0 lost its connection: CommError: closed"
    )


def test_a_rank_that_runs_another_plan() -> None:
    said = told(changed(stuck(), 2, plan_id=lockstep(3).id), "another plan", 2)
    assert f"runs another plan (id {lockstep(3).id:016x}, the others' is {PLAN.id:016x})" in said


# -- messages that are not the ones expected: lockstep, so that what comes next is fixed


def got(
    op: str, came: str, *, tokens: int = 4, plan_id: int | None = None, passed: int = 0, **peer: object
) -> list[Signs]:
    """Rank 1 stands at `op` and got `came` from rank 0, which has done its op that sends that and `passed` more."""
    plan = lockstep()
    what, chunk, layer = came.split()
    value = Value(what, int(chunk[1:]), int(layer[1:]))  # type: ignore[arg-type]
    raised = Raised("TransferError: …", op, "main", came=Came(value, tokens, 99, plan_id or plan.id))
    at = place_of(plan, 1, op).index
    sent = next(
        (p.index for p, one in plan.places() if p.rank == 0 and one.kind == "send" and one.value == value), 0
    )
    common = {"process": "S", "cpu_moves": False, "quiet_s": 9.0, "still_s": (9.0,), "limits": (99,)}
    return [
        Signs(positions=(sent + 1 + passed,), started=(True,), **common, **peer),  # type: ignore[arg-type]
        Signs(positions=(at,), started=(True,), **common, raised=raised),  # type: ignore[arg-type]
    ]


BLOCKS = ("recv kv c0 l0 <- 0, 4 tokens", "recv kv c0 l1 <- 0, 4 tokens")


@pytest.mark.parametrize(
    ("op", "came", "more", "kind", "said"),
    [
        (
            0,
            "kv c0 l0",
            {"tokens": 3},
            "other size",
            "sent block c0 l0 in another size: at `recv kv c0 l0 <- 0, 4 ",
        ),
        (0, "kv c0 l0", {"plan_id": 7}, "another plan", "runs another plan (id 0000000000000007)"),
        (1, "kv c0 l0", {}, "sent twice", "sent block c0 l0 twice: at `recv kv c0 l1"),
        (0, "kv c0 l1", {"passed": -1}, "out of order", "sent block c0 l1 before block c0 l0: at"),
        (0, "kv c0 l1", {}, "never sent", "has passed `send kv c0 l0 -> 1, 4 tokens` and not sent it: at"),
    ],
)
def test_a_message_that_is_not_the_one_expected(
    op: int, came: str, more: dict[str, int], kind: HangKind, said: str
) -> None:
    signs = got(BLOCKS[op], came, **more)
    found = told(signs, kind, 0, lockstep())
    assert found.startswith(f"{TERMS[kind]}: rank 0 {said}")


def test_who_gets_a_message_by_another_plan_than_its_own() -> None:
    """It is the one that differs from the others, and not its sender."""
    signs = got(BLOCKS[1], "kv c0 l0")
    raised = signs[1].raised
    assert raised
    assert raised.came
    other = raised._replace(came=raised.came._replace(here=7))
    said = told(changed(signs, 1, raised=other), "another plan", 1, lockstep())
    assert said.startswith("plan mismatch: rank 1 runs another plan (id 0000000000000007)")


def test_a_recv_that_was_left_out_looks_the_same_but_for_its_event() -> None:
    signs = got(BLOCKS[1], "kv c0 l0")
    skipped = place_of(lockstep(), 1, BLOCKS[0])
    signs = changed(signs, 1, empty=frozenset({(skipped.lane, skipped.index)}))
    said = told(signs, "never received", 1, lockstep())
    assert said.startswith(
        "missing recv: rank 1 has passed `recv kv c0 l0 <- 0, 4 tokens` and not received it"
    )


def test_a_send_that_is_known_to_have_left_nothing_was_left_out() -> None:
    empty = frozenset({(0, place_of(lockstep(), 0, "send kv c0 l0 -> 1, 4 tokens").index)})
    assert told(got(BLOCKS[0], "kv c0 l1", passed=-1, empty=empty), "never sent", 0, lockstep())


def test_a_recv_out_of_order() -> None:
    signs = changed(got(BLOCKS[1], "kv c0 l0"), 1, positions=(place_of(lockstep(), 1, BLOCKS[0]).index,))
    assert (
        told(signs, "out of order", 1, lockstep())
        .removeprefix("order mismatch: ")
        .startswith("rank 1 receives block c0 l1 before what comes first")
    )


def test_a_message_for_another_rank() -> None:
    plan = pipelined()
    op = "recv kv c0 l0 <- 0, 4 tokens"
    came = Came(Value("kv", 0, 0), 4, 99, plan.id)
    game = frozen_at(1, op, plan)
    signs = changed(
        signs_of(game), 2, raised=Raised("TransferError: …", "recv kv c0 l2 <- 1, 4 tokens", came=came)
    )
    verdict = explain(plan, signs)
    assert (verdict.kind, verdict.rank, verdict.peer) == ("out of order", 1, 2)
    came = Came(Value("kv", 0, 3), 4, 99, plan.id)
    pair = parse_plan(plan.text().replace("send kv c0 l3 -> 0, 4 tokens", "send kv c1 l2 -> 0, 4 tokens"))
    raised = Raised("TransferError: …", "recv kv c0 l2 <- 1, 4 tokens", came=came._replace(plan_id=pair.id))
    verdict = explain(pair, changed(signs_of(game), 0, raised=raised))
    assert (verdict.kind, verdict.rank) == ("wrong peer", 1)
    assert "sent block c0 l3 to rank 0 in place of rank 2" in verdict.sentence


# -- transfers of which both ends, or one, are there

SEND, RECV = "send kv c0 l0 -> 1, 4 tokens", "recv kv c0 l0 <- 0, 4 tokens"


def both_there(still_s: float = 60.0, **signs: object) -> list[Signs]:
    found = signs_of(frozen_at(0, SEND), still_s)
    return [changed(found, rank, **signs)[rank] for rank in range(3)]


def test_a_link_that_stalls() -> None:
    said = told(both_there(medians={"send": 0.001, "recv": 0.001}), "stalled link", 0)
    assert said.startswith(
        "the link 0→1 has been carrying block c0 l0 for 60 s, 60,000 × its median: both ends are there"
    )
    assert told(both_there(4.0), "moving", None)
    assert "and CPU time moves" in told(changed(both_there(), 1, cpu_moves=True), "slow link", 0)


def test_of_all_that_a_link_carries_it_is_told_what_it_has_carried_longest() -> None:
    """However long one end had waited for the other before."""
    sends = (SEND, "send hidden c0 l2 -> 1, 4 tokens")
    game = FaultyGame(PLAN, seed=0, frozen={place_of(PLAN, 0, op) for op in sends})
    game.play()
    signs, lanes = signs_of(game, 58.0), [[lane.name for lane in PLAN.lanes[rank]] for rank in (0, 1)]
    still = [60.0 if name == "kv-out:1" else 58.0 for name in lanes[0]]
    signs = changed(signs, 0, still_s=tuple(still))
    signs = changed(signs, 1, still_s=tuple(60.0 if name == "kv-in:0" else 70.0 for name in lanes[1]))
    assert told(signs, "stalled link", 0).startswith("the link 0→1 has been carrying block c0 l0 for 60 s")
    signs = changed(signs, 0, still_s=tuple(118.0 - s for s in still))
    assert "hidden c0 before layer 2 for 60 s" in told(signs, "stalled link", 0)


def test_a_rank_that_cannot_take_part_is_not_a_link_that_stalls() -> None:
    """Its Python may be stuck in the send itself, or in C code elsewhere that lets no other thread of it go on."""
    frames = {lane.name: WAITS for lane in PLAN.lanes[0]}
    in_send = changed(both_there(), 0, frames={**frames, "kv-out:1": SLEEPS})
    assert "is in `send kv c0 l0 -> 1, 4 tokens` and stuck in Python" in told(in_send, "stuck in Python", 0)
    game = FaultyGame(PLAN, seed=0, frozen={place_of(PLAN, 0, SEND), place_of(PLAN, 0, "layer c1 l0")})
    game.play()
    mute = changed(signs_of(game), 0, answers=False, holder="compute")
    assert "is in `layer c1 l0` and stuck in C code that holds" in told(mute, "stuck in C", 0)


def test_the_op_that_holds_a_ranks_interpreter_is_named_whatever_its_other_lanes_are_in() -> None:
    game = FaultyGame(PLAN, seed=0, frozen={place_of(PLAN, 0, SEND), place_of(PLAN, 0, "layer c1 l0")})
    game.play()
    lane = PLAN.lanes[0][place_of(PLAN, 0, SEND).lane].name
    frame = SLEEPS._replace(native=True, c="usleep → clock_nanosleep")
    mute = changed(signs_of(game), 0, answers=False, holder=lane, frames={"busy": frame})
    said = told(mute, "stuck in C", 0)
    assert said.startswith(f"rank 0 is in `{SEND}` and stuck in C code that holds the interpreter (the GIL)")
    assert f", in usleep → clock_nanosleep, at {frame}" in said


def test_of_several_ops_that_may_hold_a_ranks_interpreter_none_is_blamed() -> None:
    other = SEND.replace("-> 1", "-> 2")
    game = FaultyGame(PLAN, seed=0, frozen={place_of(PLAN, 0, SEND), place_of(PLAN, 0, other)})
    game.play()
    mute = changed(signs_of(game), 0, answers=False)
    assert sum(mute[0].started) > 1
    assert "`, or another of its ops, and stuck in C code that holds" in told(mute, "stuck in C", 0)


def test_what_a_mute_rank_could_begin_waits_for_its_interpreter() -> None:
    game = frozen_at(1, "layer c1 l2")
    signs, compute = signs_of(game), place_of(PLAN, 1, "layer c1 l2").lane
    lane = next(n for n, at in enumerate(signs[1].started) if n != compute and at)
    started = [at and n != lane for n, at in enumerate(signs[1].started)]
    still = [600.0 if n == lane else 60.0 for n in range(len(started))]  # the one that has stood longest
    mute = changed(signs, 1, answers=False, holder="compute", started=tuple(started), still_s=tuple(still))
    assert "is in `layer c1 l2` and stuck in C code that holds" in told(mute, "stuck in C", 1)


def test_what_a_mute_rank_has_sent_may_have_come() -> None:
    """Its threads cannot say so while the interpreter is held."""
    game = frozen_at(1, "layer c1 l2")
    lane = next(n for n, lane in enumerate(PLAN.lanes[1]) if lane.name == "kv-out:0")
    there = next(n for n, lane in enumerate(PLAN.lanes[0]) if lane.name == "kv-in:1")
    signs = changed(signs_of(game), 1, answers=False, holder="compute")
    back = list(signs[1].positions)
    back[lane] -= 1  # it has ended at rank 0, and is not told to have ended here
    started = [*signs[1].started[:lane], True, *signs[1].started[lane + 1 :]]
    assert signs[0].positions[there] > back[lane]
    signs = changed(signs, 1, positions=tuple(back), started=tuple(started))
    assert "is in `layer c1 l2` and stuck in C code that holds" in told(signs, "stuck in C", 1)


def test_a_message_that_is_on_its_way_is_not_lost() -> None:
    game = FaultyGame(PLAN, seed=0, dropped=place_of(PLAN, 0, "send kv c1 l1 -> 1, 4 tokens"))
    game.play()
    assert told(signs_of(game, 4.0), "moving", None)
    assert told(signs_of(game, 5.0), "never sent", 0)


def test_a_recv_that_was_left_out_for_good() -> None:
    game = frozen_at(0, "send kv c1 l1 -> 1, 4 tokens")
    lanes = [lane.name for lane in PLAN.lanes[1]]
    number = lanes.index("kv-in:0")
    signs = signs_of(game)
    positions = list(signs[1].positions)
    positions[number] += 1
    said = told(changed(signs, 1, positions=tuple(positions)), "never received", 1)
    assert said.startswith(
        "missing recv: rank 1 has passed `recv kv c1 l1 <- 0, 4 tokens` and not received it; rank 0 waits for it"
    )


def test_a_message_that_is_sent_again_and_not_awaited() -> None:
    """As a recv that was left out, but for its event: its bytes have come."""
    game = frozen_at(0, "send kv c1 l1 -> 1, 4 tokens")
    number = [lane.name for lane in PLAN.lanes[1]].index("kv-in:0")
    signs = signs_of(game)
    positions = list(signs[1].positions)
    positions[number] += 1
    full = frozenset({(number, positions[number] - 1)})
    said = told(changed(signs, 1, positions=tuple(positions), full=full), "sent twice", 0)
    assert said.startswith("duplicate send: rank 0 sends block c1 l1 once more, though rank 1 has it")


def misdirected(last: str) -> list[Signs]:
    """Rank 0 was to send block c0 l1 to rank 1, which waits for it, and has sent it to rank 2, which has it. Now it
    sends rank 2's own; who gets it again is as `last` says."""
    plan = lockstep(3)
    first, own = "send kv c0 l1 -> 1, 4 tokens", "send kv c0 l1 -> 2, 4 tokens"
    game = FaultyGame(plan, seed=0, dropped=place_of(plan, 0, first), frozen={place_of(plan, 0, own)})
    game.play()
    signs, got = signs_of(game), place_of(plan, 2, "recv kv c0 l1 <- 0, 4 tokens")
    signs = changed(signs, 2, positions=(got.index + 1,), full=frozenset({(0, got.index)}))
    if last == "rank 2 again":
        came = Came(Value("kv", 0, 1), 4, 99, plan.id)
        raised = Raised("TransferError: …", "recv kv c1 l0 <- 0, 4 tokens", "main", came=came)
        place = place_of(plan, 2, raised.op)
        signs = changed(signs, 2, raised=raised, positions=(place.index,))
        signs = changed(signs, 0, positions=(place_of(plan, 0, own).index + 1,))
    return signs


@pytest.mark.parametrize("last", ["rank 2 again", "nobody"])
def test_a_message_that_another_rank_got(last: str) -> None:
    said = told(misdirected(last), "wrong peer", 0, lockstep(3))
    assert said.startswith("wrong peer: rank 0 sent block c0 l1 to rank 2 in place of rank 1")


@pytest.mark.parametrize("seconds", [0.0, 1.0, 4.9])
def test_who_has_just_sent_has_sent(seconds: float) -> None:
    """The one that waits may have it already: its own news come a little later."""
    assert told(changed(misdirected("nobody"), 0, still_s=(seconds,)), "moving", None, lockstep(3))
    skipped = FaultyGame(PLAN, seed=0, dropped=place_of(PLAN, 0, "send kv c1 l1 -> 1, 4 tokens"))
    skipped.play()
    signs = signs_of(skipped)
    assert told(signs, "never sent", 0)
    signs = changed(signs, 0, still_s=tuple(seconds for _ in signs[0].still_s))
    assert told(signs, "moving", None)


def test_a_plan_that_lacks_the_other_end() -> None:
    text = lockstep().text()
    for line in ("  send kv c1 l1 -> 1, 4 tokens\n", "  recv kv c1 l1 <- 0, 4 tokens\n"):
        plan = parse_plan(text.replace(line, ""))
        game = FaultyGame(plan, seed=0)
        game.play()
        kind, rank = ("never sent", 1) if "send" in line else ("never received", 0)
        assert "nowhere" in told(signs_of(game), kind, rank, plan)


# -- ranks that are not in prefill


def test_ranks_that_load_and_ranks_that_decode() -> None:
    done = tuple(tuple(len(lane.ops) for lane in lanes) for lanes in PLAN.lanes)
    signs = [
        Signs(
            at, (False,) * len(at), at, quiet_s=9.0, phase="decode", decoded=3, process="S", cpu_moves=False
        )
        for at in done
    ]
    behind = changed(signs, 2, decoded=2, frames={"decode": SLEEPS})
    assert told(behind, "stuck in Python", 2).startswith(
        "rank 2 computes token 2 and stuck in Python (9.0 s), at"
    )
    assert told(changed(behind, 2, cpu_moves=True), "computing", 2)
    alike = [changed(signs, rank, frames={"decode": WAITS})[rank] for rank in range(3)]
    assert told(changed(alike, 1, frames={"decode": SLEEPS}), "stuck in Python", 1).endswith(
        "ranks 0 and 2 wait for it"
    )
    absent = changed(signs, 1, phase="prefill", decoded=0, frames={"decode": SLEEPS})
    assert told(absent, "stuck in Python", 1).startswith("rank 1 has not begun to decode and stuck in Python")
    failed = changed(signs, 1, raised=Raised("MemoryError: full"))
    assert told(failed, "exception", 1).endswith("; ranks 0 and 2 wait for it")
    loading = changed(stuck(), 2, phase="loading", positions=(), quiet_s=1.0)
    assert told(changed(loading, 1, cpu_moves=True), "computing", 1)
    assert told(signs_at_end(done), "done", None) == "the run is done"


def signs_at_end(done: tuple[tuple[int, ...], ...]) -> list[Signs]:
    return [Signs(at, (False,) * len(at), at, phase="done") for at in done]


# -- slow, held


def test_slow_ranks_and_links_are_called_slow() -> None:
    game = FaultyGame(PLAN, seed=0)
    game.play(40)
    signs = signs_of(game, 0.1)
    for rank in range(3):
        signs = changed(signs, rank, medians={"layer": 0.02 if rank == 1 else 0.01})
    said = told(signs, "slow rank", 1)
    assert said.startswith(
        "rank 1 is slow, 2.0 ×: a layer takes it 20 ms where others take 10 ms; it has done "
    )
    links = [{1: 0.01, 2: 0.01}, {0: 0.01, 2: 0.01}, {0: 0.09, 1: 0.01}]
    signs = [changed(signs, rank, medians={}, links=links[rank])[rank] for rank in range(3)]
    assert (
        told(signs, "slow link", 0)
        == "the link 0→2 is slow, 9.0 ×: a block takes 90 ms where others take 10 ms"
    )
    signs = changed(signs, 0, links={1: 0.01, 2: 0.05})
    assert told(signs, "slow link", 0).endswith("where others take 10 ms, and 50 ms the other way")


@pytest.mark.parametrize("limit", [0, 1])
def test_a_rank_that_steps_alone_waits_for_one_that_was_not_told_to_go(limit: int) -> None:
    plan = lockstep()
    limits = ((limit,), (99,))
    signs = [
        Signs((limit,), (False,), limits[0], (60.0,), 60.0),
        Signs((0,), (True,), limits[1], (60.0,), 60.0),
    ]
    assert told(signs, "held", 0, plan) == (
        f"rank 0 stands before `{plan.lanes[0][0].ops[limit]}`, where it was told to stop; rank 1 waits for it"
    )
    both = [signs[0], Signs((0,), (False,), (0,), (60.0,), 60.0)]
    assert told(both, "paused", None, plan) == "the run stands where it was told to stop"


@pytest.mark.parametrize("plan", [PLAN, lockstep()], ids=["pipelined", "lockstep"])
@pytest.mark.parametrize("unit", UNITS)
def test_of_a_paused_run_every_rank_s_line_names_the_op_that_where_names(plan: Plan, unit: Unit) -> None:
    cuts = Cuts(plan)
    cut = cuts.start
    while cut != cuts.end:
        signs = [Signs(at, (False,) * len(at), at, (0.0,) * len(at), 0.0) for at in cut]
        named = re.findall(r"^rank (\d): .* next (`.*`)$", where_text(plan, signs), re.MULTILINE)
        assert len(named) >= 1
        lines = explain(plan, signs, SIZES).lines
        for rank, op in named:
            assert lines[int(rank)] == f"rank {rank}: stands before {op}, where it was told to stop"
        cut = cuts.next(cut, unit)


def test_sizes_are_of_the_op() -> None:
    assert SIZES.of(parse_op("send kv c0 l3 -> 1, 128 tokens")) == 128 * 512
    assert SIZES.of(parse_op("send final -> 1, 1 token")) == 256


def frame(file: str, line: int, function: str) -> str:
    return f'  File "{file}", line {line}, in {function}\n    {function}()'


OURS = "\n".join(
    frame(f"/home/ann/dinfer/{file}.py", 59, "send") for file in ("transport/gate", "engine/ops")
)


def test_a_verdict_prints_no_frames_of_dinfer() -> None:
    """Each rank's op is in its line."""
    lines = [f"rank {rank}: waits for rank {1 - rank} to take block c0 l0" for rank in range(2)]
    stacks = {rank: f"rank {rank} main:\n{OURS}" for rank in range(2)}
    told = str(Verdict("cycle", "deadlock: …", ranks=(0, 1), lines=tuple(lines), stacks=stacks))
    assert told.splitlines() == [
        "deadlock: …",
        f"  {lines[0]}",
        f"  {lines[1]}",
        "all frames of all threads: verdict.stacks",
    ]


def test_a_verdict_prints_where_each_rank_stands_in_the_user_s_code_the_culprit_first() -> None:
    stacks = {
        rank: f"rank {rank} main:\n{frame(f'/home/ann/rank{rank}.py', 31, 'stage')}\n{OURS}"
        for rank in range(3)
    }
    told = str(Verdict("stuck in Python", "rank 1 is stuck", ranks=(1,), stacks=stacks)).splitlines()
    assert told == [
        "rank 1 is stuck",
        *(
            line
            for rank in (1, 0, 2)
            for line in (f"rank {rank}'s Python:", f"  /home/ann/rank{rank}.py:31 in stage: stage()")
        ),
        "all frames of all threads: verdict.stacks",
    ]


@pytest.mark.parametrize(("ranks", "depth"), [(1, 250), (3, 20), (64, 250)])
def test_a_verdict_is_at_most_30_lines(ranks: int, depth: int) -> None:
    deep = "\n".join(frame("/home/ann/infer.py", line, "recurse") for line in range(depth))
    told = Verdict(
        "cycle",
        "deadlock: …",
        ranks=tuple(range(ranks)),
        lines=tuple(f"rank {rank}: waits" for rank in range(ranks)),
        stacks=dict.fromkeys(range(ranks), deep),
    )
    lines = str(told).splitlines()
    assert len(lines) <= 30
    assert "  /home/ann/infer.py:0 in recurse: recurse()" in lines, "the innermost"
    assert lines[-1] == "all frames of all threads: verdict.stacks"
    assert told.stacks[0] == deep
    assert ("  … and 52 more: verdict.lines" in lines) == (ranks == 64)
