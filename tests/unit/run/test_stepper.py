"""The stepper's own promises: clear errors, moves one after another, where ranks stand in words."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest

from dinfer.engine.board import Stand
from dinfer.model.decoder import Decoder
from dinfer.plan.cut import Cuts
from dinfer.plan.ops import PlanError
from dinfer.plan.partition import partition
from dinfer.plan.schedule import build
from dinfer.run.failure import RankFailed
from dinfer.run.stepper import NoProgress, Stepper
from dinfer.verdict.where import moved_lines, rank_text, where_text
from tests.support.expected import expected, is_complete
from tests.support.seeded_gate import SeededGate
from tests.support.twin import LocalFleet, Twin, prompt, twin

CHUNK = 4
IDS = list(prompt(10))


def let_rank_go(fleet: LocalFleet, made: Twin, rank: int) -> None:
    """Let one rank alone go to its end: it will wait for the others for ever."""
    made.engines[rank].executor.set_limits([len(lane.ops) for lane in fleet.plan.lanes[rank]])


def test_a_rank_cannot_go_back_while_it_runs(small: Decoder) -> None:
    with twin(small, world_size=2, chunk_size=CHUNK, schedule="lockstep") as made:
        fleet = made.prepare(IDS)
        let_rank_go(fleet, made, 0)
        assert fleet.wait(lambda stands: any(stands[0].started), 30)
        with pytest.raises(RuntimeError, match=r"rank 0 cannot go back to \[0\]: it stands at Stand"):
            made.engines[0].executor.rewind([0])


def test_a_rank_cannot_go_back_to_where_it_has_not_been(small: Decoder) -> None:
    with twin(small, world_size=1, chunk_size=CHUNK) as made:
        made.prepare(IDS)
        with pytest.raises(RuntimeError, match=r"rank 0 cannot go back to \[3\]"):
            made.engines[0].executor.rewind([3])


@pytest.mark.parametrize(("chunk", "layer"), [(3, 0), (0, 3), (-1, 0)])
def test_a_block_that_does_not_exist_is_refused_before_anything_moves(
    small: Decoder, chunk: int, layer: int
) -> None:
    with twin(small, world_size=2, chunk_size=CHUNK) as made:
        stepper = Stepper(made.prepare(IDS), timeout=60)
        stepper.step()
        cut = stepper.pause()
        with pytest.raises(PlanError, match=r"chunks go from 0 to 2, layers from 0 to 2"):
            stepper.run_to(chunk, layer)
        assert stepper.pause() == cut


def test_a_plan_that_can_hang_is_not_stepped(small: Decoder) -> None:
    with twin(small, world_size=2, chunk_size=CHUNK, schedule="batched", unsafe=True) as made:
        fleet = made.prepare(IDS)
        with pytest.raises(PlanError, match="this plan can hang, so it has no cuts"):
            Stepper(fleet)


def test_a_failed_rank_ends_the_step_with_its_error(small: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    with twin(small, world_size=3, chunk_size=CHUNK) as made:
        stepper = Stepper(made.prepare(IDS), timeout=60)
        monkeypatch.setattr(made.engines[1].executor.state, "layer", None)
        with pytest.raises(RankFailed, match="rank 1 failed at `layer c0 l1`"):
            stepper.step("chunk")
        assert "rank 1: " in stepper.where()


def test_ranks_that_do_not_arrive_are_told_with_where_they_stand(small: Decoder) -> None:
    gate = SeededGate(0)
    with twin(small, gate=gate, world_size=2, chunk_size=CHUNK, schedule="lockstep") as made:
        fleet = made.prepare(IDS)
        stepper = Stepper(fleet, timeout=60)
        let_rank_go(fleet, made, 1)
        assert gate.wait(lambda: gate.stuck() or None, 30)
        with pytest.raises(NoProgress, match=r"have not arrived within 0\.01 s") as caught:
            stepper.wait(0.01)
        assert "rank 1: 0 of 17 ops done; main in `recv kv c0 l0 <- 0, 4 tokens`" in str(caught.value)
        assert "rank 0: 0 of 22 ops done; stands before its first layer, next `embed c0`" in str(caught.value)
        assert stepper.pause() == stepper.cuts.start


def test_a_stop_that_was_given_up_half_way_is_completed_by_the_next_move(small: Decoder) -> None:
    """Frozen, as if Ctrl-C had come just then: lanes stand, but sends are in whose recvs are not."""
    gate = SeededGate(0)
    with twin(small, gate=gate, rendezvous=False, world_size=2, chunk_size=CHUNK) as made:
        fleet = made.prepare(IDS)
        stepper = Stepper(fleet, timeout=60)
        let_rank_go(fleet, made, 0)
        assert gate.wait(lambda: gate.stuck() or None, 30)
        with gate.change():
            made.engines[0].executor.freeze()
        stands = fleet.stands()
        assert not stepper.cuts.is_consistent(tuple(stand.positions for stand in stands))
        move = stepper.step("op")
        assert stepper.cuts.is_consistent(move.before)
        assert stepper.cuts.is_consistent(move.after)
        stepper.resume()
        stepper.wait(60)
        assert is_complete(made, expected(small, IDS, CHUNK))


@pytest.mark.parametrize("unit", ["op", "layer", "wave", "chunk"])
def test_steps_of_one_kind_lead_from_start_to_end_and_back(small: Decoder, unit: str) -> None:
    with twin(small, world_size=2, chunk_size=CHUNK) as made:
        stepper = Stepper(made.prepare(IDS), timeout=60)
        cuts = [stepper.cuts.start]
        while (move := stepper.step(unit)).moved:  # type: ignore[arg-type]
            cuts.append(move.after)
        assert stepper.at_end
        assert is_complete(made, expected(small, IDS, CHUNK))
        while (move := stepper.step_back(unit)).moved:  # type: ignore[arg-type]
            if unit != "op":
                assert move.after == cuts[cuts.index(move.before) - 1]
        assert stepper.pause() == stepper.cuts.start


def test_any_number_of_steps_ends_at_the_end(small: Decoder) -> None:
    """`n` of a user who wants to be sure to get there; it used to be counted to."""
    with twin(small, world_size=2, chunk_size=CHUNK) as made:
        stepper = Stepper(made.prepare(IDS), timeout=60)
        assert stepper.step("layer", 10**15).after == stepper.cuts.end
        assert stepper.step_back("layer", 10**15).after == stepper.cuts.start


def test_moves_of_several_threads_happen_one_after_another(small: Decoder) -> None:
    with twin(small, world_size=2, chunk_size=CHUNK) as made:
        stepper = Stepper(made.prepare(IDS), timeout=60)
        with ThreadPoolExecutor(4) as pool:
            moves = list(pool.map(lambda _: stepper.step("layer"), range(12)))
        chain = Cuts(stepper.cuts.plan).chain("layer")
        assert sorted((move.before, move.after) for move in moves if move.moved) == list(pairwise(chain))
        assert sum(not move.moved for move in moves) == 12 - (len(chain) - 1)


def test_what_was_done_is_told_in_its_order() -> None:
    plan = build(partition(layers=2, tokens=4, world_size=2, chunk_size=4), "pipelined", "pairwise")
    cuts = Cuts(plan)
    first, last = moved_lines(plan, cuts.start, cuts.end)
    assert first.startswith("rank 0: embed c0, computed c0 l0, sent ")
    assert last.startswith("rank 1: computed c0 l1, norm c0 l2, sent ")
    assert moved_lines(plan, cuts.end, cuts.start) == ["undid c0 l0, c0 l1 on ranks 0–1"]


def test_where_says_how_much_is_done_and_where_each_open_lane_stands() -> None:
    plan = build(partition(layers=2, tokens=4, world_size=2, chunk_size=4), "pipelined", "pairwise")
    lanes = plan.lanes[1]
    assert [lane.name for lane in lanes] == ["hidden-in", "compute", "hidden-out", "kv-in:0", "kv-out:0"]
    ends = tuple(len(lane.ops) for lane in lanes)
    stands = [
        Stand((0,) * len(plan.lanes[0]), (False,) * len(plan.lanes[0]), (1,) * len(plan.lanes[0])),
        Stand((1, 0, 0, 0, 0), (False, True, False, True, False), (1, 2, 0, 1, 1)),
    ]
    assert where_text(plan, stands).splitlines()[1] == (
        "rank 1: 1 of 6 ops done; compute in `layer c0 l1`; "
        "hidden-out stopped before `send final -> 0, 1 token`; "
        "kv-in:0 in `recv kv c0 l0 <- 0, 4 tokens`; kv-out:0 before `send kv c0 l1 -> 0, 4 tokens`"
    )
    assert rank_text(lanes, Stand(ends, (False,) * 5, ends)) == "all 6 ops done"
