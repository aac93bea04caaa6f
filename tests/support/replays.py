"""Recorded runs, drawn by seed, and the comparison of a replayed rank with the rank that ran. Not a test."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch

from dinfer.cluster.threads import LocalRanks
from dinfer.engine.engine import Engine
from dinfer.model.decoder import Decoder
from dinfer.run.run import Run
from dinfer.saved.replay.replay import Replay
from dinfer.saved.saved import open_saved
from dinfer.session.session import Session
from tests.support.tiny import tiny_checkpoint
from tests.support.twin import prompt

FAMILIES = ("qwen3", "llama", "gemma2", "mistral")
UNITS = ("op", "layer", "wave", "chunk")
WAYS = ("stepped", "paused", "decoded")


@cache
def checkpoint(folder: Path, family: str) -> Path:
    return tiny_checkpoint(
        folder / family, family, layers=5, dtype="bfloat16" if family == "llama" else "float32"
    )


def replayed_trial(seed: int, folder: Path) -> str:
    """One run that stands somewhere, and each of its ranks alone, every second time from a folder: what was drawn."""
    draw = Random(seed)
    world_size, way = draw.randrange(1, 5), WAYS[seed % 3]
    dtype = draw.choice(["float32", "bfloat16"])
    parameters: dict[str, Any] = {
        "schedule": draw.choice(["pipelined", "lockstep"]),
        "sync_strategy": draw.choice(["pairwise", "ring"]),
        "chunk_size": draw.choice([3, 4, 7, 32]),
        "temperature": draw.choice([0.0, 1.0]),
        "max_new_tokens": 5,
    }
    ids = prompt(draw.randrange(6, 24), seed=seed)
    path = str(checkpoint(folder, draw.choice(FAMILIES)))
    with Session(LocalRanks(world_size)) as session:
        session.load(path, dtype=dtype, threads=1)
        run = session.prefill(ids, paused=True, **parameters)
        moved_somewhere(run, way, draw)
        decoder = Decoder.load(run.config.model_path, dtype)
        kept = open_saved(run.save(folder / f"saved{seed}")) if seed % 2 else run
        for rank in range(world_size):
            with kept.replay(rank, decoder=decoder) as replay:
                check_alone(replay, engine_of(session, rank), run.tokens, draw)
    return f"{world_size} ranks, {way}, {dtype}, {len(ids)} tokens, {parameters}"


def moved_somewhere(run: Run, way: str, draw: Random) -> None:
    """To a cut that is drawn, and not always straight there."""
    if way == "decoded":
        run.decode(draw.randrange(1, 6))
        return
    if way == "paused":
        run.resume()
        run.pause()
        return
    for _ in range(draw.randrange(1, 4)):
        run.step(draw.choice(UNITS), draw.randrange(1, 6))
        if draw.random() < 0.4:
            run.step_back(draw.choice(UNITS), draw.randrange(1, 3))


def check_alone(replay: Replay, ran: Engine, tokens: list[int], draw: Random) -> None:
    """The rank, stepped on and back at will, ends as it stood, to the bit, and goes there again from further back."""
    for _ in range(draw.randrange(4)):
        replay.step(draw.choice(UNITS), draw.randrange(1, 4))
        replay.step_back(draw.choice(UNITS))
    arrive(replay)
    check_same(replay, ran, tokens)
    replay.step_back(draw.choice(UNITS), draw.randrange(1, 4))
    arrive(replay)
    check_same(replay, ran, tokens)


def arrive(replay: Replay) -> None:
    if replay.recorded.tokens:
        replay.decode()
    else:
        replay.resume()


def check_same(replay: Replay, ran: Engine, tokens: list[int]) -> None:
    """Positions, hidden states, KV and new tokens, bit for bit."""
    assert replay.notes == []
    assert replay.engine.executor.stand().positions == ran.executor.stand().positions
    assert replay.tokens == tokens
    check_states(replay, ran)
    for layer in range(ran.decoder.num_layers):
        mine, theirs = replay.kv(layer), ran.kv(layer)
        assert mine.chunks == theirs.chunks
        assert torch.equal(mine.k, theirs.k)
        assert torch.equal(mine.v, theirs.v)
    if tokens:
        rows = len(ran.ids) + len(tokens) - 1
        assert sha256(replay.engine, rows) == sha256(ran, rows)


def check_states(replay: Replay, ran: Engine) -> None:
    assert replay.hidden.keys() == ran.hidden.keys()
    assert all(torch.equal(replay.hidden[key], ran.hidden[key]) for key in ran.hidden)
    mine, theirs = replay.engine.executor.state.final, ran.executor.state.final
    assert (mine is None) == (theirs is None)
    assert mine is None or theirs is None or torch.equal(mine, theirs)


def sha256(engine: Engine, rows: int) -> str:
    assert engine.cache
    return engine.cache.sha256(rows)


def engine_of(session: Session, rank: int) -> Engine:
    assert isinstance(session.ranks, LocalRanks)
    found = session.ranks.hosts[rank].engine
    assert found
    return found
