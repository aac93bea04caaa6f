"""Seeded walks of a restless user through a session on a real cluster: whatever they do, the run comes out the same."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from dinfer.plan.cut import UNITS
from dinfer.run.run import Run
from dinfer.session.session import Session
from tests.support.expected_tokens import expected
from tests.support.twin import prompt

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

IDS = tuple(prompt(22))
CHUNK, NEW, LAYERS = 4, 6, 7
WHENS = (None, "absmax > 0.001", "nan", "slower than 0 ms", "digest differs")
DEADLINE_S = 60.0


def act(run: Run, random: Random) -> str:
    """One thing that a user may do; its name."""
    name = random.choice(
        [
            "step",
            "back",
            "to",
            "break",
            "clear",
            "wait",
            "play",
            "pause",
            "decode",
            "token back",
            "restart",
            "undo",
        ]
    )
    match name:
        case "step":
            run.step(random.choice(UNITS), random.randint(1, 3))
        case "back":
            run.step_back(random.choice(UNITS), random.randint(1, 3))
        case "to":
            run.run_to(random.randrange(len(run.plan.shape.chunks)), random.randrange(LAYERS))
        case "break":
            run.break_at(layer=random.choice([None, 2, 5]), when=random.choice(WHENS))
        case "clear":
            run.breakpoints.clear()
        case "wait":
            run.resume()
            run.wait(DEADLINE_S)
        case "play":
            run.play(random.choice(UNITS), 100.0)
            if random.random() < 0.5:
                run.wait(DEADLINE_S)
            else:
                run.pause()
        case "pause":
            run.resume()
            run.pause()
        case "decode":
            run.decode(random.randint(1, 2))
        case "token back":
            run.step_back("token", random.randint(1, 3))
        case "restart":
            run.restart()
        case "undo":
            run.undo()
    return name


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 12))])
def test_a_walk_ends_as_an_uninterrupted_run(session: Session, model: Path, seed: int) -> None:
    random = Random(seed)
    strategy, schedule = random.choice(["pairwise", "ring"]), random.choice(["pipelined", "lockstep"])
    run = session.prefill(
        IDS, paused=True, chunk_size=CHUNK, sync_strategy=strategy, schedule=schedule, max_new_tokens=NEW
    )
    wanted = expected(model, IDS, CHUNK, NEW)
    for _ in range(40):
        name = act(run, random)
        assert run.standing().state in ("paused", "done"), name
        tokens = run.tokens[:NEW]
        assert tokens == wanted.tokens[: len(tokens)]
    run.breakpoints.clear()
    if run.tokens:
        run.step_back("token", len(run.tokens))
    assert list(run.decode(NEW).tokens) == wanted.tokens
    assert run.sha256() == [wanted.kv_sha256] * 3
    assert run.edited == []
