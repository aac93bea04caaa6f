"""Errors on a rank name the rank, the op and the cause."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from dinfer.engine.decoding import TokensDiffer
from dinfer.engine.lanes import OpFailed
from dinfer.model.decoder import Decoder
from dinfer.plan.graph import Channel
from dinfer.plan.ops import PlanError, Value, parse_op
from dinfer.plan.plan import Lane, Plan, parse_plan
from dinfer.run.failure import RankFailed
from dinfer.transport.gloo import CommError
from dinfer.transport.header import HEADER_BYTES, Header, TransferError
from tests.support.expected import expected, is_complete
from tests.support.seeded_gate import SeededGate
from tests.support.twin import Twin, prompt, twin

CHUNK = 4
IDS = list(prompt(10))
SEND = "send kv c1 l0 -> 1, 4 tokens"


def edited(plan: Plan, rank: int, old: str, *new: str) -> Plan:
    """The plan with one op of a rank replaced by others."""

    def edit(lane: Lane) -> Lane:
        ops = [parse_op(n) if n else op for op in lane.ops for n in (new if str(op) == old else ("",))]
        return Lane(lane.name, tuple(ops))

    lanes = [tuple(map(edit, mine)) if n == rank else mine for n, mine in enumerate(plan.lanes)]
    return replace(plan, lanes=tuple(lanes))


def failure(made: Twin, plan: Plan | None = None) -> RankFailed:
    """Run a prompt that must fail; how."""
    gate = made.gate
    assert isinstance(gate, SeededGate)
    fleet = made.prepare(IDS, plan)
    made.go(fleet)
    with pytest.raises(RankFailed) as caught:
        fleet.wait(lambda _: gate.stuck(), 30)
    return caught.value


def test_an_op_that_raises_is_named_with_rank_layer_chunk_and_cause(
    small: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with twin(small, world_size=2, chunk_size=CHUNK) as made:
        fleet = made.prepare(IDS)
        state = made.engines[1].executor.state

        def explode(*_: object) -> torch.Tensor:
            raise ArithmeticError("no more numbers")

        monkeypatch.setattr(state, "layer", explode)
        made.go(fleet)
        with pytest.raises(RankFailed, match=r"rank 1 failed at `layer c0 l2` .*: no more numbers") as caught:
            fleet.wait(lambda _: False, 30)
        failed = caught.value.__cause__
        assert isinstance(failed, OpFailed)
        assert (failed.rank, failed.lane, failed.op) == (1, "compute", parse_op("layer c0 l2"))
        assert isinstance(failed.__cause__, ArithmeticError)


def test_the_cause_is_told_and_not_what_it_did_to_the_others(
    small: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with twin(small, world_size=3, chunk_size=CHUNK) as made:
        fleet = made.prepare(IDS)
        monkeypatch.setattr(made.engines[2].executor.state, "layer", None)
        with pytest.raises(OpFailed, match="rank 2 failed at `layer c0 l2`"):
            made.all(lambda engine: engine.prefill_phase())
        assert isinstance(made.engines[0].executor.failure, OpFailed)
        assert isinstance(made.engines[0].executor.failure.error, CommError)
        with pytest.raises(RankFailed, match="rank 2 failed"):
            fleet.wait(lambda _: False, 30)


def test_a_message_that_is_not_the_plans_is_named_beside_the_plans(small: Decoder) -> None:
    gate = SeededGate(2)
    with twin(small, gate=gate, world_size=2, chunk_size=CHUNK, unsafe=True, schedule="lockstep") as made:
        plan = made.engines[0].plan_for(len(IDS))
        wrong = edited(plan, 0, SEND, "send kv c0 l0 -> 1, 4 tokens")
        error = failure(made, wrong)
        assert "rank 1 failed at `recv kv c1 l0 <- 0, 4 tokens`" in str(error)
        assert "the plan expects block c1 l0" in str(error)
        assert "rank 0 sent block c0 l0" in str(error)


def test_a_message_of_another_size_is_drained_and_named(small: Decoder) -> None:
    with twin(small, gate=SeededGate(2), world_size=2, chunk_size=CHUNK, unsafe=True) as made:
        plan = made.engines[0].plan_for(len(IDS))
        wrong = edited(plan, 0, SEND, "send kv c2 l0 -> 1, 2 tokens")
        assert "block c2 l0, 2 tokens, float32, 512 bytes" in str(failure(made, wrong))
        assert not made.exchange.taken


def test_a_plan_that_miscounts_tokens_is_refused_by_the_sender(small: Decoder) -> None:
    with twin(small, gate=SeededGate(2), world_size=2, chunk_size=CHUNK, unsafe=True) as made:
        wrong = edited(made.engines[0].plan_for(len(IDS)), 0, SEND, SEND.replace("4 tokens", "5 tokens"))
        assert "5 tokens by the plan, but block c1 l0 has 4" in str(failure(made, wrong))


def test_another_plan_on_one_rank_is_named(small: Decoder) -> None:
    with twin(small, world_size=2, chunk_size=CHUNK) as made:
        fleet = made.prepare(IDS)
        other = made.engines[0].config.with_(sync_strategy="ring")
        made.engines[1].config = other
        plan = made.engines[1].prepare(IDS).plan
        assert plan.id != fleet.plan.id
        made.go(fleet)
        with pytest.raises(RankFailed, match=r"rank \d runs another plan") as caught:
            fleet.wait(lambda _: False, 30)
        assert f"{plan.id:016x}" in str(caught.value)
        assert f"{fleet.plan.id:016x}" in str(caught.value)


@pytest.mark.parametrize("same_lane", [True, False])
def test_a_block_that_comes_twice_is_refused(small: Decoder, same_lane: bool) -> None:
    """Also where both recvs wait side by side, on two lanes."""
    with twin(small, world_size=3, chunk_size=CHUNK, unsafe=True, gate=SeededGate(0)) as made:
        plan = made.engines[0].plan_for(len(IDS))
        if same_lane:
            once, into = SEND, "recv kv c1 l0 <- 0, 4 tokens"
            plan = edited(edited(plan, 0, once, once, once), 1, into, into, into)
        else:
            first = "send kv c0 l0 -> 2, 4 tokens"
            plan = edited(plan, 1, "send kv c0 l1 -> 2, 4 tokens", first, "send kv c0 l1 -> 2, 4 tokens")
            into = "recv kv c0 l1 <- 1, 4 tokens"
            plan = edited(plan, 2, into, "recv kv c0 l0 <- 1, 4 tokens", into)
        assert "already on this rank" in str(failure(made, plan))


def test_tokens_that_differ_are_told_with_position_tokens_and_logits(small: Decoder) -> None:
    with twin(small, world_size=3, chunk_size=CHUNK, max_new_tokens=12) as made:
        made.all(lambda engine: engine.prefill_phase(IDS))
        assert made.engines[1].cache is not None
        made.engines[1].cache.tensor(2)[: len(IDS)] *= -3.0
        with pytest.raises(TokensDiffer) as caught:
            made.all(lambda engine: engine.decode_phase())
    error = caught.value
    assert error.position >= 1  # the first token comes from the final state, which is the same everywhere
    assert error.tokens[0] == error.tokens[2] != error.tokens[1]
    for rank, (token, logits) in enumerate(zip(error.tokens, error.logits, strict=True)):
        assert set(logits) == set(error.tokens)
        assert max(logits, key=logits.__getitem__) == token
        assert f"rank {rank} chose {token}" in str(error)
    assert f"first at new token {error.position}" in str(error)


def test_a_refuted_plan_is_refused_with_the_counterexample(small: Decoder) -> None:
    with twin(small, world_size=3, chunk_size=CHUNK, schedule="batched") as made:
        with pytest.raises(PlanError, match=r"deadlock .*unsafe=True") as caught:
            made.engines[0].prepare(IDS)
        assert "rank 0 sends block c0 l0 to rank 1 and waits" in str(caught.value)


def test_an_unsafe_plan_gets_stuck_in_rendezvous(small: Decoder) -> None:
    gate = SeededGate(1)
    with twin(small, gate=gate, world_size=3, chunk_size=CHUNK, schedule="batched", unsafe=True) as made:
        fleet = made.prepare(IDS)
        made.go(fleet)
        assert gate.wait(lambda: gate.stuck() or None, 30)
        assert not is_complete(made, expected(small, IDS, CHUNK))
        assert any(any(stand.started) for stand in fleet.stands())


def test_a_new_prompt_is_refused_while_the_one_before_is_blocked(
    small: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = SeededGate(1)
    with twin(small, gate=gate, world_size=3, chunk_size=CHUNK, schedule="batched", unsafe=True) as made:
        made.go(made.prepare(IDS))
        assert gate.wait(lambda: gate.stuck() or None, 30)
        executor = made.engines[0].executor
        monkeypatch.setattr(executor, "close", partial(executor.close, timeout=0.01))
        with pytest.raises(
            RuntimeError, match=r"rank 0: lanes of the previous prompt are still blocked in a transfer"
        ):
            made.engines[0].prepare(IDS)
        monkeypatch.undo()


def test_a_plan_for_another_prompt_is_refused_even_unsafe(small: Decoder) -> None:
    with twin(small, world_size=2, chunk_size=CHUNK, unsafe=True) as made:
        plan = made.engines[0].plan_for(len(IDS))
        with pytest.raises(PlanError, match=r"3 layers, 10 tokens and 2 ranks; this run has .* 9 tokens"):
            made.engines[0].prepare(IDS[:9], plan=plan)
        assert made.engines[0].prepare(IDS, plan=parse_plan(plan.text())).plan == plan


def test_a_plan_that_ends_without_a_final_state_says_so(small: Decoder) -> None:
    with twin(small, world_size=1, chunk_size=CHUNK, unsafe=True) as made:
        plan = edited(made.engines[0].plan_for(len(IDS)), 0, "norm c2 l3")
        made.prepare(IDS, plan)
        with pytest.raises(RuntimeError, match="rank 0 has no final hidden state"):
            made.engines[0].prefill_phase()


def test_bytes_that_are_no_header_are_refused() -> None:
    header = Header(7, Value("kv", 1, 2), 4, "float32", 512)
    assert Header.unpack(header.pack()) == header
    assert len(header.pack()) == HEADER_BYTES
    with pytest.raises(TransferError, match="is not a header: the stream"):
        Header.unpack(b"\0" * HEADER_BYTES)


def test_closing_ends_all_waiting(small: Decoder) -> None:
    with twin(small, world_size=2, chunk_size=CHUNK) as made:
        comm = made.exchange.comm(0)
        made.exchange.close()
        waits: tuple[Any, ...] = (
            lambda: comm.send(Channel("kv", 0, 1), b"", None),
            lambda: comm.recv_header(Channel("kv", 1, 0)),
            lambda: comm.all_gather(b"x"),
        )
        for wait in waits:
            with pytest.raises(CommError, match="the ranks were closed"):
                wait()
