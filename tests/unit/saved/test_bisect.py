"""A bisect names the block, the part of it and the rank with which an answer turns wrong, for each way to break one."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import dinfer
from dinfer.cluster.lease import RunOver
from dinfer.cluster.ranks import RankRefused
from dinfer.model.decoder import Decoder
from dinfer.plan.ops import NothingYet, PlanError
from dinfer.run.run import Run
from dinfer.saved.bisect.result import Bisection
from dinfer.saved.replay.record import RecordError
from dinfer.session.session import Session
from tests.support.replays import engine_of
from tests.support.threads import session_on_threads

MODEL = "demo"
PROMPT = "The code of Lima is 471. The code of Oslo is 306. What is the code of Lima? The code of Lima is"
HIGH = 30
"""a bit of the exponent: one flipped value then decides the answer"""


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder.load("demo")


def prefilled(session: Session, *faults: dict[str, Any], **parameters: Any) -> Run:
    """A run that has ended prefill with these faults in it."""
    run = session.prefill(PROMPT, paused=True, **{"chunk_size": 8, "max_new_tokens": 8} | parameters)
    for fault in faults:
        run.inject(**fault)
    run.resume()
    run.wait()
    return run


def found(bisection: Bisection) -> tuple[Any, ...]:
    return bisection.part, bisection.chunk, bisection.layer, bisection.rank


@pytest.mark.parametrize("tensor", ["K", "V"])
def test_a_wrong_bit_in_one_ranks_copy(session: Session, decoder: Decoder, tensor: str) -> None:
    run = prefilled(
        session, {"kind": "bitflip", "rank": 2, "layer": 3, "chunk": 1, "tensor": tensor, "bit": HIGH}
    )
    before = run.standing().stands
    sha = run.sha256()
    answer = run.bisect(decoder=decoder)
    assert found(answer) == (tensor, 1, 3, 2)
    assert (answer.what, answer.alone, answer.mended, answer.also) == ("tokens", True, True, None)
    assert answer.before.token != answer.after.token == answer.wanted.token
    assert answer.before.logits_error > 0 == answer.after.logits_error
    assert f"turns wrong at {tensor} of block c1 l3 on rank 2" in str(answer)
    assert "with the reference's block it is '471'" in str(answer)
    assert run.standing().stands == before
    assert run.sha256() == sha
    assert not run.edited


def test_a_bit_that_no_token_shows_turns_the_logits(session: Session, decoder: Decoder) -> None:
    run = prefilled(session, {"kind": "bitflip", "rank": 2, "layer": 3, "chunk": 1, "tensor": "V"})
    answer = run.bisect(decoder=decoder)
    assert found(answer) == ("V", 1, 3, 2)
    assert (answer.what, answer.alone) == ("logits", True)
    assert 0 < answer.before.logits_error < 1e-3
    assert not run.bisect(what="tokens", decoder=decoder).found


@pytest.mark.parametrize("what", ["tokens", "logits", "hidden"])
def test_what_is_to_agree_can_be_chosen(session: Session, decoder: Decoder, what: str) -> None:
    run = prefilled(
        session, {"kind": "bitflip", "rank": 2, "layer": 3, "chunk": 1, "tensor": "K", "bit": HIGH}
    )
    answer = run.bisect(what=what, decoder=decoder)
    assert (answer.what, *found(answer)) == (what, "K", 1, 3, 2)


BOTH = ("swap_kv", "lost", "stale", "head_shift", "permute", "cast")


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize(("where", "rank"), [("memory", 2), ("wire", 2), ("compute", 1)])
def test_every_fault_of_a_whole_block(
    session: Session, decoder: Decoder, kind: str, where: str, rank: int
) -> None:
    run = prefilled(session, {"kind": kind, "layer": 2, "chunk": 1, "where": where, "rank": rank})
    answer = run.bisect(decoder=decoder)
    assert found(answer) == ("K and V", 1, 2, rank), answer
    assert answer.mended
    assert answer.alone == (where != "compute")
    assert answer.also is None
    assert ("computed again" in str(answer)) == (where == "compute")


@pytest.mark.parametrize("kind", ["zero", "nan"])
@pytest.mark.parametrize(("where", "rank"), [("memory", 0), ("wire", 0), ("compute", 1)])
def test_every_fault_of_a_row(session: Session, decoder: Decoder, kind: str, where: str, rank: int) -> None:
    run = prefilled(
        session, {"kind": kind, "layer": 3, "chunk": 2, "tensor": "V", "where": where, "rank": rank}
    )
    answer = run.bisect(decoder=decoder)
    assert found(answer) == ("V", 2, 3, rank), answer
    assert answer.alone == (where != "compute")


def test_a_layer_that_ran_with_wrong_positions(session: Session, decoder: Decoder) -> None:
    answer = prefilled(session, {"kind": "positions", "layer": 2, "chunk": 1}).bisect(decoder=decoder)
    assert found(answer) == ("K", 1, 2, 1)
    assert answer.also is not None
    assert (answer.also.chunk, answer.also.layer) == (1, 3)
    assert "it is the layer that computed wrongly" in str(answer)


@pytest.mark.parametrize("layer", [2, 3])
def test_a_hidden_state_that_is_wrong(session: Session, decoder: Decoder, layer: int) -> None:
    """That which enters a rank, and one between two of its layers, edited by hand while the run stood there."""
    run = session.prefill(PROMPT, paused=True, chunk_size=8, max_new_tokens=8, schedule="lockstep")
    engine = engine_of(session, 1)
    while (1, layer) not in engine.hidden:
        run.step("op")
    engine.hidden[1, layer][:] = 0
    run.resume()
    run.wait()
    answer = run.bisect(decoder=decoder)
    assert found(answer) == ("hidden", 1, layer, 1), answer
    assert (answer.alone, answer.mended, answer.also) == (False, True, None)
    assert f"the hidden state that enters c1 l{layer} on rank 1" in str(answer)
    assert "with the reference's hidden state, and what follows computed again" in str(answer)


def test_a_block_of_its_owner_that_is_broken_after_prefill(session: Session, decoder: Decoder) -> None:
    """Then nothing else follows from it: replaced alone, in memory, the answer agrees."""
    run = prefilled(session)
    run.inject("bitflip", rank=1, layer=3, chunk=1, where="memory", bit=HIGH)
    answer = run.bisect(decoder=decoder)
    assert found(answer) == ("K", 1, 3, 1)
    assert (answer.alone, answer.also) == (True, None)


def test_several_causes_are_not_taken_for_one(session: Session, decoder: Decoder) -> None:
    run = prefilled(
        session,
        {"kind": "bitflip", "rank": 2, "layer": 3, "chunk": 1, "tensor": "K", "bit": HIGH},
        {"kind": "bitflip", "rank": 2, "layer": 2, "chunk": 2, "tensor": "V", "bit": HIGH},
    )
    answer = run.bisect(decoder=decoder)
    assert found(answer) == ("K", 1, 3, 2)
    assert (answer.alone, answer.mended) == (False, True)
    assert str(answer.also) == "V of block c2 l2 on rank 2"
    assert "not the only cause: V of block c2 l2 on rank 2" in str(answer)


def test_computed_and_copied_faults_together(session: Session, decoder: Decoder) -> None:
    run = prefilled(
        session,
        {"kind": "bitflip", "layer": 1, "chunk": 0, "tensor": "V", "where": "compute", "bit": HIGH},
        {"kind": "lost", "layer": 4, "chunk": 2, "rank": 0, "where": "wire"},
    )
    answer = run.bisect(decoder=decoder)
    assert found(answer) == ("V", 0, 1, 0)
    assert str(answer.also) == "K of block c2 l4 on rank 0"


def test_two_ranks_that_are_wrong_in_two_ways(session: Session, decoder: Decoder) -> None:
    run = prefilled(
        session,
        {"kind": "lost", "layer": 3, "chunk": 1, "rank": 0},
        {"kind": "lost", "layer": 2, "chunk": 1, "rank": 2},
    )
    answer = run.bisect(decoder=decoder)
    assert found(answer) == ("K and V", 1, 2, 2)
    assert "see run.bisect(rank=0); run.bisect(rank=2)" in str(answer)
    assert found(run.bisect(rank=0, decoder=decoder)) == ("K and V", 1, 3, 0)


def test_the_rank_can_be_chosen(session: Session, decoder: Decoder) -> None:
    run = prefilled(session, {"kind": "lost", "rank": 2, "layer": 3, "chunk": 1})
    assert run.bisect(rank=2, decoder=decoder).rank == 2
    other = run.bisect(rank=0, decoder=decoder)
    assert not other.found
    assert "Nothing differs" in str(other)


def test_equal_runs_have_nothing_to_find(session: Session, decoder: Decoder) -> None:
    answer = prefilled(session).bisect(decoder=decoder)
    assert found(answer) == (None,) * 4
    assert not answer.steps
    assert "Nothing differs: all" in str(answer)
    assert "'471'" in str(answer)


def test_after_decode_has_failed(session: Session, decoder: Decoder) -> None:
    """That is when one asks: the ranks' tokens differ, or are NaN on one of them."""
    run = prefilled(
        session, {"kind": "bitflip", "rank": 2, "layer": 3, "chunk": 1, "tensor": "K", "bit": HIGH}
    )
    with pytest.raises(RankRefused):
        run.decode()
    assert found(run.bisect(decoder=decoder)) == ("K", 1, 3, 2)


def test_rows_that_decode_repeats_are_no_block(session: Session, decoder: Decoder) -> None:
    run = prefilled(session, {"kind": "repeat_row"})
    with suppress(RankRefused):
        run.decode()
    answer = run.bisect(decoder=decoder)
    assert not answer.found


def test_rows_too_many_are_said(session: Session, decoder: Decoder) -> None:
    run = prefilled(session, {"kind": "append_twice", "rank": 2, "layer": 1, "chunk": 1})
    with pytest.raises(
        PlanError, match=r"rank 2 holds \d+ rows in layer 1 and should hold \d+.*run\.kv\(\)\.diff"
    ):
        run.bisect(decoder=decoder)


def test_saved_runs_against_each_other(session: Session, decoder: Decoder, tmp_path: Path) -> None:
    right = dinfer.open(prefilled(session).save(tmp_path / "right"))
    faulty = prefilled(
        session, {"kind": "bitflip", "layer": 3, "chunk": 1, "tensor": "V", "where": "compute", "bit": HIGH}
    )
    wrong = dinfer.open(faulty.save(tmp_path / "wrong"))
    for answer in (
        wrong.bisect(decoder=decoder),
        wrong.bisect(right, decoder=decoder),
        faulty.bisect(right, decoder=decoder),
        right.bisect(faulty, decoder=decoder),
    ):
        assert answer.chunk == 1
        assert (answer.layer, answer.part, answer.rank) == (3, "V", 1)
        assert answer.mended
    assert "with the other run's block, and what follows computed again" in str(
        wrong.bisect(right, decoder=decoder)
    )
    assert not right.bisect(decoder=decoder).found


def test_a_run_that_is_over_can_be_compared_with_if_its_values_were_kept(
    session: Session, decoder: Decoder
) -> None:
    right = prefilled(session, keep=True)
    digests_only = prefilled(session)
    wrong = prefilled(session, {"kind": "lost", "rank": 2, "layer": 3, "chunk": 1})
    answer = wrong.bisect(right, decoder=decoder)
    assert found(answer) == ("K and V", 1, 3, 2)
    assert answer.alone
    with pytest.raises(RecordError, match="bisect a run before the next prefill"):
        right.bisect(decoder=decoder)
    with pytest.raises(RunOver, match="keep=True"):
        wrong.bisect(digests_only, decoder=decoder)


def test_a_run_in_other_chunks_differs_by_rounding_and_yet_the_block_is_found(
    session: Session, decoder: Decoder, tmp_path: Path
) -> None:
    right = dinfer.open(prefilled(session, chunk_size=5).save(tmp_path / "right"))
    run = prefilled(
        session, {"kind": "bitflip", "rank": 2, "layer": 3, "chunk": 1, "tensor": "K", "bit": HIGH}
    )
    answer = run.bisect(right, decoder=decoder)
    assert answer.differing > answer.compared / 2
    assert found(answer) == ("K", 1, 3, 2)
    assert answer.alone
    assert len(answer.steps) < 12  # and not one for each of the parts that differ
    assert not prefilled(session).bisect(right, decoder=decoder).found


def test_probes_are_listed(session: Session, decoder: Decoder) -> None:
    answer = prefilled(session, {"kind": "swap_kv", "layer": 2, "chunk": 1}).bisect(decoder=decoder)
    frame = answer.to_frame()
    assert list(frame.columns) == ["kept", "agrees", "token", "logits_error", "seconds"]
    assert len(frame) == len(answer.steps) == len(answer.table()) > 0
    assert frame["agrees"].iloc[-1]


def test_the_threads_of_this_process_stay(session: Session, decoder: Decoder) -> None:
    before = torch.get_num_threads()
    prefilled(session).bisect(decoder=decoder)
    assert torch.get_num_threads() == before


# -- what is refused


def test_before_the_end_of_prefill(session: Session, decoder: Decoder) -> None:
    run = session.prefill(PROMPT, paused=True, chunk_size=8)
    run.step("layer")
    with pytest.raises(NothingYet, match="has not ended prefill"):
        run.bisect(decoder=decoder)


def test_a_codec_that_changes_blocks(session: Session, decoder: Decoder) -> None:
    with pytest.raises(PlanError, match=r"codec int8 changes the KV .*codec=.none."):
        prefilled(session, codec="int8").bisect(decoder=decoder)


def test_other_arguments(session: Session, decoder: Decoder, tmp_path: Path) -> None:
    run = prefilled(session)
    with pytest.raises(PlanError, match=r'it must be "reference", or another run'):
        run.bisect("yesterday", decoder=decoder)
    with pytest.raises(PlanError, match="it must be one of tokens, logits, hidden"):
        run.bisect(what="text", decoder=decoder)
    with pytest.raises(PlanError, match="ranks of this run are 0 to 2"):
        run.bisect(rank=3, decoder=decoder)
    other = session.prefill("The code of Rome is 222.", chunk_size=8)
    other.wait()
    saved = dinfer.open(other.save(tmp_path / "other"))
    again = prefilled(session)
    with pytest.raises(PlanError, match="different prompts"):
        again.bisect(saved, decoder=decoder)
    bare = dinfer.open(again.save(tmp_path / "bare", hidden=False))
    with pytest.raises(RecordError, match="save it with hidden=True"):
        bare.bisect(decoder=decoder)


def test_another_model(session: Session, checkpoint: Any) -> None:
    run = prefilled(session)
    with session_on_threads(2, checkpoint(layers=3, tokenizer=True)) as another:
        other = another.prefill([1, 2, 3, 4, 5], chunk_size=3)
        other.wait()
        with pytest.raises(PlanError, match="different checkpoints: compare runs of one model"):
            run.bisect(other)
