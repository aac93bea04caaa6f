"""Blocks whose bytes change are named, at once and exactly; and nothing else ever is."""

from __future__ import annotations

from random import Random
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dinfer.config import OnCorruption
from dinfer.engine.corruption import Alarm, Corrupted, Corruption
from dinfer.engine.engine import Engine
from dinfer.engine.lanes import OpFailed
from dinfer.kv.digests import as_numbers, row_digests
from dinfer.kv.ledger import Ledger
from dinfer.model.decoder import Decoder
from dinfer.plan.cut import UNITS
from dinfer.plan.graph import channel_of
from dinfer.plan.ops import Op
from dinfer.run.stepper import Stepper
from tests.support.expected import expected, is_complete
from tests.support.held_kv import is_as_made
from tests.support.twin import Twin, prompt, twin

CHUNK, WORLD = 4, 3
IDS = list(prompt(10))
FORMS = [
    pytest.param({"schedule": schedule, "sync_strategy": strategy, "backend": backend}, id=f"{name}-{strategy}")
    for name, schedule, backend in (
        ("pipelined", "pipelined", "gloo"),
        ("lockstep", "lockstep", "gloo"),
        ("lowered", "pipelined", "nccl"),
    )
    for strategy in ("pairwise", "ring")
]  # fmt: skip


class Place(NamedTuple):
    """A value of a rank's cache: `tensor` 0 is K, `token` counts in the chunk."""

    rank: int
    chunk: int
    layer: int
    tensor: int
    token: int
    head: int


def flip(block: Tensor, at: Place) -> None:
    """Change one bit behind torch's back, as a fault of the memory would: no edit is counted."""
    block.data[at.token, at.tensor, at.head].view(torch.int32)[1] ^= 1 << 9


def heard(made: Twin, policy: OnCorruption = "record") -> list[Corruption]:
    """What the ranks' alarms will have said."""
    found: list[Corruption] = []
    for engine in made.engines:
        engine._alarm = Alarm(policy, found.append)
    return found


def break_wire(engine: Engine, at: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes to this rank in the next prefill is changed at that place."""

    def on_wire(op: Op, block: Tensor) -> None:
        if (op.chunk, op.layer) == (at.chunk, at.layer):
            flip(block, at)

    monkeypatch.setattr(engine.executor.state.faults, "on_wire", on_wire)


def hops(made: Twin, chunk: int, layer: int) -> dict[int, int]:
    """By rank, from whom the block comes."""
    return {
        channel_of(rank, op).target: channel_of(rank, op).source
        for rank, lanes in enumerate(made.engines[0].executor.plan.lanes)
        for lane in lanes
        for op in lane.ops
        if op.kind == "recv" and op.what == "kv" and (op.chunk, op.layer) == (chunk, layer)
    }


def corrupt_events(engine: Engine) -> list[tuple[int | None, ...]]:
    assert engine.recorder
    events = [event for event in engine.recorder.events() if event.kind == "corrupt"]
    assert all(event.what == "kv" for event in events)
    return [(event.chunk, event.layer, event.peer, event.bytes) for event in events]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(4))
def test_bytes_that_change_on_the_wire_are_named_at_their_hop(
    small: Decoder, monkeypatch: pytest.MonkeyPatch, form: dict[str, Any], seed: int
) -> None:
    random = Random(seed)
    with twin(small, world_size=WORLD, chunk_size=CHUNK, **form) as made:
        found = heard(made)
        for engine in made.engines:
            engine.prepare(IDS)
        chunk, layer = random.randrange(3), random.randrange(3)
        by = hops(made, chunk, layer)
        rank, tensor = random.choice(sorted(by)), random.randrange(2)
        break_wire(made.engines[rank], Place(rank, chunk, layer, tensor, 1, 0), monkeypatch)
        made.all(lambda engine: engine.prefill_phase())
        first = [one for one in found if one.first is None]
        size = made.engines[0].executor.state.block(chunk, layer).nbytes
        assert first == [Corruption(rank, chunk, layer, "KV"[tensor], size, peer=by[rank])]
        assert str(first[0]) == (
            f"rank {rank} received a changed {'KV'[tensor]} of block c{chunk} l{layer} from rank {by[rank]}: "
            "the block changed on the way or before it was sent"
        )
        # Who passes it on is not accused: later hops name the rank that got it changed.
        later = [one for one in found if one.first is not None]
        passed_on = [at for at, source in by.items() if source == rank]
        assert [(one.rank, one.peer, one.first) for one in later] == [(at, rank, rank) for at in passed_on]
        for engine in made.engines:
            mine = [(one.chunk, one.layer, one.peer, one.bytes) for one in found if one.rank == engine.rank]
            assert corrupt_events(engine) == mine
        before = len(found)
        made.all(lambda engine: engine.recheck())
        assert len(found) == before, "memory holds what has arrived"


@pytest.mark.parametrize("form", FORMS)
def test_the_same_bit_flipped_on_every_hop(
    small: Decoder, monkeypatch: pytest.MonkeyPatch, form: dict[str, Any]
) -> None:
    """In a ring the second flip undoes the first: what then arrives is what was computed, and nobody is accused."""
    with twin(small, world_size=WORLD, chunk_size=CHUNK, **form) as made:
        found = heard(made)
        for engine in made.engines:
            engine.prepare(IDS)
        by = hops(made, 1, 0)
        first = next(rank for rank, source in by.items() if source == 0)
        for engine in made.engines:
            break_wire(engine, Place(engine.rank, 1, 0, 0, 2, 1), monkeypatch)
        made.all(lambda engine: engine.prefill_phase())
        told = {one.rank: one.first for one in found}
        ring = form["sync_strategy"] == "ring"
        assert told == ({first: None} if ring else {1: None, 2: None})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(4))
def test_memory_that_changes_is_named_before_decode_with_token_and_head(
    small: Decoder, form: dict[str, Any], seed: int
) -> None:
    random = Random(seed)
    with twin(small, world_size=WORLD, chunk_size=CHUNK, **form) as made:
        found = heard(made)
        made.all(lambda engine: engine.prefill_phase(IDS))
        chunk = random.randrange(3)
        tokens = len(made.engines[0].executor.state.rows(chunk))
        at = Place(random.randrange(WORLD), chunk, random.randrange(3), random.randrange(2),
                   random.randrange(tokens), random.randrange(small.kv_heads))  # fmt: skip
        flip(made.engines[at.rank].executor.state.block(chunk, at.layer), at)
        made.all(lambda engine: engine.recheck())
        (one,) = found
        assert (one.rank, one.chunk, one.layer, one.tensors) == (at.rank, chunk, at.layer, "KV"[at.tensor])
        assert (one.peer, one.rows, one.token, one.head) == (None, 1, chunk * CHUNK + at.token, at.head)
        assert str(one) == (
            f"rank {at.rank}: {'KV'[at.tensor]} of block c{chunk} l{at.layer} changed in memory "
            f"(head {at.head}, token {chunk * CHUNK + at.token})"
        )
        assert corrupt_events(made.engines[at.rank]) == [(chunk, at.layer, None, one.bytes)]
        made.all(lambda engine: engine.recheck())
        assert len(found) == 1, "it is told once"


def test_an_owner_whose_memory_changes_before_it_sends(
    small: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peers say that it came changed, and the owner's own check says where: its memory."""
    with twin(small, world_size=2, chunk_size=CHUNK) as made:
        found = heard(made)
        for engine in made.engines:
            engine.prepare(IDS)
        at = Place(0, 1, 0, 1, 3, 1)

        def in_memory(op: Op, block: Tensor) -> None:
            if (op.kind, op.chunk, op.layer) == ("layer", at.chunk, at.layer):
                flip(block, at)

        monkeypatch.setattr(made.engines[0].executor.state.faults, "in_memory", in_memory)
        made.all(lambda engine: engine.prefill_phase())
        made.all(lambda engine: engine.recheck())
    assert [(one.rank, one.peer, one.tensors, one.token, one.head) for one in found] == [
        (1, 0, "V", None, None),
        (0, None, "V", 7, 1),
    ]


def test_a_wrong_computation_is_no_corruption(small: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    with twin(small, world_size=2, chunk_size=CHUNK) as made:
        found = heard(made)
        for engine in made.engines:
            engine.prepare(IDS)
        monkeypatch.setattr(
            made.engines[0].executor.state.faults, "computed", lambda _, block: flip(block, Place(0, 0, 0, 0, 0, 0))
        )  # fmt: skip
        made.all(lambda engine: engine.prefill_phase())
        made.all(lambda engine: engine.recheck())
        assert found == []


@pytest.mark.parametrize("form", FORMS)
def test_a_run_that_is_to_fail_names_the_op_and_the_block(
    small: Decoder, monkeypatch: pytest.MonkeyPatch, form: dict[str, Any]
) -> None:
    with twin(small, world_size=WORLD, chunk_size=CHUNK, on_corruption="fail", **form) as made:
        for engine in made.engines:
            engine.prepare(IDS)
        rank, peer = sorted(hops(made, 1, 1).items())[0]
        break_wire(made.engines[rank], Place(rank, 1, 1, 0, 0, 0), monkeypatch)
        with pytest.raises(
            OpFailed, match=rf"rank {rank} failed at `recv kv c1 l1 <- {peer}, 4 tokens`"
        ) as caught:
            made.all(lambda engine: engine.prefill_phase())
        assert "received a changed K of block c1 l1 from rank" in str(caught.value)
        assert "on_corruption is fail" in str(caught.value)
        assert isinstance(caught.value.__cause__, Corrupted)
        assert corrupt_events(made.engines[rank])[0][:3] == (1, 1, peer)


@pytest.mark.parametrize("policy", ["pause", "fail"])
def test_no_rank_decodes_where_one_holds_changed_rows(small: Decoder, policy: str) -> None:
    with twin(small, world_size=WORLD, chunk_size=CHUNK, on_corruption=policy, max_new_tokens=2) as made:
        made.all(lambda engine: engine.prefill_phase(IDS))
        state = made.engines[1].executor.state
        for head in range(small.kv_heads):  # the sign of a zero's neighbours: tokens stay what they are
            state.block(2, 1).data[1, 1, head, 0] = (
                state.block(2, 1).data[1, 1, head, 0].nextafter(torch.tensor(9.0))
            )

        def refused(engine: Engine) -> str:
            with pytest.raises(Corrupted) as caught:
                engine.decode_phase()
            return str(caught.value)

        said = made.all(refused)
        assert len(set(said)) == 1
        heads = small.kv_heads
        assert (
            f"rank 1: V of block c2 l1 changed in memory ({heads} rows, the first: head 0, token 9)"
            in said[0]
        )
        if policy == "fail":
            assert made.all(refused) == said
        else:
            assert "Decode again to go on with these bytes" in said[0]
            assert len(made.all(lambda engine: engine.decode_phase())[0]) == 2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(3))
def test_no_false_alarm_however_a_run_is_walked(small: Decoder, form: dict[str, Any], seed: int) -> None:
    random = Random(seed)
    wanted = expected(small, IDS, CHUNK)
    with twin(small, world_size=random.randint(2, 3), chunk_size=CHUNK, on_corruption="fail", **form) as made:
        found = heard(made, "fail")
        stepper = Stepper(made.prepare(IDS), timeout=60)
        for _ in range(25):
            match random.randrange(4):
                case 0:
                    stepper.step_back(random.choice(UNITS), random.randint(1, 3))
                case 1:
                    stepper.resume()
                    stepper.pause()
                case _:
                    stepper.step(random.choice(UNITS), random.randint(1, 2))
            made.all(lambda engine: engine.recheck())
        stepper.resume()
        stepper.wait(60)
        assert is_complete(made, wanted)
        assert made.all(lambda engine: engine.decode_phase(max_new_tokens=6)) == [wanted.tokens] * len(
            made.engines
        )
        assert found == []
        assert all(corrupt_events(engine) == [] for engine in made.engines)
        for engine in made.engines:
            ledger = engine.executor.state.ledger
            assert len(ledger.entries) == 9
            assert all(is_as_made(entry) and not entry.edited for entry in ledger.entries.values())


def test_a_block_synced_by_hand_is_no_corruption(small: Decoder) -> None:
    """Also where it is other than what the plan's own sync had brought."""
    with twin(small, world_size=2, chunk_size=CHUNK, on_corruption="fail", max_new_tokens=2) as made:
        made.all(lambda engine: engine.prefill_phase(IDS))

        def sync(engine: Engine) -> None:
            engine.chunk = 1
            k, v = engine.kv_caches(8)[0]
            mine = (k[:, :, 4:8] * 0.5, v[:, :, 4:8] * 2)
            engine.sync_single_layer_cache(0, mine if engine.rank == 0 else None)

        made.all(sync)
        made.all(lambda engine: engine.decode_phase())
        for engine in made.engines:
            edited = [key for key, entry in engine.executor.state.ledger.entries.items() if entry.edited]
            assert edited == [(1, 0)]


def test_without_digests_nothing_is_kept_and_nothing_is_checked(
    small: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with twin(small, world_size=2, chunk_size=CHUNK, digests=False) as made:
        found = heard(made)
        for engine in made.engines:
            engine.prepare(IDS)
        break_wire(made.engines[1], Place(1, 0, 0, 0, 0, 0), monkeypatch)
        made.all(lambda engine: engine.prefill_phase())
        made.all(lambda engine: engine.recheck())
        assert found == []
        assert all(engine.executor.state.ledger.entries == {} for engine in made.engines)
        assert all(e.kind != "check" for m in made.engines if m.recorder for e in m.recorder.events())


def test_a_signature_says_who_computed_and_who_was_first_to_differ() -> None:
    block = torch.randn(4, 2, 3, 8, generator=torch.Generator().manual_seed(0))
    owner, middle, last = Ledger(0), Ledger(1), Ledger(2)
    owner.made((0, 5), block)
    said = owner.signature((0, 5))
    assert said[2] == 0
    changed = block.clone()
    changed[0, 0, 0, 0] += 1
    middle.arrived((0, 5), changed, said)
    passed_on = middle.signature((0, 5))
    assert passed_on.tolist() == [*said[:2].tolist(), 2]  # rank 1, plus one
    found = last.arrived((0, 5), changed, passed_on)
    assert found is not None
    assert last.signature((0, 5)).tolist() == passed_on.tolist()
    assert as_numbers(found) != last.entries[0, 5].announced == as_numbers(said[:2])
    assert not is_as_made(last.entries[0, 5])
    assert is_as_made(owner.entries[0, 5])


def test_a_block_that_nobody_digested_is_not_judged() -> None:
    block = torch.ones(2, 2, 1, 4)
    ledger = Ledger(1)
    ledger.arrived((0, 0), block, torch.zeros(3, dtype=torch.int64))
    assert is_as_made(ledger.entries[0, 0])
    assert ledger.signature((0, 0)).tolist() == [0, 0, 0]
    assert Ledger(0).signature((3, 3)).tolist() == [0, 0, 0]


def test_an_edit_enters_only_blocks_that_it_changed() -> None:
    one, other = torch.ones(2, 2, 1, 4), torch.ones(2, 2, 1, 4)
    ledger = Ledger(0)
    ledger.made((0, 0), one)
    ledger.made((1, 0), other)
    before = ledger.entries[1, 0]
    one += 1
    for key, block in (((0, 0), one), ((1, 0), other), ((2, 0), other)):
        ledger.edited(key, block)
    assert ledger.entries[0, 0].edited
    assert torch.equal(ledger.entries[0, 0].rows, row_digests(one))
    assert ledger.entries[1, 0] is before
    assert (2, 0) not in ledger.entries
