"""Plans that are chosen: measured on real ranks, run as chosen, with the same result as any other plan."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

import dinfer
from dinfer.cluster.ranks import RankRefused
from dinfer.config import ConfigError
from dinfer.engine.measure import time_layers
from dinfer.engine.ops import HANDLERS, Outcome
from dinfer.errors import NotPossible
from dinfer.messages import GetHeld
from dinfer.plan.partition import partition
from dinfer.plan.schedule import build
from dinfer.planner.costs import LayerCost
from dinfer.planner.machine import CodecCost, Links, LinkSpeed, MeasuredMachine
from dinfer.run.measurement import Measurement, measured_before
from dinfer.session.session import Session
from tests.support.facts import has_facts

IDS = list(range(5, 101))


def uneven() -> MeasuredMachine:
    """Rank 0 takes twice as long, and attention grows so that chunks of different lengths are best."""
    cost = LayerCost(2e-4, 0, 1e-4, 4e-6)
    links = (LinkSpeed(*pair, 1e-5, 1e9, 1e9) for pair in permutations(range(3), 2))
    return MeasuredMachine((cost.times(2), cost, cost), Links(tuple(links)), 512, 512)


def test_ranks_measure_and_the_chosen_plan_gives_the_same_tokens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("dinfer.session.session.TOKENS", 64)
    with dinfer.connect("threads", n=3) as session:
        with pytest.raises(NotPossible, match=r"session\.load"):
            session.measure()
        session.load("demo", threads=1)
        wanted = session.prefill(IDS, max_new_tokens=3, chunk_size=32)
        tokens = wanted.decode().tokens
        with pytest.raises(NotPossible, match=r"session\.measure\(\), then"):
            wanted.prediction()
        found = session.measure()
        assert session.measure() is found
        assert min(cost.seconds(0, 32) for cost in found.machine.layers) > 0
        assert all(one.latency_s > 0 and one.alone >= one.together > 0 for one in found.machine.links.speeds)
        assert (found.machine.hidden_bytes, found.machine.block_bytes) == (512, 512)
        assert [line.split()[0] for line in str(found).splitlines()] == [
            "rank", "0", "1", "2", "link", "0→1", "0→2", "1→0", "1→2", "2→0", "2→1",
            "codec", "bf16", "fp8", "int8", "int4",
        ]  # fmt: skip

        session._measured[True] = Measurement(uneven(), 64)
        capsys.readouterr()
        run = session.prefill(
            IDS,
            max_new_tokens=3,
            schedule="auto",
            chunk_size="auto",
            layer_split="auto",
            sync_strategy="auto",
        )
        told = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in told] == [
            "schedule",
            "chunk_size",
            "layer_split",
            "sync_strategy",
            "world_size",
        ]
        shape = run.plan.shape
        assert run.config.layer_split == shape.starts[1:]
        assert len(shape.stages[0]) < len(shape.stages[1])
        assert sum(map(len, shape.chunks)) == len(IDS)
        run.wait(60)
        assert run.kv(layer=5).diff().equal
        assert run.compare("reference").equal
        assert run.decode().tokens == tokens
        told_of = [(row[0], float(row[1]) > 0, float(row[2]) > 0) for row in run.prediction().rows]
        names = ["prefill", *(f"rank {rank} computes" for rank in range(3))]
        names += [f"link {source}→{target}" for source, target in permutations(range(3), 2)]
        assert told_of == [(name, True, True) for name in names]
        page = run.report(tmp_path / "report.html")
        assert (
            f"{run.trace.about['predicted_s']:.3g} s of prefill, by the planner; it took"
            in page.read_text("utf-8")
        )
        predicted = run.findings().predicted
        assert list(predicted) == names
        assert "Predicted and measured" in page.read_text("utf-8")


def slow_links(*codecs: CodecCost) -> Measurement:
    """Links so slow that they alone count."""
    cost = LayerCost(1e-6)
    links = (LinkSpeed(*pair, 1e-5, 1e4, 1e4) for pair in permutations(range(3), 2))
    return Measurement(MeasuredMachine((cost,) * 3, Links(tuple(links)), 512, 256, codecs=codecs), 64)


def test_auto_takes_the_lossless_codec_where_links_are_slow_and_never_a_lossy_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    cheap = CodecCost("lossless", 0.7, 1e-6, 1e-6), CodecCost("int4", 0.3, 0.0, 0.0)
    with dinfer.connect("threads", n=3) as session:
        session.load("demo", threads=1, dtype="bfloat16")
        session._measured[True] = slow_links(*cheap)
        plain = session.prefill(IDS, codec="none", chunk_size=32)
        before = plain.prediction().rows
        capsys.readouterr()
        run = session.prefill(IDS, codec="auto", chunk_size=32)
        told = capsys.readouterr().out.strip()
        assert run.config.codec == "lossless"
        assert has_facts(told, "codec lossless: it takes … s, none … s; lossy ones are never chosen unasked.")
        run.wait(60)
        assert run.kv().diff().equal
        after, plain_s = float(run.prediction().rows[0][1]), float(before[0][1])
        assert 0.7 * plain_s < after < 0.9 * plain_s  # hidden states travel as before
        session._measured[True] = slow_links(cheap[0]._replace(encode_s=1.0), cheap[1])
        assert session.prefill(IDS, codec="auto", chunk_size=32).config.codec == "none"


def test_auto_of_float32_says_why_it_takes_none(capsys: pytest.CaptureFixture[str]) -> None:
    with dinfer.connect("threads", n=3) as session:
        session.load("demo", threads=1)
        session._measured[True] = slow_links(CodecCost("int8", 0.25, 0.0, 0.0))
        assert session.prefill(IDS, codec="auto").config.codec == "none"
        assert "codec none: the lossless one is for bfloat16" in capsys.readouterr().out


def test_what_was_measured_stays_on_the_ranks_for_the_next_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinfer.session.session.TOKENS", 64)
    with dinfer.connect("threads", n=2) as session:
        session.load("demo", threads=1)
        found = session.measure(digests=False)
        answers = session.ranks.ask({0: GetHeld(), 1: GetHeld()}, 30)
        held = [answers[0], answers[1]]
        assert measured_before(held) == {False: found}
        other = replace(held[1].measured[0][2], links=())
        assert measured_before([held[0], replace(held[1], measured=((False, 64, other),))]) == {}
        assert measured_before([held[0], replace(held[1], measured=())]) == {}  # it was started again


def test_chunks_of_different_lengths_run_and_are_compared_as_any(session_of_one: Session) -> None:
    shape = partition(layers=6, tokens=96, world_size=1, chunk_size=1, lengths=(50, 30, 16))
    run = session_of_one.prefill(IDS, plan=build(shape, "pipelined", "pairwise"), max_new_tokens=2)
    run.wait(60)
    compared = run.compare("reference")
    assert compared.equal
    assert "chunks of 50, 30, 16 tokens" in str(compared)
    assert run.trace.about["chunks"] == [50, 30, 16]


@pytest.fixture(scope="module")
def session_of_one() -> Iterator[Session]:
    with dinfer.connect("threads", n=1) as session:
        yield session.load("demo", threads=1)


def test_auto_and_a_plan_contradict_each_other(session_of_one: Session) -> None:
    with pytest.raises(ConfigError, match="schedule is auto, but a plan is given"):
        session_of_one.prefill(IDS, schedule="auto", plan="dinfer plan 1")


def test_one_rank_measures_and_chooses(
    session_of_one: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is no link."""
    monkeypatch.setattr("dinfer.session.session.TOKENS", 64)
    found = session_of_one.measure(again=True)
    assert found.machine.links.speeds == ()
    assert len(str(found).splitlines()) == 2
    run = session_of_one.prefill(IDS, chunk_size="auto", sync_strategy="auto")
    assert "sync_strategy pairwise: with one rank nothing is sent." in capsys.readouterr().out
    run.wait(60)
    assert [row[0] for row in run.prediction().rows] == ["prefill", "rank 0 computes"]


def test_auto_ends_a_run_that_is_under_way(session_of_one: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinfer.session.session.TOKENS", 64)
    monkeypatch.setattr(session_of_one, "_measured", {})
    door, unbroken, end_run = threading.Event(), HANDLERS["layer"], session_of_one._end_run

    def layer(*given: Any) -> Outcome:
        assert door.wait(60)
        return unbroken(*given)

    def ends(why: str) -> None:
        door.set()
        end_run(why)

    monkeypatch.setitem(HANDLERS, "layer", layer)
    before = session_of_one.prefill(IDS)
    monkeypatch.setattr(session_of_one, "_end_run", ends)
    with pytest.raises(NotPossible, match="a run is under way"):
        session_of_one.measure()
    run = session_of_one.prefill(IDS, schedule="auto")
    assert before.closed
    run.wait(60)


def test_a_prediction_is_of_what_was_measured(
    session_of_one: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinfer.session.session.TOKENS", 64)
    monkeypatch.setattr(session_of_one, "_measured", {True: Measurement(uneven(), 64)})
    assert session_of_one.prefill(IDS, paused=True).job.machine
    run = session_of_one.prefill(IDS, digests=False, paused=True)
    with pytest.raises(NotPossible, match=r"session\.measure\(digests=False\), then"):
        run.prediction()
    asked = list[bool]()

    def timed(*given: Any, digests: bool, **named: Any) -> Any:
        asked.append(digests)
        return time_layers(*given, digests=digests, **named)

    monkeypatch.setattr("dinfer.engine.measure.time_layers", timed)
    session_of_one.measure(digests=False)
    assert asked == [False]
    assert session_of_one.prefill(IDS, digests=False, paused=True).job.machine
    monkeypatch.setattr(session_of_one, "_config", session_of_one._config.with_(gpu_ids=(0,), kernels="auto"))
    assert session_of_one.prefill(IDS, paused=True, kernels="exact").job.machine
    assert not session_of_one.prefill(IDS, paused=True).job.machine, "with other kernels"


def test_where_a_rank_refuses_to_measure_the_next_run_just_works(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others wait for it in a gather."""
    monkeypatch.setattr("dinfer.session.session.TOKENS", 64)
    first = threading.Lock()

    def timed(*given: Any, **named: Any) -> Any:
        if first.acquire(blocking=False):
            raise MemoryError("on one rank only")
        return time_layers(*given, **named)

    with dinfer.connect("threads", n=3) as session:
        session.load("demo", threads=1)
        with monkeypatch.context() as patch:
            patch.setattr("dinfer.engine.measure.time_layers", timed)
            with pytest.raises(RankRefused, match="on one rank only"):
                session.measure()
        capsys.readouterr()
        assert session.prefill(IDS, max_new_tokens=2).decode(2).tokens
        assert "all ranks have met again" in capsys.readouterr().out
        assert session.measure().machine.layers
