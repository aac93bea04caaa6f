"""One rank alone: it fails where the run failed, keeps what the user had edited, and says where it is not the run."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dinfer.engine.lanes import OpFailed
from dinfer.model.decoder import Decoder
from dinfer.plan.ops import PlanError
from dinfer.rank.inventory import hidden_digest
from dinfer.results import Decoded
from dinfer.run.failure import RankFailed
from dinfer.run.run import Run
from dinfer.saved.replay.record import RankRecord, RecordError
from dinfer.saved.replay.replay import Replay
from dinfer.saved.saved import Saved, open_saved
from dinfer.session.session import Session
from tests.support.fixtures import fresh_session
from tests.support.replays import check_same, engine_of
from tests.support.runs import wait_for
from tests.support.tiny import tiny_checkpoint
from tests.support.twin import prompt

IDS = prompt(10)
"""in chunks of 4: three; layers 0–2, 3–4 and 5–6 are those of ranks 0, 1 and 2"""
Kept = Callable[[Run], Run | Saved]
BROKEN = "the logits are on fire"


MODEL = {"tokenizer": True}
session = fresh_session


@pytest.fixture(scope="module")
def decoder(model: Path) -> Decoder:
    return Decoder.load(model)


def begin(session: Session, **parameters: Any) -> Run:
    return session.prefill(IDS, **{"chunk_size": 4, "paused": True, "max_new_tokens": 5, **parameters})


@pytest.fixture
def recorded(session: Session) -> RankRecord:
    """Rank 1 of a run that has ended prefill."""
    run = begin(session, paused=False)
    run.wait(60)
    return run._recorder.record_of(1)


@pytest.fixture(params=["live", "saved"])
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Kept:
    """What a rank of a run is replayed from: the run itself, or a folder."""
    if request.param == "live":
        return lambda run: run
    return lambda run: open_saved(run.save(tmp_path / "saved"))


def settle(run: Run) -> None:
    """The ranks of a run that has failed have come to where they wait for one another."""
    seen = list[Any]()

    def is_still() -> bool:
        seen.append(run.standing().stands)
        return len(seen) > 10 and seen[-1] == seen[-10]

    wait_for(is_still, "nothing moves")


# -- a run that failed


class Breaks:
    """Has a layer raise when it meets the very hidden state, to the bit, that entered layer 3 for chunk 1."""

    def __init__(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        run.resume()
        run.wait(60)
        self.digest = int(hidden_digest(run.hidden(chunk=1, layer=3).values[None]))
        self.unbroken = Decoder.layer
        monkeypatch.setattr(Decoder, "layer", lambda *given: self(*given))

    def __call__(self, decoder: Decoder, index: int, hidden: Tensor, *rest: Any) -> Tensor:
        if index == 3 and int(hidden_digest(hidden)) == self.digest:
            raise ArithmeticError(BROKEN)
        return self.unbroken(decoder, index, hidden, *rest)


def test_a_failure_in_a_layer_comes_again_at_the_same_op(
    session: Session, decoder: Decoder, monkeypatch: pytest.MonkeyPatch, kept: Kept
) -> None:
    Breaks(begin(session), monkeypatch)
    run = begin(session, paused=False)
    with pytest.raises(RankFailed, match=BROKEN):
        run.wait(60)
    settle(run)
    keeper = kept(run)
    with keeper.replay(1, decoder=decoder) as replay:
        with pytest.raises(
            OpFailed, match=rf"rank 1 failed at `layer c1 l3`.*ArithmeticError: {BROKEN}"
        ) as caught:
            replay.resume()
        assert isinstance(caught.value.__cause__, ArithmeticError)
        assert replay.where().state == "failed"
        check_same(replay, engine_of(session, 1), [])
        replay.step_back("op")
        assert replay.where().state == "paused"
        replay.run_to(chunk=0, layer=3)
        with pytest.raises(OpFailed, match=BROKEN):
            replay.step("op", 20)
        assert "`layer c1 l3`" in str(replay.where())
    for rank in (0, 2):
        with keeper.replay(rank, decoder=decoder) as replay:
            said = str(replay.resume())
            assert replay.at_end
            assert f"the record ends here: rank {rank} stood" in said
            assert BROKEN in said
            check_same(replay, engine_of(session, rank), [])


def test_an_op_that_failed_there_and_not_here_is_the_last(
    session: Session, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        Breaks(begin(session), patch)
        run = begin(session, paused=False)
        with pytest.raises(RankFailed, match=BROKEN):
            run.wait(60)
        settle(run)
    with run.replay(1, decoder=decoder) as replay:
        told = str(replay.resume()).rpartition("the record ends here: rank 1 stood ")[2]
        assert "in `layer c1 l3`" in told, "beside ops of other lanes"
        assert (1, 3) in replay.engine.executor.state.ledger.entries
        assert not replay.resume().moved
        assert not replay.step("chunk").moved  # type: ignore[union-attr]  # not of tokens
        replay.step_back("op")
        assert replay.resume().moved


def test_a_failure_in_decode_comes_again_in_the_same_token(
    session: Session, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, forward = begin(session), Decoder.forward

    def broken(self: Decoder, ids: Any, cache: Any, position: int, *rest: Any) -> Tensor:
        if position == len(IDS) + 2:
            raise ArithmeticError(BROKEN)
        return forward(self, ids, cache, position, *rest)

    monkeypatch.setattr(Decoder, "forward", broken)
    with pytest.raises(RankFailed, match=f"new token 3: ArithmeticError: {BROKEN}"):
        run.decode(4)
    with run.replay(1, decoder=decoder) as replay:
        assert len(replay.decode().tokens) == 3
        with pytest.raises(ArithmeticError, match=BROKEN):
            replay.decode(1)
        replay.step_back("token", 2)
        assert replay.decode(1).tokens == replay.recorded.tokens[1:2]


def test_a_refuted_plan_is_replayed_to_where_it_hung(session: Session, decoder: Decoder, kept: Kept) -> None:
    run = begin(session, schedule="batched", unsafe=True)
    run.resume()
    wait_for(lambda: run.hang, "it hangs")
    keeper = kept(run)
    with keeper.replay(1, decoder=decoder) as replay:
        with pytest.raises(PlanError, match="refuted"):
            replay.step("layer")
        replay.step("op", 3)
        replay.step_back("op")
        assert "stood in `send kv c0 l3" in str(replay.resume())
        check_same(replay, engine_of(session, 1), [])


# -- edits


def test_what_was_edited_by_hand_is_edited_again(session: Session, decoder: Decoder, kept: Kept) -> None:
    run = begin(session)
    engine = engine_of(session, 1)
    while (1, 3) not in engine.hidden:
        run.step("op")
    assert (0, 3) in engine.executor.state.ledger.entries
    engine.hidden[1, 3] *= 1.5
    engine.kv(layer=3).k[0, 1] += 3
    run.step("layer", 4)
    engine.kv(layer=4).v[1, 2] = 0
    run.step_back("layer")
    run.decode(3)
    assert len(run.edited) == 3
    keeper = kept(run)
    with keeper.replay(1, decoder=decoder) as replay:
        replay.decode()
        check_same(replay, engine, run.tokens)
        replay.run_to(chunk=0, layer=2)
        replay.decode()
        check_same(replay, engine, run.tokens)


def test_an_edit_of_what_had_been_used_already_is_told(session: Session, decoder: Decoder) -> None:
    run = begin(session)
    run.run_to(chunk=0, layer=3)
    engine_of(session, 1).hidden[0, 3] *= 1.5
    run.step("layer", 9)
    with run.replay(1, decoder=decoder) as replay:
        assert replay.notes == [
            "hidden c0 l3 was edited by hand after `layer c0 l3` had computed with it, and what it was before is not "
            "recorded"
        ]
        replay.resume()
        assert "block c0 l3 has other bytes here" in replay.notes[1]


# -- looking


def test_what_it_says(session: Session, decoder: Decoder) -> None:
    run = begin(session)
    run.decode(3)
    with run.replay(1, decoder=decoder) as replay:
        assert "before its first layer" in str(replay)
        assert str(replay.step_back()) == "nothing to do: the rank stands at the start"
        assert str(replay.step("op")).startswith("rank 1: recv ")
        assert "\nrank 1: layer c0 l3   K [4, 2, 16] " in str(replay.step("chunk"))
        assert str(replay.step_back("chunk")).startswith("undid c")
        assert "the record ends here: the rank had ended prefill" in str(replay.resume())
        assert str(replay.resume()) == "the record ends here: the rank had ended prefill"
        first = replay.step("token")
        assert isinstance(first, Decoded)
        assert first.tokens == tuple(run.tokens[:1])
        replay.decode()
        assert (replay.tokens, replay.text) == (run.tokens, run.text)
        assert replay.decode().remark == "only 3 new tokens were recorded, and all are here"
        replay.step_back("token", 2)
        assert (replay.tokens, replay.decode(1).tokens) == (run.tokens[:1], tuple(run.tokens[1:2]))
        assert "2 new tokens" in str(replay.where())
        replay.step_back("layer")
        assert replay.tokens == []
        replay.restart()
        assert not any(replay.engine.executor.stand().positions)
    assert replay.where().state == "closed"
    with pytest.raises(RuntimeError, match="this replay is closed"):
        replay.step()


def test_what_was_done_last_is_undone(session: Session, decoder: Decoder, kept: Kept) -> None:
    run = begin(session)
    run.decode(3)
    with kept(run).replay(1, decoder=decoder) as replay:

        def place() -> tuple[object, list[int]]:
            return replay.engine.executor.stand().positions, replay.tokens

        assert replay.undo() == "nothing to undo: there is no earlier action"
        places = [place()]
        for act in (
            lambda: replay.step("chunk"),
            lambda: replay.step_back("layer"),
            lambda: replay.run_to(chunk=1, layer=3),
            lambda: replay.decode(2),
            lambda: replay.step("token"),
            lambda: replay.step_back("token", 2),
            lambda: replay.step_back("chunk"),
            replay.restart,
            replay.resume,
        ):
            act()
            assert place() != places[-1]
            places.append(place())
        said = []
        for before in places[-2::-1]:
            said.append(replay.undo())
            assert place() == before, said
        assert said[0].startswith("undid replay.resume(): took back c0 l3 … ")
        assert "made 1 new token again" in said[2]
        assert said[-1].startswith('undid replay.step("chunk"): took back ')


def test_no_tokens_are_decoded_of_a_run_that_had_none(session: Session, decoder: Decoder) -> None:
    run = begin(session)
    run.step("layer", 3)
    with run.replay(0, decoder=decoder) as replay, pytest.raises(RecordError, match="had not ended prefill"):
        replay.decode()


# -- what is not as it was


def test_a_changed_hidden_state_shows_in_the_first_block_made_of_it(
    recorded: RankRecord, decoder: Decoder
) -> None:
    hidden = {key: one.clone() for key, one in recorded.hidden.items()}
    hidden[1, 3][0, 0, 0] += 1
    with Replay(replace(recorded, hidden=hidden), decoder=decoder) as replay:
        replay.resume()
        assert replay.notes[0].startswith("block c1 l3 has other bytes here than in the run")
        assert "not as in the run: block c1 l3" in str(replay.where())


def test_a_changed_block_is_told_on_arrival(recorded: RankRecord, decoder: Decoder) -> None:
    def block(chunk: int, layer: int) -> Tensor:
        kept = recorded.block(chunk, layer)
        assert kept is not None
        found = kept.clone()
        if (chunk, layer) == (2, 5):
            found[0, 0, 0, 0] += 1
        return found

    with Replay(replace(recorded, block=block), decoder=decoder) as replay:
        replay.resume()
        assert any(
            note == "block c2 l5 as it was recorded is not what rank 2 had sent: it has changed since"
            for note in replay.notes
        ), replay.notes


def test_another_token_ends_it(session: Session, decoder: Decoder) -> None:
    run = begin(session)
    run.decode(3)
    recorded = run._recorder.record_of(2)
    other = (*recorded.tokens[:1], (recorded.tokens[1] + 1) % 100, recorded.tokens[2])
    with (
        Replay(replace(recorded, tokens=other), decoder=decoder) as replay,
        pytest.raises(
            RecordError, match=rf"new token 1 is {recorded.tokens[1]} here; in the run it was {other[1]}"
        ),
    ):
        replay.decode()


@pytest.mark.parametrize(("where", "rank"), [("compute", None), ("memory", 1)])
def test_a_fault_that_struck_strikes_again(
    session: Session, decoder: Decoder, where: str, rank: int | None
) -> None:
    run = begin(session)
    run.inject("bitflip", layer=3, chunk=0, where=where, rank=rank, bit=22)
    run.resume()
    run.wait(60)
    assert run.faults[1].has_struck
    with run.replay(1, decoder=decoder) as replay:
        replay.resume()
        check_same(replay, engine_of(session, 1), [])


def test_a_fault_on_the_way_is_found_again(session: Session, decoder: Decoder) -> None:
    run = begin(session)
    run.inject("zero", layer=0, chunk=1, where="wire", rank=1)
    run.resume()
    run.wait(60)
    with run.replay(1, decoder=decoder) as replay:
        replay.resume()
        assert replay.notes == [f"as in the run: {run.corrupt[0]}"]


def test_a_fault_that_cannot_be_repeated_is_named(session: Session, decoder: Decoder) -> None:
    run = begin(session)
    run.inject("append_twice", layer=0, chunk=0, rank=1)
    run.resume()
    run.wait(60)
    with run.replay(1, decoder=decoder) as replay:
        assert replay.notes[0].startswith(
            "a fault of the run that is not repeated here: #1 append_twice of block c0 l0 on rank 1"
        )


def test_one_that_is_dropped_gives_up_its_threads_weights_and_kv(recorded: RankRecord, model: Path) -> None:
    replay = Replay(recorded, decoder=Decoder.load(model))
    replay.step("layer")
    held = [weakref.ref(replay.decoder.model), weakref.ref(replay.engine.cache)]
    threads = list(replay.engine.executor._threads)
    assert all(thread.is_alive() for thread in threads)
    del replay
    gc.collect()
    assert not any(thread.is_alive() for thread in threads)
    assert [one() for one in held] == [None, None]


# -- what cannot be replayed


def test_there_is_no_such_rank(session: Session, recorded: RankRecord) -> None:
    with pytest.raises(PlanError, match=r"rank is 3; the ranks of this run are 0 to 2\."):
        session.run.replay(3)
    with pytest.raises(PlanError, match="rank is -1"):
        Replay(replace(recorded, rank=-1))


def test_hidden_states_that_were_not_recorded(recorded: RankRecord) -> None:
    with pytest.raises(
        RecordError,
        match=r"some of what rank 1 received was not recorded: final, hidden c0 l3, hidden c1 l3 and 1 more\.",
    ):
        Replay(replace(recorded, hidden={}, final=None))


def test_a_block_that_was_not_recorded_ends_it_there(recorded: RankRecord, decoder: Decoder) -> None:
    with (
        Replay(replace(recorded, block=lambda *_: None), decoder=decoder) as replay,
        pytest.raises(OpFailed, match="was not recorded on rank 1: the replay cannot go on at `recv kv"),
    ):
        replay.resume()


def test_another_dtype(recorded: RankRecord, model: Path) -> None:
    half = {key: one.to(torch.bfloat16) for key, one in recorded.hidden.items()}
    with pytest.raises(RecordError, match="were recorded in bfloat16, but the run's dtype is float32"):
        Replay(replace(recorded, hidden=half))
    with pytest.raises(
        RecordError, match="computed in float32, but the weights that were given are bfloat16"
    ):
        Replay(recorded, decoder=Decoder.load(model, "bfloat16"))


def test_a_checkpoint_that_is_gone_or_another(recorded: RankRecord, model: Path, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"cannot be read here: .*nowhere.* Give model_path=…"):
        Replay(recorded, model_path=str(tmp_path / "nowhere"))
    other = tiny_checkpoint(tmp_path / "other", seed=1, tokenizer=True)
    with pytest.raises(RecordError, match="another checkpoint than the run's"):
        Replay(recorded, model_path=str(other))
    copy = shutil.copytree(model, tmp_path / "copy")
    with Replay(recorded, model_path=str(copy)) as replay:
        replay.resume()
        assert replay.notes == []


@pytest.fixture
def two_threads() -> Iterator[None]:
    """This process computes on two CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_it_computes_on_the_ranks_thread_count_and_leaves_this_processes_alone(
    recorded: RankRecord, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, counts = Decoder.layer, set[int]()

    def counted(*given: Any, **named: Any) -> Tensor:
        counts.add(torch.get_num_threads())
        return layer(*given, **named)

    monkeypatch.setattr(Decoder, "layer", counted)
    record = replace(recorded, config=recorded.config.with_(threads=1))
    with Replay(record, decoder=decoder) as replay:
        assert torch.get_num_threads() == 2
        replay.resume()
        replay.step_back("layer", 2)
        replay.resume()
    assert torch.get_num_threads() == 2
    assert counts == {1}
