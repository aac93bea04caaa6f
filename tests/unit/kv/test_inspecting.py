"""A run's KV, hidden states and attention as its ranks hold them: looked at, broken by hand, compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dinfer.cluster.threads import LocalRanks
from dinfer.engine.engine import Engine
from dinfer.kv import view
from dinfer.messages import Command, RankReport, ReadMore, Reply, size_of
from dinfer.model.cache import KVCache
from dinfer.plan.ops import PlanError
from dinfer.rank import inspect
from dinfer.run.failure import RankFailed
from dinfer.run.run import Run
from dinfer.session.session import Session
from tests.support.threads import engines, session_on_threads

PROMPT = "Lima 是秘鲁的首都, isn't it so?"
LAYERS, HEADS, DIMS = 4, 2, 16


MODEL = {"layers": LAYERS, "tokenizer": True}


@pytest.fixture
def run(session: Session) -> Run:
    """A run of 37 tokens in 5 chunks that stands at its start."""
    return session.prefill(PROMPT, chunk_size=8, sync_strategy="ring", paused=True)


@pytest.fixture
def done(run: Run) -> Run:
    """The same with prefill done."""
    run.resume()
    run.wait(60)
    return run


def engine(session: Session, rank: int) -> Engine:
    found = engines(session)[rank]
    assert isinstance(found, Engine)
    return found


def cache(session: Session, rank: int) -> KVCache:
    return engine(session, rank).prompt.state.cache


# -- looking


def test_what_is_shown_says_who_holds_what_and_each_head_in_numbers(session: Session, run: Run) -> None:
    run.step("chunk")
    cache(session, 0).tensor(0)[3, 0, 1, 2] = torch.nan
    cache(session, 0).tensor(0)[4, 1, 0] = 0
    held = str(run.kv()).splitlines()
    assert "float32, K and V of each layer [2 heads, tokens, 16]; 37 tokens in 5 chunks" in held[0]
    assert held[4] == "layer 3 (of rank 2), tokens: rank 0 holds 8, rank 1 holds 8, rank 2 holds 8"
    summary = run.kv(layer=0, chunk=0).summary()
    lines = {(line[0], line[1]): dict(zip(summary.columns, line, strict=True)) for line in summary.rows}
    rows = cache(session, 0).tensor(0)[:8]
    assert lines["K", "1"]["nan"] == "1"
    assert lines["V", "0"]["zeros"] == "0.125"
    assert lines["V", "1"]["max"] == f"{rows[:, 1, 1].max().item():.4g}"
    assert lines["V", "1"]["absmax"] == f"{rows[:, 1, 1].abs().max().item():.4g}"
    assert lines["V", "1"]["mean"] == f"{rows[:, 1, 1].double().mean().item():.4g}".replace("-", "−")
    assert "K, head 0, token 0 'L': " in str(run.kv(layer=0))


def test_tokens_are_labelled_in_whole_characters(done: Run) -> None:
    texts = done.source().subject.texts
    assert "".join(texts) == PROMPT
    assert "是" in texts
    assert all("\ufffd" not in text for text in texts)


def test_values_travel_as_from_a_tensor(session: Session, done: Run) -> None:
    k = cache(session, 1).tensor(2)[:37, 0].transpose(0, 1)
    part = done.kv(layer=2, rank=1).k
    assert part.shape == (HEADS, 37, DIMS)
    for index in (1, (0, 3), (slice(None), slice(4, 9)), (-1, slice(None, None, 3), 5), ([1, 0], [7, 2])):
        expected = (
            k[index]
            if not isinstance(index, tuple) or isinstance(index[0], int | slice)
            else k[[1, 0]][:, [7, 2]]
        )
        assert torch.equal(part[index], expected)
    assert torch.equal(done.kv(layer=2, rank=1, chunk=1).v[0], cache(session, 1).tensor(2)[8:16, 1, 0])
    with pytest.raises(IndexError, match="head 2 is out of range: there are 2, 0 to 1"):
        part[2]
    with pytest.raises(PlanError, match="name a layer"):
        _ = done.kv().k


def test_large_values_come_in_pieces_and_are_announced(
    session: Session, done: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(inspect, "PIECE", 100)
    monkeypatch.setattr(view, "LARGE", 1 << 10)
    whole = cache(session, 0).tensor(3)[:37, 1].transpose(0, 1)
    assert torch.equal(done.kv(layer=3, rank=0).v[:], whole)
    assert "MiB; a slice of heads or tokens" in capsys.readouterr().out
    assert engine_keeps_nothing(session)


def engine_keeps_nothing(session: Session) -> bool:
    """Whether no piece is left behind on a rank."""
    assert isinstance(session.ranks, LocalRanks)
    piece = session.ranks._tables[0][ReadMore].function
    kept: dict[int, bytes] = piece.__self__._kept  # type: ignore[attr-defined]
    return not kept


@pytest.mark.parametrize("rank_has", ["entered", "between", "last"])
def test_hidden_states_are_those_of_the_forward(session: Session, run: Run, rank_has: str) -> None:
    run.run_to(1, 3)
    layer = {"entered": 2, "between": 1, "last": 4}[rank_has]
    decoder = engine(session, 0).decoder
    kv = decoder.new_cache(37)
    for start in (0, 8):
        hidden = decoder.embed(run.job.ids[start : start + 8])
        for index in range(layer):
            hidden = decoder.layer(index, hidden, kv, start)
    found = run.hidden(chunk=1, layer=layer)
    assert torch.equal(found[:], hidden[0])
    assert f"hidden c1 l{layer} on rank {found.rank}: float32, tokens 8–15; min " in str(found)


def test_attention_is_over_earlier_tokens_and_changes_nothing(done: Run) -> None:
    before = done.sha256()
    found = done.attention(layer=2, chunk=1)
    assert found.weights.shape == (4, 8, 16)
    assert torch.allclose(found.weights.sum(-1), torch.ones(4, 8), atol=1e-5)
    assert not found.weights[:, 0, 9:].any()
    assert torch.allclose(done.attention(layer=2, chunk=1, head=3)[0], found[3])
    key, text, weight = found.top(8, head=1)[0]
    assert weight == found.weights[1, 0].max()
    assert text == done.source().subject.texts[key]
    assert str(found).startswith("attention of layer 2, chunk 1, 4 heads, on average")
    assert done.sha256() == before
    assert done.edited == []
    with pytest.raises(PlanError, match="token 3 is not in chunk 1, which has tokens 8 to 15"):
        found.top(3)


# -- comparing


def test_a_diff_of_equal_caches_moves_less_than_a_twentieth(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = session.prefill(list(range(60)) * 4, chunk_size=40)
    run.resume()
    run.wait(60)
    sizes = list[int]()
    ranks = session.ranks
    send, take = ranks._send, ranks.take

    def sent(rank: int, command: Command[Any], number: int) -> None:
        sizes.append(size_of(command))
        send(rank, command, number)

    def taken(rank: int, report: RankReport) -> None:
        assert isinstance(report, Reply)
        sizes.append(size_of(report.answer))
        take(rank, report)

    monkeypatch.setattr(ranks, "_send", sent)
    monkeypatch.setattr(ranks, "take", taken)
    found = run.kv().diff()
    assert str(found) == "all 3 ranks hold the same 4 × 6 blocks, bit for bit"
    one_cache = LAYERS * 240 * 2 * HEADS * DIMS * 4
    assert found.bytes_moved == sum(sizes)  # numbers of requests are not counted
    assert sum(sizes) < one_cache / 20


def test_one_value_in_one_ranks_memory(session: Session, done: Run) -> None:
    cache(session, 2).tensor(1)[13, 0, 1, 7] = 5
    found = done.kv().diff()
    assert found.verdict.startswith(
        "rank 2 differs at layer 1, K, head 1, token 13 ('鲁'), dim 7: 5 against "
    )
    assert found.verdict.endswith(
        "; 1 of 9,472 values; received by ring hop 1→2 in chunk 1, changed afterwards in its memory"
    )
    assert done.kv(layer=1, chunk=1).diff(ranks=(0, 2)).differences == found.differences
    assert done.kv(layer=1, chunk=2).diff().equal
    assert done.kv(layer=2).diff().equal
    assert done.kv().diff(ranks=(0, 1)).equal
    assert found.bytes_moved < 15_000


def test_a_rank_that_holds_a_layer_twice_is_named_in_the_first_line(session: Session) -> None:
    """A real fault: one rank held 52 tokens of layer 0 where the others held 26, the second half the first again."""
    run = session.prefill(list(range(26)), chunk_size=26, max_new_tokens=30)
    run.resume()
    run.wait(60)
    rows = cache(session, 0).tensor(0)
    rows[26:52] = rows[:26].clone()
    engine(session, 0).prompt.state.extra[0] = 26
    first = str(run.kv().diff()).splitlines()[0]
    assert first == "rank 0 holds 52 tokens of layer 0, the others 26; rows 26–51 repeat rows 0–25"
    assert "layer 0 (of rank 0), tokens: rank 0 holds 52, rank 1 holds 26, rank 2 holds 26" in str(run.kv())


def test_new_tokens_are_compared_too(session: Session, done: Run) -> None:
    done.decode(4)
    assert str(done.kv().diff()) == (
        "all 3 ranks hold the same 4 × 5 blocks, and rows of 3 new tokens, bit for bit"
    )
    cache(session, 1).tensor(3)[38, 1, 0, 0] = 1
    one = done.kv().diff().first
    assert one
    assert (one.rank, one.layer, one.chunk, one.tensor, one.token, one.op) == (1, 3, None, "V", 38, "decode")
    done.step_back("token", 2)
    assert str(done.kv().diff()).endswith("and rows of 1 new token, bit for bit")


def test_runs_of_two_sessions_are_compared(model: Path, done: Run) -> None:
    with session_on_threads(2, model) as other:
        theirs = other.prefill(PROMPT, chunk_size=8, sync_strategy="pairwise", paused=False)
        theirs.wait(60)
        assert "hold the same 4 × 5 blocks, bit for bit" in str(done.kv().diff(theirs))
        assert done.kv(layer=1).diff(theirs.kv()).equal
        cache(other, 1).tensor(3)[20, 1, 1, 1] = 2
        found = done.kv().diff(theirs)
        assert [(one.rank, one.layer, one.token, one.dim) for one in found.differences] == [
            (1, 3, 20, 1)  # their rank 1 holds it; rank 2, which they have not, is compared with rank 0
        ]
        again = other.prefill(PROMPT[:-1], chunk_size=8, paused=False)
        again.wait(60)
        with pytest.raises(PlanError, match="are of different prompts"):
            done.kv().diff(again)


# -- what cannot be


def test_states_that_are_not_computed_yet_are_refused(run: Run) -> None:
    with pytest.raises(
        PlanError, match="no block is on ranks 0–2 yet; the run stands before its first layer"
    ):
        run.kv().diff()
    run.step("chunk")
    with pytest.raises(PlanError, match="there is no layer 5"):
        run.hidden(chunk=0, layer=5)


def test_a_run_that_is_over_is_refused(session: Session, run: Run) -> None:
    session.prefill(PROMPT, chunk_size=8, paused=True)
    with pytest.raises(RuntimeError, match="this run is over, and its ranks hold its KV no more"):
        run.hidden(chunk=0, layer=0)


def test_a_run_that_has_failed_can_still_be_looked_at(session: Session, run: Run) -> None:
    run.run_to(1, 3)
    state = engine(session, 1).prompt.state

    def fail(*_: object) -> None:
        raise ValueError("on purpose")

    state.layer = fail  # type: ignore[method-assign,assignment]
    with pytest.raises(RankFailed, match="on purpose"):
        run.run_to(2, 3)
    assert "hold the same" in str(run.kv().diff())
    session.recover()
