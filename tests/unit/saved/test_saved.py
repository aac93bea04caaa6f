"""Runs that were saved, opened without their ranks: they hold what the ranks held, and are compared as those are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import dinfer
from dinfer.engine.lanes import OpFailed
from dinfer.kv.difference import Difference
from dinfer.plan.ops import PlanError
from dinfer.run.run import Run
from dinfer.saved.format import SavedError
from dinfer.session.session import Session
from dinfer.verdict import waits
from tests.support.runs import wait_for
from tests.support.saved_runs import DIMS, HEADS, LAYERS, PROMPT, TOKENS, cache, done
from tests.support.threads import session_on_threads
from tests.support.tiny import tiny_checkpoint

MODEL = {"layers": LAYERS, "tokenizer": True}
ONE_CACHE = LAYERS * (TOKENS + 3) * 2 * HEADS * DIMS * 4


@pytest.fixture
def run(session: Session) -> Run:
    """37 tokens in 5 chunks, prefill done, and 4 new tokens."""
    found = done(session)
    found.decode(4)
    return found


def located(found: tuple[Difference, ...]) -> list[tuple[Any, ...]]:
    """What says where they are and what is there."""
    names = (
        "rank",
        "layer",
        "chunk",
        "tensor",
        "head",
        "token",
        "dim",
        "values",
        "count",
        "kind",
        "op",
        "origin",
    )
    return [tuple(getattr(one, name) for name in names) for one in found]


def values_in(folder: Path) -> int:
    """How many bytes of values the folder's files hold."""
    size = 0
    for path in folder.glob("kv.*"):
        with safe_open(path, framework="pt") as file:
            opened: Any = file
            size += sum(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118
    return size


def test_it_needs_neither_ranks_nor_checkpoint(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", layers=LAYERS, tokenizer=True)
    with session_on_threads(2, model) as session:
        run = done(session)
        run.decode(3)
        run.save(tmp_path / "saved", prompt=True)
        verdict, shown, trace, tokens = run.verdict(), str(run.kv(layer=1)), run.trace, run.tokens
        values = {(r, n): run.kv(layer=n, rank=r).v[:] for r in (0, 1) for n in range(LAYERS)}
        plan = run.plan
    shutil.rmtree(model)
    saved = dinfer.open(tmp_path / "saved")
    assert saved.plan == plan
    assert saved.trace.events == trace.events
    assert saved.verdict() == verdict
    assert str(saved.kv(layer=1)) == shown
    assert all(torch.equal(saved.kv(layer=n, rank=r).v[:], value) for (r, n), value in values.items())
    assert saved.source().subject.ids[TOKENS:] == tuple(tokens)
    assert saved.findings.state == "done"
    assert str(saved.diff()) == "both ranks hold the same 4 × 5 blocks, and rows of 2 new tokens, bit for bit"
    assert str(saved) == (
        "saved run 'saved': 37 tokens in 5 chunks, pipelined, pairwise: done, 3 new tokens\n"
        "ranks 0–1: values of layers 0–3, hidden states"
    )
    assert "<pre" in saved._repr_html_()


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "bitflip", "rank": 2, "layer": 1, "chunk": 3, "tensor": "V", "head": 1, "token": 27},
        {"kind": "bitflip", "rank": 1, "layer": 0, "chunk": 2, "where": "wire"},
        {"kind": "nan", "rank": 0, "layer": 0, "chunk": 4, "where": "memory"},
        {"kind": "append_twice", "rank": 0, "layer": 0, "chunk": 0},
        {"kind": "stale", "rank": 1, "layer": 3, "chunk": 2},
        {"kind": "permute", "rank": 2, "layer": 2, "chunk": 1, "where": "memory"},
        {"kind": "lost", "rank": 0, "layer": 2, "chunk": 0},
    ],
    ids=lambda fault: f"{fault['kind']}-{fault['rank']}",
)  # fmt: skip
def test_what_differs_is_named_as_on_the_ranks(
    session: Session, tmp_path: Path, fault: dict[str, Any]
) -> None:
    run = session.prefill(PROMPT, chunk_size=8, sync_strategy="ring", paused=True)
    run.inject(fault.pop("kind"), **fault)
    run.resume()
    run.wait(60)
    live, found = run.kv().diff(), dinfer.open(run.save(tmp_path / "broken", prompt=True)).diff()
    assert not live.equal
    assert located(found.differences) == located(live.differences)
    assert str(found) == str(live)


def test_a_run_before_and_after_a_change(session: Session, run: Run, tmp_path: Path) -> None:
    before = dinfer.open(run.save(tmp_path / "before"))
    assert run.kv().diff(before).equal
    assert before.diff(run).equal
    cache(session, 2).tensor(1)[13, 0, 1, 7] += 1
    after = dinfer.open(run.save(tmp_path / "after"))
    pairs = [run.kv().diff(before), before.diff(run), before.diff(after), after.kv(layer=1).diff(before)]
    for found in pairs:
        [one] = found.differences
        assert (one.rank, one.layer, one.tensor, one.head, one.token, one.dim) == (2, 1, "K", 1, 13, 7)
    assert pairs[2].first
    assert pairs[3].first
    assert pairs[2].first.values == tuple(reversed(pairs[3].first.values or ()))
    assert pairs[2].verdict.startswith("rank 2 of saved run 'before' differs at layer 1, K, head 1, token 13")
    assert after.diff().equal is run.kv().diff().equal is False


def test_saved_runs_of_one_name_keep_it(run: Run, tmp_path: Path) -> None:
    one, other = (dinfer.open(run.save(tmp_path / place / "kept")) for place in ("here", "there"))
    assert one.diff(other).verdict.startswith(
        "saved run 'kept' and saved run 'kept' hold the same 4 × 5 blocks"
    )


def test_pairwise_against_ring(session: Session, tmp_path: Path) -> None:
    pairwise = dinfer.open(done(session, sync_strategy="pairwise").save(tmp_path / "pairwise"))
    ring = done(session, sync_strategy="ring")
    assert str(pairwise.diff(ring)) == (
        "saved run 'pairwise' and this run hold the same 4 × 5 blocks, bit for bit"
    )
    assert str(ring.kv().diff(pairwise)).startswith("this run and saved run 'pairwise' hold the same 4 × 5")
    other = session.prefill(PROMPT[:-1], chunk_size=8)
    other.wait(60)
    with pytest.raises(PlanError, match="saved run 'pairwise' and this run are of different prompts"):
        pairwise.diff(other)


def test_what_ranks_hold_alike_is_stored_once(session: Session, run: Run, tmp_path: Path) -> None:
    assert values_in(run.save(tmp_path / "same")) == ONE_CACHE
    cache(session, 2).tensor(1)[13, 0, 1, 7] += 1
    block = 8 * 2 * HEADS * DIMS * 4
    assert values_in(run.save(tmp_path / "other")) == ONE_CACHE + block
    assert values_in(run.save(tmp_path / "some", kv=[3, 1])) == ONE_CACHE / 2 + block


def test_digests_alone_tell_where(session: Session, run: Run, tmp_path: Path) -> None:
    before = dinfer.open(run.save(tmp_path / "before", kv=[2]))
    none = dinfer.open(run.save(tmp_path / "none", kv=False))
    for layer in (1, 2):
        cache(session, 2).tensor(layer)[13, 0, 1, 7] += 1
    first, second = run.kv().diff(before).differences
    assert (first.layer, first.head, first.token, first.dim, first.values) == (1, 1, 13, None, None)
    assert "(its values were not saved)" in str(first)
    assert (second.layer, second.token, second.dim) == (2, 13, 7)
    assert run.kv().diff(before).unfetched == 0
    with pytest.raises(
        SavedError, match=r"'before' holds no values of layer 1: it was saved with values of layer 2"
    ):
        before.kv(layer=1).k[0]
    with pytest.raises(
        SavedError, match=r"'none' holds no values of layer 1: it was saved with only digests"
    ):
        str(none.kv(layer=1))
    assert "layer 1 (of rank 0), tokens: rank 0 holds 40, rank 1 holds 40" in str(none.kv())
    with pytest.raises(SavedError, match=r"kv names layer 4; the layers are 0 to 3"):
        run.save(tmp_path / "wrong", kv=[0, 4])


def test_a_run_that_stands_midway(session: Session, tmp_path: Path) -> None:
    run = session.prefill(PROMPT, chunk_size=8, paused=True)
    empty = dinfer.open(run.save(tmp_path / "empty"))
    with pytest.raises(PlanError, match="no block is on ranks 0–2 yet; the run stands before its first"):
        empty.diff()
    run.run_to(chunk=1, layer=2)
    saved = dinfer.open(run.save(tmp_path / "midway"))
    assert str(saved.diff()) == str(run.kv().diff())
    assert saved.diff(run).equal
    with pytest.raises(PlanError, match=r"chunk 3 of layer 3 is not computed yet; the run stands at c"):
        saved.kv(layer=3, chunk=3)
    assert "it stood at c" in str(saved)
    assert saved.verdict().sentence == run.verdict().sentence


def test_hidden_states_that_have_entered(session: Session, tmp_path: Path) -> None:
    run = session.prefill(PROMPT, chunk_size=8, paused=True)
    run.run_to(chunk=1, layer=3)
    saved = dinfer.open(run.save(tmp_path / "saved", kv=False))
    for rank, layer in ((0, 0), (1, 2), (2, 3)):
        assert torch.equal(saved.hidden(rank=rank, chunk=1), run.hidden(chunk=1, layer=layer)[:])
    with pytest.raises(SavedError, match="no hidden state of chunk 4 had entered rank 1: chunks 0–"):
        saved.hidden(rank=1, chunk=4)
    with pytest.raises(PlanError, match="there is no rank 3"):
        saved.hidden(rank=3, chunk=0)
    without = dinfer.open(run.save(tmp_path / "without", kv=False, hidden=False))
    with pytest.raises(SavedError, match="holds no hidden states: it was saved with hidden=False"):
        without.hidden(rank=1, chunk=0)


def test_what_a_replay_of_one_rank_needs(run: Run, tmp_path: Path) -> None:
    run.inject("bitflip", rank=1, layer=1, chunk=0)
    about = json.loads((run.save(tmp_path / "saved") / "run.json").read_text(encoding="utf-8"))
    assert tuple(about["ids"]) == run.job.ids
    assert about["tokens"] == run.tokens
    assert [tuple(rank) for rank in about["positions"]] == [s.positions for s in run.standing().stands]
    assert about["parameters"]["chunk_size"] == 8
    assert about["checkpoint"] == {
        "path": str(run.job.spec.path),
        "fingerprint": run.source().subject.checkpoint,
    }
    assert len(about["faults"]) == 1
    noted = dinfer.open(tmp_path / "saved").source().noted([1], range(LAYERS))
    assert noted == run.source().noted([1], range(LAYERS))
    assert len(noted[0]) == LAYERS * 5


def test_text_only_where_asked_for(session: Session, tmp_path: Path) -> None:
    run = session.prefill(PROMPT, chunk_size=8)
    run.decode(4)
    words = "秘鲁".encode(), b"Lima", b"\\u79d8"
    silent = run.save(tmp_path / "silent")
    assert not [p.name for p in silent.iterdir() for word in words if word in p.read_bytes()]
    assert dinfer.open(silent).source().subject.texts == ()
    told = dinfer.open(run.save(tmp_path / "told", prompt=True))
    assert told.source().subject.texts == run.source().subject.texts
    assert told.findings.prompt == PROMPT


def test_ranks_that_cannot_be_asked(
    session: Session, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run._recorder, "reachable", lambda: (1, 2))
    cache(session, 2).tensor(0)[3, 1, 0, 0] += 1
    saved = dinfer.open(run.save(tmp_path / "saved"))
    assert str(dinfer.open(tmp_path / "saved").kv(layer=1).diff()).startswith(
        "ranks 1 and 2 hold the same 1 × 5"
    )
    [mine], [live] = saved.diff().differences, run.kv().diff(ranks=(1, 2)).differences
    assert located((mine,))[0][:-2] == located((live,))[0][:-2]  # without all ledgers, not when it changed
    assert torch.equal(saved.kv(layer=0).k[:], run.kv(layer=0, rank=1).k[:])
    assert saved.diff(run).equal
    with pytest.raises(SavedError, match="has nothing of rank 0: when it was saved, 1, 2 answered"):
        saved.kv(layer=0, rank=0).k[:]
    assert "ranks 1–2: " in str(saved)


def test_no_rank_can_be_asked(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run._recorder, "reachable", lambda: ())
    saved = dinfer.open(run.save(tmp_path / "saved"))
    assert saved.verdict() == run.verdict()
    assert saved.plan == run.plan
    assert "no KV: no rank answered when it was saved" in str(saved)
    for asked in (saved.kv, saved.diff, lambda: run.kv().diff(saved)):
        with pytest.raises(SavedError, match="no KV, since no rank answered when it was saved"):
            asked()


def test_why_a_run_hangs_is_worked_out_anew(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waits, "STUCK_S", 1.5)
    run = session.prefill(PROMPT, chunk_size=8, schedule="batched", unsafe=True)
    wait_for(lambda: run.hang, "it is told")
    saved = dinfer.open(run.save(tmp_path / "hung"))
    found, live = saved.verdict(), run.verdict()
    assert (found.kind, found.ranks, found.sentence) == (live.kind, live.ranks, live.sentence)
    assert found.kind == "cycle"
    assert [(wait.node, wait.on) for wait in found.chain] == [(wait.node, wait.on) for wait in live.chain]
    assert "in send" in found.stacks[0]
    assert "<svg" in found._repr_html_()
    assert str(saved).splitlines()[0].endswith(": hung")
    assert live.sentence in str(saved)
    session.recover()


def test_a_run_that_has_failed(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = session.prefill(PROMPT, chunk_size=8, paused=True)
    run.run_to(chunk=1, layer=3)
    engine: Any = session.ranks.hosts[1].engine  # type: ignore[attr-defined]

    def fail(*_: object) -> None:
        raise ValueError("on purpose")

    monkeypatch.setattr(engine.prompt.state, "layer", fail)
    run.resume()
    wait_for(lambda: run.failure, "it fails")
    saved = dinfer.open(run.save(tmp_path / "failed"))
    assert saved.verdict().sentence == run.verdict().sentence
    assert saved.verdict().rank == 1
    assert "ValueError: on purpose" in str(saved)
    assert saved.diff(run).equal
    session.recover()


def test_a_run_that_is_over_cannot_be_saved_with_values(session: Session, run: Run, tmp_path: Path) -> None:
    session.prefill(PROMPT, chunk_size=8, paused=True)
    with pytest.raises(RuntimeError, match="this run is over, and of its KV only digests were kept"):
        run.save(tmp_path / "over", kv=[0])
    assert not list(tmp_path.iterdir())


# -- replayed


def test_a_rank_is_replayed_from_a_folder(run: Run, tmp_path: Path) -> None:
    saved = dinfer.open(run.save(tmp_path / "run"))
    with saved.replay(1) as replay:
        replay.decode()
        assert replay.tokens == run.tokens
        assert replay.notes == []
        assert torch.equal(replay.kv(3).k, saved.kv(layer=3, rank=1).k[:, :TOKENS])
    with pytest.raises(PlanError, match="rank is 3; the ranks of this run are 0 to 2"):
        saved.replay(3)


def test_what_was_not_saved_cannot_be_replayed(run: Run, tmp_path: Path) -> None:
    without = dinfer.open(run.save(tmp_path / "without", hidden=False))
    with pytest.raises(SavedError, match="nothing to replay rank 1 from: it was saved with hidden=False"):
        without.replay(1)
    partly = dinfer.open(run.save(tmp_path / "partly", kv=[0]))
    with (
        partly.replay(2) as replay,
        pytest.raises(OpFailed, match=r"block c0 l[12] was not recorded on rank 2"),
    ):
        replay.resume()
    folder = run.save(tmp_path / "whole")
    (folder / "hidden.safetensors").write_bytes(b"no")
    with pytest.raises(SavedError, match=r"hidden\.safetensors is not what was written"):
        dinfer.open(folder).replay(1)
