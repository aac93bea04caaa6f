"""Codecs on the wire: ranks stay equal, prefill stays exact, going back repeats it, and faults are still found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dinfer
from dinfer.codec.choice import Codec
from dinfer.codec.coding import as_received
from dinfer.config import Config, ConfigError
from dinfer.engine.engine import Engine
from dinfer.job import check_codec
from dinfer.plan.ops import NothingYet
from dinfer.run.report import Done, commands
from dinfer.run.run import Run
from dinfer.session.session import Session
from dinfer.severity import Severity
from dinfer.views.report.page import write_report
from tests.support.facts import has_facts
from tests.support.threads import engines, session_on_threads
from tests.support.twin import prompt

MODEL = {"layers": 6}
IDS = tuple(prompt(22))
LOSSY = ("bf16", "fp8", "int8", "int4", "k=int8,v=none")
DEADLINE_S = 120.0


@pytest.fixture(scope="module")
def bfloat16(model: Path) -> Iterator[Session]:
    with session_on_threads(3, model, dtype="bfloat16") as session:
        yield session


def begun(session: Session, **parameters: Any) -> Run:
    return session.prefill(IDS, chunk_size=8, max_new_tokens=6, paused=True, **parameters)


def ended(session: Session, **parameters: Any) -> Run:
    run = begun(session, **parameters)
    run.resume()
    assert run.wait(DEADLINE_S).state == "done"
    return run


def engine_of(session: Session, rank: int) -> Engine:
    engine = engines(session)[rank]
    assert isinstance(engine, Engine)
    return engine


def kv(session: Session, rank: int = 0) -> list[Tensor]:
    """What a rank holds of the prompt, by layer, copied."""
    cache = engine_of(session, rank).cache
    assert cache is not None
    return [cache.block(layer, 0, len(IDS)).clone() for layer in range(cache.layers)]


def wire_bytes(run: Run) -> int:
    return sum(e.bytes or 0 for e in run.trace.events if (e.kind, e.what) == ("send", "kv"))


def is_same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(map(torch.equal, one, other))


@pytest.fixture(scope="module")
def exact(session: Session) -> list[Tensor]:
    ended(session)
    return kv(session)


# -- all ranks equal, and exactly what the codec makes of exact KV


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("strategy", ["pairwise", "ring"])
@pytest.mark.parametrize("schedule", ["pipelined", "lockstep"])
def test_every_rank_holds_what_the_codec_makes_of_exact_kv(
    session: Session, exact: list[Tensor], codec: str, strategy: str, schedule: str
) -> None:
    run = ended(session, codec=codec, sync_strategy=strategy, schedule=schedule)
    assert run.kv().diff().equal
    expected = [as_received(Codec.of(codec), layer) for layer in exact]
    for rank in range(3):
        assert is_same(kv(session, rank), expected)
    assert not is_same(expected, exact)
    run.decode()
    assert run.kv().diff().equal
    assert not [e for e in run.trace.events if e.kind == "corrupt"]


@pytest.mark.parametrize("strategy", ["pairwise", "ring"])
def test_lossless_changes_no_bit(bfloat16: Session, strategy: str) -> None:
    run = ended(bfloat16)
    plain, tokens = kv(bfloat16), run.decode().tokens
    sent = wire_bytes(run)
    run = ended(bfloat16, codec="lossless", sync_strategy=strategy)
    for rank in range(3):
        assert is_same(kv(bfloat16, rank), plain)
    assert run.decode().tokens == tokens
    assert 0 < wire_bytes(run) < sent


def test_events_have_the_bytes_on_the_wire(session: Session) -> None:
    sizes = {}
    for codec in ("none", "int8"):
        events = [e for e in ended(session, codec=codec).trace.events if e.what == "kv"]
        for kind in ("send", "recv"):
            sizes[codec, kind] = sum(e.bytes or 0 for e in events if e.kind == kind)
    assert sizes["none", "send"] == sizes["none", "recv"]
    assert sizes["int8", "send"] == sizes["int8", "recv"]
    assert sizes["none", "send"] > 2.5 * sizes["int8", "send"]


# -- half-way, and back


@pytest.mark.parametrize("unit", ["op", "layer", "wave", "chunk"])
def test_wherever_it_stands_ranks_hold_the_same(session: Session, unit: str) -> None:
    run, compared = begun(session, codec="int8"), 0
    for _ in range(9):
        run.step(unit)
        with suppress(NothingYet):
            assert run.kv().diff().equal
            compared += 1
    assert compared


@pytest.mark.parametrize("strategy", ["pairwise", "ring"])
@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_going_back_and_on_again_gives_the_same_bytes(
    session: Session, exact: list[Tensor], codec: str, strategy: str
) -> None:
    expected = [as_received(Codec.of(codec), layer) for layer in exact]
    run = begun(session, codec=codec, sync_strategy=strategy)
    run.step("chunk", 2)
    run.step_back("layer", 3)
    run.step("op", 5)
    run.step_back("op", 3)
    run.run_to(0, 2)
    run.resume()
    assert run.wait(DEADLINE_S).state == "done"
    for rank in range(3):
        assert is_same(kv(session, rank), expected)
    tokens = run.decode().tokens
    run.run_to(1, 3)  # decode is undone, and blocks are computed again from exact KV
    assert run.kv(chunk=0).diff().equal
    run.resume()
    assert run.wait(DEADLINE_S).state == "done"
    for rank in range(3):
        assert is_same(kv(session, rank), expected)
    assert run.decode().tokens == tokens


def test_one_rank_alone_takes_the_codec_too(model: Path, exact: list[Tensor]) -> None:
    with session_on_threads(1, model) as alone:
        ended(alone, codec="int8")
        assert is_same(kv(alone), [as_received(Codec.of("int8"), layer) for layer in exact])


def test_an_edit_reaches_all_ranks_through_the_codec(session: Session) -> None:
    run = begun(session, codec="int8", schedule="lockstep")
    run.step("op", 2)  # embedded, and the first layer computed; not sent yet
    k = engine_of(session, 0).kv(0).k
    k[0, 1] = 3.0
    run.resume()
    assert run.wait(DEADLINE_S).state == "done"
    assert run.kv().diff().equal
    assert torch.allclose(kv(session, 2)[0][1, 0, 0], torch.tensor(3.0), atol=0.05)


# -- faults


@pytest.mark.parametrize("codec", ["int8", "k=bf16,v=int4"])
@pytest.mark.parametrize("strategy", ["pairwise", "ring"])
@pytest.mark.parametrize("where", ["wire", "memory"])
def test_a_flipped_bit_is_found_as_a_fault(session: Session, codec: str, strategy: str, where: str) -> None:
    run = begun(session, codec=codec, sync_strategy=strategy)
    run.inject("bitflip", rank=1, layer=0, chunk=1, where=where)
    run.resume()
    assert run.wait(DEADLINE_S).state == "done"
    found = run.kv().diff()
    assert not found.equal
    assert found.first is not None
    assert (found.first.rank, found.first.layer, found.first.chunk) == (1, 0, 1)
    assert 0 not in {one.rank for one in found.differences}


def test_a_fault_in_a_block_that_is_not_sent_yet_stays(session: Session) -> None:
    run = begun(session, codec="int8", schedule="lockstep")
    run.step("op", 2)  # rank 0 has computed its first block
    run.inject("zero", rank=0, layer=0, chunk=0, where="memory")
    run.resume()
    assert run.wait(DEADLINE_S).state == "done"
    found = run.kv().diff().first
    assert found is not None
    assert (found.rank, found.layer, found.chunk) == (0, 0, 0)


def test_bytes_that_are_no_block_are_found_as_changed_on_the_way(
    bfloat16: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dinfer.transport.in_process import LocalComm

    whole = LocalComm.recv_payload

    def damaged(self: LocalComm, channel: Any, out: Tensor) -> None:
        whole(self, channel, out)
        if channel.communicator == "kv" and channel.target == 2 and channel.source == 0:
            out[:4] = 255  # the length of K

    monkeypatch.setattr(LocalComm, "recv_payload", damaged)
    run = ended(bfloat16, codec="lossless")
    assert {e.rank for e in run.trace.events if e.kind == "corrupt"} == {2}
    assert not run.kv().diff().equal


# -- refused


@pytest.mark.parametrize(
    ("codec", "said"),
    [
        ("int9", "codec is 'int9'; it must be one of none, lossless, bf16, fp8, int8, int4"),
        (
            "lossless",
            "codec lossless is for KV in bfloat16, and this is in float32: take one of none, bf16, fp8",
        ),
    ],
)
def test_a_codec_that_does_not_fit_is_refused(session: Session, codec: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        session.prefill(IDS, codec=codec)


@pytest.mark.parametrize("backend", ["nccl", "ipc"])
def test_streams_send_blocks_as_they_are(session: Session, backend: str) -> None:
    config = Config.of({"gpu_ids": (0, 0, 0), "backend": backend, "codec": "int8"})
    assert session.spec is not None
    with pytest.raises(ConfigError, match=f"connected by {backend}, .* give codec none, or backend gloo"):
        check_codec(config, session.spec)


def test_what_is_bfloat16_already_is_not_rounded_to_it(bfloat16: Session) -> None:
    with pytest.raises(ConfigError, match="codec bf16 is for KV in float32"):
        bfloat16.prefill(IDS, codec="bf16")


# -- compared with the reference


@pytest.mark.parametrize("codec", ["int8", "k=bf16,v=int4"])
def test_the_loss_is_told_as_chosen_and_all_else_is_equal(session: Session, codec: str) -> None:
    run = ended(session, codec=codec)
    run.decode()
    found = run.compare("reference")
    assert (found.kind, found.equal, found.severity) == ("equal", True, Severity.NOTE)
    assert found.verdict.startswith("equal but for the chosen loss: all 3 ranks hold what codec")
    assert found.loss is not None
    assert set(found.loss.by_tensor) == {"K", "V", "logits"}
    assert all(0 < one.absolute < 2.0 * one.scale for one in found.loss.by_tensor.values())
    assert found.loss.by_tensor["V"].absolute > found.loss.by_tensor["K"].absolute or codec == "int8"
    assert f"chosen loss, codec {codec}: K by up to" in str(found)
    assert "of exact KV" in str(found)


def test_the_tokens_of_exact_kv_are_those_of_a_run_without_codec(session: Session) -> None:
    plain = ended(session).decode().tokens
    run = ended(session, codec="int4")
    tokens = run.decode().tokens
    loss = run.compare("reference").loss
    assert loss is not None
    first = next((n for n, (a, b) in enumerate(zip(tokens, plain, strict=False)) if a != b), None)
    assert first == (loss.choices[0].position if loss.choices else None)


def test_within_prefill_too_only_the_loss_differs(session: Session) -> None:
    run = begun(session, codec="int8")
    run.run_to(1, 3)
    found = run.compare("reference")
    assert (found.kind, found.severity) == ("equal", Severity.NOTE)


def test_a_fault_under_a_codec_is_a_fault(session: Session) -> None:
    run = begun(session, codec="int8")
    run.inject("bitflip", rank=1, layer=0, chunk=1, where="memory")
    run.inject("zero", layer=3, chunk=0, where="compute", rank=1)
    run.resume()
    assert run.wait(DEADLINE_S).state == "done"
    found = run.compare("reference")
    assert found.severity == Severity.ERROR
    assert found.first is not None
    assert (found.first.kind, found.first.rank, found.first.layer, found.first.chunk) == ("compute", 1, 3, 0)
    assert "chosen loss" in str(found)


def test_in_another_dtype_the_loss_is_no_fault(session: Session) -> None:
    run = ended(session, codec="int8")
    run.decode()
    assert run.compare("reference", dtype="bfloat16").within_tolerance
    assert run.compare("reference", chunked=False).within_tolerance


# -- what diffs say of it


def test_a_diff_of_ranks_says_what_the_codec_has_changed(session: Session) -> None:
    found = ended(session, codec="int8").kv().diff()
    assert found.severity == Severity.OK
    said = "bit for bit; but codec int8 has changed them by choice: K by up to … and V by up to"
    assert has_facts(found.verdict, said)


def test_a_diff_of_two_runs_that_differ_by_codec_alone_is_a_note(session: Session, tmp_path: Path) -> None:
    ended(session).save(tmp_path / "plain")
    plain = dinfer.open(tmp_path / "plain")
    run = ended(session, codec="int8")
    found = run.kv().diff(plain)
    assert (found.equal, found.severity) == (False, Severity.NOTE)
    assert found.verdict.startswith("a chosen loss, codec int8 beside none: K by up to ")
    run.inject("nan", rank=2, layer=1, chunk=0, where="memory")
    assert run.kv().diff(plain).severity == Severity.ERROR


def test_a_saved_run_reopens_with_its_codec_and_replays(session: Session, tmp_path: Path) -> None:
    run = ended(session, codec="int8")
    tokens = run.decode().tokens
    run.save(tmp_path / "coded")
    saved = dinfer.open(tmp_path / "coded")
    assert "codec int8" in str(saved)
    assert has_facts(saved.kv().diff().verdict, "bit for bit; but codec int8 has changed them by choice")
    for rank in range(3):
        replay = run.replay(rank)
        replay.resume()
        assert not replay.notes, replay.notes
        replay.decode()
        assert tuple(replay.tokens[: len(tokens)]) == tuple(tokens)


def test_report_and_trace_name_the_codec(session: Session, tmp_path: Path) -> None:
    run = ended(session, codec="k=int8,v=fp8")
    assert run.trace.about["codec"] == "k=int8,v=fp8"
    assert "codec k=int8,v=fp8" in str(run)
    assert "k=int8,v=fp8" in write_report([run.trace], tmp_path / "report.html").read_text()
    assert "--codec k=int8,v=fp8" in commands(run.job.config, Done(), prompt=False)["In a terminal"]
