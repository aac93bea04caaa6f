"""Every fault that changes bytes is found and named exactly, and nothing else is: drawn at random, on threads.

Each is drawn from a seed of its own, and a failure names the call that does it again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from random import Random
from typing import Any

import pytest

from dinfer.cluster.threads import LocalRanks
from dinfer.plan.faults import FaultPlace
from dinfer.run.run import Run
from dinfer.session.session import Session
from tests.support.injections import DTYPES, WORLD_SIZES, Injection, random_fault, random_prompt, random_setup
from tests.support.proof import Rows, Truth, named
from tests.support.runs import wait_for
from tests.support.tiny import tiny_checkpoint
from tests.unit.run.test_faults import snapshot

LAYERS = 4
DEADLINE_S = 60.0
BATCHES, SIZE = 20, 50
WHERES: tuple[FaultPlace, ...] = ("memory", "wire", "compute")
Sessions = dict[tuple[int, str], Session]
"""by world size and dtype"""
Trial = Callable[[Sessions, int], str]
"""does what a seed draws; what that was"""


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sessions]:
    """Of each world size and dtype; three KV heads, so that a shift by one is none by two."""
    heads: dict[str, Any] = {"num_attention_heads": 6, "num_key_value_heads": 3}
    model = tiny_checkpoint(tmp_path_factory.mktemp("injections") / "model", layers=LAYERS, **heads)
    with ExitStack() as stack:
        made = {}
        for world_size in WORLD_SIZES:
            for dtype in DTYPES:
                session = stack.enter_context(Session(LocalRanks(world_size)))
                made[world_size, dtype] = session.load(str(model), dtype=dtype, threads=1)
        yield made


def finish(run: Run) -> None:
    run.resume()
    assert run.wait(DEADLINE_S).state == "done"


def drawn_run(sessions: Sessions, random: Random) -> tuple[Session, Run]:
    """Paused at its start."""
    setup = random_setup(random, LAYERS)
    session = sessions[setup.world_size, setup.dtype]
    return session, session.prefill(
        random_prompt(random, random.choice((4, 128))), paused=True, **setup.parameters
    )


def walk(run: Run, random: Random) -> None:
    """To some place in prefill."""
    run.run_to(random.randrange(len(run.plan.shape.chunks)), random.randrange(run.plan.shape.layers))
    run.step("op", random.randint(1, 5))


# -- faults


def injection(sessions: Sessions, seed: int) -> str:
    """A fault on threads."""
    random = Random(seed)
    session, run = drawn_run(sessions, random)
    return broken(run, random, lambda run: snapshot(session, len(run.job.ids)))


def broken(run: Run, random: Random, held: Callable[[Run], Rows]) -> str:
    """A fault that strikes before its block is made, or while the run stands somewhere, or after prefill; or in decode.

    `run` stands at its start, `held(run)` is what its ranks hold of the prompt.
    """
    if random.random() < 0.04:
        return repeated_rows(run, random)
    finish(run)
    before = held(run)
    moment = random.choice(("start", "start", "start", "start", "middle", "end"))
    if moment != "end":
        run.restart()
    if moment == "middle":
        walk(run, random)
    injected = random_fault(random, run, wheres=("memory",) if moment == "middle" else WHERES)
    run.inject(**injected.arguments)
    finish(run)
    wait_for(lambda: run.faults[1].strikes, "the fault has struck")
    ((_, changed, said),) = run.faults[1].strikes
    if not changed:
        assert said == "struck, but changed no byte"
        assert run.kv().diff().equal
        return "changed nothing"
    truth = Truth(injected, run.plan, before, held(run))
    if injected.is_shared:
        check_shared(run, injected, truth)
        return f"{injected.kind} compute"
    check_named(run, injected, truth)
    check_compared(run, injected, truth)
    spoils_decode = injected.rank == run.plan.shape.owners[injected.layer] and moment != "end"
    if injected.kind != "append_twice":
        check_told(run, injected, truth, decode=not spoils_decode)
    return f"{injected.kind} {injected.where}"


def check_named(run: Run, injected: Injection, truth: Truth) -> None:
    """Ranks differ, and a diff says where, how and since when."""
    found = run.kv().diff()
    told = named(found)
    assert sorted(told, key=str) == sorted(truth.named(), key=str)
    assert told[0].rank == injected.rank  # where it began comes first
    for text in (f"rank {injected.rank}", f"layer {injected.layer}", *hop_text(injected)):
        assert text in found.verdict
    for one in found.differences:
        assert (one.values is None) == (one.dim is None)


def hop_text(injected: Injection) -> list[str]:
    """On the wire: which hop."""
    return ["hop {}→{} in chunk {}".format(*injected.hop, injected.chunk)] if injected.hop else []


def check_compared(run: Run, injected: Injection, truth: Truth) -> None:
    """The reference tells a wrong wire or memory from a wrong computation."""
    found = run.compare("reference")
    first = found.first
    assert first
    assert (first.layer, first.chunk, first.rank) == (injected.layer, injected.chunk, injected.rank)
    if injected.kind == "append_twice":
        assert found.kind == "placement"
        return
    assert found.kind == ("placement" if truth.cause == "placement" else "wire")
    assert (first.tensor, first.token, first.head, first.dim) == truth.spot()
    assert list(first.ranks) == truth.ranks


def check_shared(run: Run, injected: Injection, truth: Truth) -> None:
    """Ranks agree, and the reference tells."""
    assert run.kv().diff().equal
    assert not run.corrupt
    found = run.compare("reference")
    first = found.first
    assert first
    assert (found.kind, first.layer, first.chunk) == (truth.cause, injected.layer, injected.chunk)
    assert (first.tensor, first.token, first.head, first.dim) == truth.spot()
    assert (first.owner, first.op) == (injected.rank, f"layer c{injected.chunk} l{injected.layer}")
    assert first.ranks == tuple(range(run.world_size))
    assert f"layer {injected.layer}, chunk {injected.chunk}" in str(found).splitlines()[0]


def check_told(run: Run, injected: Injection, truth: Truth, *, decode: bool) -> None:
    """Ranks have said so while the run went: of what came to them, and, before decode, of what is in memory."""
    said = truth.arrived()
    if decode:
        run.decode(1)
        said += [truth.in_memory()] * (injected.where == "memory")
    wait_for(lambda: len(run.corrupt) >= len(said), "the news has come")
    assert sorted(map(repr, run.corrupt)) == sorted(map(repr, said))


def repeated_rows(run: Run, random: Random) -> str:
    """All ranks alike append each new row twice."""
    if random.random() < 0.5:
        finish(run)
    run.inject("repeat_row")
    new = len(run.decode(random.randint(2, 5)).tokens) - 1
    rows, layers, ranks = run.plan.shape.tokens, range(run.plan.shape.layers), range(run.world_size)
    who = f"all {len(ranks)} ranks hold {rows + 2 * new}"
    repeats = f"row {rows + 1} repeats row {rows}"
    found = run.kv().diff()
    assert {(one.rank, one.layer) for one in found.differences} == {(r, n) for r in ranks for n in layers}
    assert {(one.chunk, one.token, one.kind, one.where, one.op, one.rows) for one in found.differences} == {
        (None, rows + 1, "repeated", "compute", "decode", new)
    }
    assert found.verdict.startswith(
        f"{who} tokens of layers 0–{layers[-1]}, it should be {rows + new}; {repeats}"
    )
    compared = run.compare("reference")
    everyone = "both ranks hold" if len(ranks) == 2 else f"all {len(ranks)} ranks hold"
    assert str(compared).splitlines()[0] == (
        f"placement is wrong: {everyone} {rows + 2 * new} rows of every layer, the reference {rows + new}; {repeats}"
    )
    return "repeat_row decode"


def clean(sessions: Sessions, seed: int) -> str:
    """One without a fault, sometimes stepped about in: nothing is said of it."""
    random = Random(seed)
    _, run = drawn_run(sessions, random)
    if random.random() < 0.3:
        walk(run, random)
        assert run.compare("reference").equal
        run.step_back("op", random.randint(1, 3))
    finish(run)
    if random.random() < 0.5:
        run.decode(random.randint(1, 3))
    found = run.kv().diff()
    assert found.equal, str(found)
    assert "bit for bit" in found.verdict
    compared = run.compare("reference")
    assert compared.equal, str(compared)
    assert not run.corrupt
    assert "corrupt" not in {event.kind for event in run.trace.events}
    assert not run.message
    return f"{run.world_size} ranks, {run.config.dtype}, {run.config.sync_strategy}, {run.config.schedule}"


# -- how many


def tried(trial: Trial, sessions: Sessions, seeds: range) -> Counter[str]:
    """What the seeds drew. Fails with all those that went wrong."""
    seen, wrong = Counter[str](), list[str]()
    for seed in seeds:
        try:
            seen[trial(sessions, seed)] += 1
        except AssertionError as error:
            wrong.append(f"{trial.__name__}(sessions, {seed}): {error}")
    drawn = ", ".join(f"{count} {what}" for what, count in sorted(seen.items()))
    print(
        f"\n{trial.__name__}, seeds {seeds.start}–{seeds.stop - 1}: {len(wrong)} wrong; as it must be: {drawn}"
    )
    assert not wrong, "\n\n".join(wrong)
    return seen


def test_faults_are_found_and_named_exactly(sessions: Sessions) -> None:
    assert len(tried(injection, sessions, range(10))) > 4


def test_clean_runs_give_no_alarm(sessions: Sessions, caplog: pytest.LogCaptureFixture) -> None:
    assert len(tried(clean, sessions, range(10))) > 4
    assert caplog.messages == []


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("batch", range(BATCHES))
def test_a_thousand_faults_are_found_and_named_exactly(sessions: Sessions, batch: int) -> None:
    assert len(tried(injection, sessions, range(batch * SIZE, (batch + 1) * SIZE))) > 10


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("batch", range(BATCHES))
def test_a_thousand_clean_runs_give_no_alarm(
    sessions: Sessions, batch: int, caplog: pytest.LogCaptureFixture
) -> None:
    assert len(tried(clean, sessions, range(batch * SIZE, (batch + 1) * SIZE))) > 10
    assert caplog.messages == []
