"""Stepping ranks that are processes: each stop is a consistent cut, the end that of an uninterrupted run."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest

from dinfer.plan.cut import UNITS
from dinfer.run.failure import RankFailed
from tests.support.expected_tokens import expected
from tests.support.runs import Fault, wait_for
from tests.support.stepped import Stepped, stepped
from tests.support.twin import prompt

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

IDS = tuple(prompt(22))
CHUNK, NEW_TOKENS, ACTIONS = 4, 6, 25


def act(run: Stepped, random: Random) -> None:
    """Do one thing that a user might do."""
    stepper, unit, n = run.stepper, random.choice(UNITS), random.randint(1, 3)
    match random.choice(("step", "step", "step", "back", "run_to", "resume", "pause")):
        case "step":
            stepper.step(unit, n)
        case "back":
            stepper.step_back(unit, n)
        case "run_to":
            chunk, layer = random.choice(stepper.cuts.blocks)
            stepper.run_to(chunk, layer)
        case "resume":
            stepper.resume()
            stepper.wait(60)
        case "pause":
            stepper.resume()
            stepper.pause()


@pytest.mark.parametrize(
    ("schedule", "strategy", "seed"),
    [
        ("pipelined", "pairwise", 1),
        pytest.param("lockstep", "ring", 2, marks=pytest.mark.slow),
        pytest.param("pipelined", "ring", 3, marks=pytest.mark.slow),
        pytest.param("lockstep", "pairwise", 4, marks=pytest.mark.slow),
    ],
)
def test_a_walk_back_and_forth_ends_as_if_nothing_had_been(
    schedule: str, strategy: str, seed: int, model: Path, tmp_path: Path
) -> None:
    config = {"schedule": schedule, "sync_strategy": strategy, "max_new_tokens": NEW_TOKENS}
    with stepped(model, IDS, tmp_path / "logs", chunk_size=CHUNK, **config) as run:
        random = Random(seed)
        for _ in range(ACTIONS):
            act(run, random)
            run.assert_stands()
        run.stepper.resume()
        run.stepper.wait(60)
        assert run.stepper.at_end
        results = run.decode()
    wanted = expected(model, IDS, CHUNK, NEW_TOKENS)
    assert [(result["kv_sha256"], result["tokens"]) for result in results] == [wanted] * 3


def test_a_pause_releases_the_recvs_that_are_posted(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 is in a layer that ends only once the pause has begun; the others wait for what it would send."""
    for name, value in _gated_layer(tmp_path).items():
        monkeypatch.setenv(name, value)
    with stepped(model, IDS, tmp_path / "logs", chunk_size=CHUNK, max_new_tokens=NEW_TOKENS) as run:
        run.stepper.resume()
        wait_for((tmp_path / "fault.at").exists, "rank 1 is in the layer")
        wait_for(lambda: _waits_in_recv(run, 0) and _waits_in_recv(run, 2), "ranks 0 and 2 wait")
        with ThreadPoolExecutor(1) as pool:
            pausing = pool.submit(run.stepper.pause)
            wait_for(lambda: all(_is_frozen(run, rank) for rank in range(3)), "no rank may go on")
            (tmp_path / "go").touch()
            cut = pausing.result(60)
        run.assert_stands()
        assert cut == tuple(stand.positions for stand in run.stands) != run.stepper.cuts.end
        run.stepper.resume()
        run.stepper.wait(60)
        results = run.decode()
    assert {result["kv_sha256"] for result in results} == {expected(model, IDS, CHUNK, NEW_TOKENS).kv_sha256}


def test_a_rank_that_dies_while_all_stand_is_told_at_the_next_step(model: Path, tmp_path: Path) -> None:
    with stepped(model, IDS, tmp_path / "logs", world_size=2, chunk_size=CHUNK) as run:
        run.stepper.run_to(1, 3)
        victim = run.ranks.processes[1]
        victim.kill()
        victim.wait()
        with pytest.raises(RankFailed, match=r"rank 1 was killed by SIGKILL; it stood at: .*next `"):
            run.stepper.step("chunk")


def _gated_layer(folder: Path) -> dict[str, str]:
    gate = "while not (folder / 'go').exists(): time.sleep(0.01)"
    return Fault(gate, chunk=2).environment(folder)


def _waits_in_recv(run: Stepped, rank: int) -> bool:
    lanes, stand = run.fleet.plan.lanes[rank], run.stands[rank]
    return any(
        begun and lane.ops[position].kind == "recv"
        for lane, position, begun in zip(lanes, stand.positions, stand.started, strict=True)
    )


def _is_frozen(run: Stepped, rank: int) -> bool:
    """Whether the rank, which had been let go to its end, was told to stop before it."""
    return run.stands[rank].limits != run.stepper.cuts.end[rank]
