"""Every kind of fault in every place breaks exactly the right bytes on exactly the right ranks."""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from dinfer.engine.decoding import TokensDiffer
from dinfer.engine.engine import Engine
from dinfer.engine.faults import Strike, order_of
from dinfer.model.decoder import Decoder
from dinfer.plan.faults import KINDS, Fault, fault_of
from dinfer.plan.ops import PlanError
from dinfer.plan.partition import Shape
from dinfer.rank.faults import set_faults
from dinfer.run.stepper import Stepper
from tests.support.broken import IN_PLACE, broken_block, in_shadow, ranks_hit, sizes_of, words
from tests.support.expected import expected
from tests.support.held_kv import is_as_made
from tests.support.tiny import tiny_checkpoint
from tests.support.twin import Twin, prompt, twin

IDS = list(prompt(10))
CHUNK = 4
SHAPE = Shape(layers=3, tokens=10, chunk_size=4, starts=(0, 1, 2))
DETAILS: dict[str, dict[str, Any]] = {
    "bitflip": {"tensor": "V", "head": 1, "token": 6, "dim": 13, "bit": 15},
    "nan": {"tensor": "K", "head": 1, "token": 5},
    "zero": {"tensor": "V", "head": 0, "token": 7},
    "stale": {"chunk": 2},
    "permute": {"chunk": 0, "seed": 3},
    "head_shift": {"chunk": 1, "tensor": "K"},
}
GIVEN = [(kind, where) for kind in IN_PLACE for where in KINDS[kind].wheres]


@pytest.fixture(scope="module")
def bfloat16(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """Three layers in bfloat16."""
    folder = tmp_path_factory.mktemp("faults") / "bfloat16"
    return Decoder.load(tiny_checkpoint(folder, "qwen3", layers=3, dtype="bfloat16"))


@contextmanager
def ranks(decoder: Decoder, **config: Any) -> Iterator[tuple[Twin, Stepper, list[Strike]]]:
    """Three ranks that stand before their first op; strikes are put down."""
    given = {"world_size": 3, "chunk_size": CHUNK, "max_new_tokens": 5, **config}
    with twin(decoder, **given) as made:
        yield made, Stepper(made.prepare(IDS), timeout=60), []


def arm_all(made: Twin, strikes: list[Strike], *faults: Fault) -> None:
    """On every rank, as a session does."""
    for engine in made.engines:
        set_faults(engine, faults, strikes.append)


def fault(decoder: Decoder, kind: str, number: int = 1, **given: Any) -> Fault:
    details = {} if kind == "repeat_row" else {"layer": 1, **DETAILS.get(kind, {"chunk": 1}), **given}
    if "token" in details and "chunk" in given:
        details["token"] = SHAPE.chunks[given["chunk"]].start
    return fault_of(number, kind, SHAPE, sizes_of(expected(decoder, IDS, CHUNK).kv), **details)


def finish(stepper: Stepper) -> None:
    stepper.resume()
    stepper.wait(60)
    assert stepper.at_end


def wrong_blocks(engine: Engine, decoder: Decoder) -> dict[tuple[int, int], np.ndarray]:
    """The blocks of a rank that differ from those of a clean run, by (chunk, layer)."""
    clean, found = expected(decoder, IDS, CHUNK).kv, {}
    for layer, rows in enumerate(clean):
        for chunk, at in enumerate(SHAPE.chunks):
            here = words(engine.executor.state.cache.block(layer, at.start, at.stop))
            if not np.array_equal(here, words(rows[at.start : at.stop])):
                found[chunk, layer] = here
    return found


def check(made: Twin, decoder: Decoder, one: Fault, hit: set[int]) -> None:
    """Exactly these ranks hold exactly the broken block, and nothing else is wrong that does not follow from it."""
    plan = made.engines[0].executor.plan
    wanted = broken_block(one, expected(decoder, IDS, CHUNK).kv[one.layer], SHAPE.chunks)
    for engine in made.engines:
        wrong = wrong_blocks(engine, decoder)
        if engine.rank in hit:
            assert np.array_equal(wrong.pop((one.chunk, one.layer)), wanted)
        assert [block for block in wrong if not in_shadow(one, plan, *block)] == []


@pytest.mark.parametrize("schedule", ["pipelined", "lockstep"])
@pytest.mark.parametrize("strategy", ["pairwise", "ring"])
@pytest.mark.parametrize(("kind", "where"), GIVEN)
def test_a_fault_breaks_just_what_it_says(
    small: Decoder, bfloat16: Decoder, kind: str, where: str, strategy: str, schedule: str
) -> None:
    for decoder in (small, bfloat16) if schedule == "pipelined" else (small,):
        for rank in (1,) if where == "compute" else (2, 0) if where == "wire" else (2, 0, 1):
            with ranks(decoder, schedule=schedule, sync_strategy=strategy) as (made, stepper, strikes):
                one = fault(decoder, kind, where=where, rank=rank)
                arm_all(made, strikes, one)
                finish(stepper)
                assert [strike.number for strike in strikes] == [1]
                assert strikes[0].changed > 0
                check(made, decoder, one, ranks_hit(one, made.engines[0].executor.plan))


@pytest.mark.parametrize("streams", ["pairs", "serial"])
@pytest.mark.parametrize(("kind", "where"), GIVEN)
def test_a_fault_breaks_the_same_where_ops_are_issued_to_streams(
    small: Decoder, kind: str, where: str, streams: str
) -> None:
    for rank in (1,) if where == "compute" else (2, 0):
        with ranks(small, backend="nccl", streams=streams, sync_strategy="ring") as (made, stepper, strikes):
            one = fault(small, kind, where=where, rank=rank)
            arm_all(made, strikes, one)
            finish(stepper)
            assert [strike.number for strike in strikes] == [1]
            check(made, small, one, ranks_hit(one, made.engines[0].executor.plan))


@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize("rank", [0, 1])
def test_in_memory_of_a_block_that_is_there_it_strikes_at_once_and_once(
    small: Decoder, kind: str, rank: int
) -> None:
    with ranks(small, sync_strategy="ring") as (made, stepper, strikes):
        finish(stepper)
        one = fault(small, kind, rank=rank)
        for _ in range(2):
            arm_all(made, strikes, one)
            check(made, small, one, {rank})
        assert len(strikes) == 1
        assert all(engine.executor.state.ledger.entries for engine in made.engines)


def test_the_ledger_holds_what_a_block_was_before_memory_changed_and_after_all_else(small: Decoder) -> None:
    with ranks(small, sync_strategy="ring") as (made, stepper, strikes):
        first, second = (
            fault(small, "zero", 1, rank=2),
            fault(small, "zero", 2, rank=0, where="wire", layer=2),
        )
        arm_all(made, strikes, first, second)
        finish(stepper)
        ledgers = [engine.executor.state.ledger.entries for engine in made.engines]
        assert [is_as_made(ledgers[rank][1, 1]) for rank in range(3)] == [False, True, True]
        assert [is_as_made(ledgers[rank][1, 2]) for rank in range(3)] == [False, False, True]


def test_the_defaults_are_the_first_value_and_a_bit_of_the_middle_of_the_mantissa(small: Decoder) -> None:
    with ranks(small) as (made, stepper, strikes):
        one = fault_of(1, "bitflip", SHAPE, sizes_of(expected(small, IDS, CHUNK).kv), layer=1, chunk=1)
        assert (one.rank, one.tensor, one.head, one.token, one.where) == (2, "K", 0, 4, "memory")
        arm_all(made, strikes, one)
        finish(stepper)
        check(made, small, one, {2})
        assert strikes == [Strike(1, 1, "1 of 256 values changed")]


@pytest.mark.parametrize("kind", [*IN_PLACE, "append_twice"])
def test_what_a_fault_changes_is_not_taken_for_an_edit_by_hand(small: Decoder, kind: str) -> None:
    with ranks(small, sync_strategy="ring") as (made, stepper, strikes):
        arm_all(made, strikes, fault(small, kind, 1))
        finish(stepper)
        assert [engine.prompt.new_edits() for engine in made.engines] == [[], [], []]
        arm_all(made, strikes, fault(small, kind, 1), fault(small, kind, 2, rank=0))
        assert [engine.prompt.new_edits() for engine in made.engines] == [[], [], []]
        assert [strike.number for strike in strikes] == [1, 2]
        for engine in made.engines:
            engine.executor.state.block(0, 0).zero_()
        assert [set_faults(engine, (), strikes.append) for engine in made.engines] == [["KV of layer 0"]] * 3


@pytest.mark.parametrize("bit", [0, 22, 31])
def test_any_bit_may_flip(small: Decoder, bit: int) -> None:
    with ranks(small) as (made, stepper, strikes):
        one = fault(small, "bitflip", bit=bit, rank=2)
        arm_all(made, strikes, one)
        finish(stepper)
        check(made, small, one, {2})


def test_a_fault_that_changes_nothing_says_so(small: Decoder) -> None:
    with ranks(small) as (made, stepper, strikes):
        finish(stepper)
        arm_all(
            made, strikes, fault(small, "zero", 1), fault(small, "zero", 2), fault(small, "lost", 3, rank=0)
        )
        assert [strike.changed > 0 for strike in strikes if strike.number != 3] == [True, False]
        assert strikes[-1].found if strikes[-1].number == 2 else True
        assert [strike.found for strike in strikes if not strike.changed] == ["struck, but changed no byte"]


def test_tokens_never_all_keep_their_places() -> None:
    for tokens in (2, 3, 7):
        for seed in range(50):
            assert sorted(order_of(tokens, seed)) == list(range(tokens)) != order_of(tokens, seed)


# -- going back


@pytest.mark.parametrize("where", ["memory", "wire", "compute"])
def test_it_strikes_again_when_its_block_is_made_again_and_not_once_it_is_disarmed(
    small: Decoder, where: str
) -> None:
    with ranks(small, sync_strategy="ring") as (made, stepper, strikes):
        one = fault(small, "zero", where=where, rank=1 if where == "compute" else 2)
        arm_all(made, strikes, one)
        finish(stepper)
        stepper.run_to(0, 2)
        finish(stepper)
        assert len(strikes) == 2
        check(made, small, one, ranks_hit(one, stepper._fleet.plan))
        arm_all(made, strikes)
        check(made, small, one, ranks_hit(one, stepper._fleet.plan))
        stepper.run_to(0, 2)
        finish(stepper)
        assert len(strikes) == 2
        assert [wrong_blocks(engine, small) for engine in made.engines] == [{}, {}, {}]


def test_going_back_to_after_a_block_leaves_its_bytes(small: Decoder) -> None:
    with ranks(small, world_size=1, layer_split=()) as (made, stepper, strikes):
        stepper.run_to(2, 1)
        one = fault_of(
            1, "zero", Shape(3, 10, 4, (0,)), sizes_of(expected(small, IDS, CHUNK).kv), layer=0, token=9
        )
        arm_all(made, strikes, one)
        stepper.step_back("op")  # the hidden state after layer 0 is computed anew
        wrong = wrong_blocks(made.engines[0], small)
        wanted = broken_block(one, expected(small, IDS, CHUNK).kv[0], SHAPE.chunks)
        assert np.array_equal(wrong[2, 0], wanted)
        assert len(strikes) == 1


# -- positions


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_wrong_positions_turn_keys_and_leave_values(small: Decoder, backend: str) -> None:
    with ranks(small, backend=backend) as (made, stepper, strikes):
        one = fault(small, "positions")
        arm_all(made, strikes, one)
        finish(stepper)
        assert [strike.number for strike in strikes] == [1]
        assert strikes[0].changed > 0
        clean = expected(small, IDS, CHUNK).kv[1][4:8]
        for engine in made.engines:
            wrong = wrong_blocks(engine, small)
            here = engine.executor.state.cache.block(1, 4, 8)
            assert torch.equal(here[:, 1], clean[:, 1])
            assert not torch.equal(here[:, 0], clean[:, 0])
            # a rotation by one position: the length of each pair of dims stays
            assert torch.allclose(lengths(here[:, 0]), lengths(clean[:, 0]), atol=1e-5)
            assert (1, 2) in wrong
            assert all(in_shadow(one, engine.executor.plan, *block) for block in wrong if block != (1, 1))


def lengths(keys: torch.Tensor) -> torch.Tensor:
    """Squared, of what a rotary embedding turns: each dim with the one half a head further."""
    one, other = keys.chunk(2, dim=-1)
    return one**2 + other**2


# -- rows appended twice


def layer_rows(engine: Engine, layer: int, rows: int) -> torch.Tensor:
    return engine.executor.state.cache.block(layer, 0, rows)


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
@pytest.mark.parametrize("strategy", ["pairwise", "ring"])
@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("early", [True, False])
def test_rows_appended_twice_move_those_behind_on_that_rank_alone(
    small: Decoder, strategy: str, rank: int, early: bool, backend: str
) -> None:
    with ranks(small, sync_strategy=strategy, max_new_tokens=1, backend=backend) as (made, stepper, strikes):
        one = fault(small, "append_twice", rank=rank)
        if not early:
            finish(stepper)
        arm_all(made, strikes, one)
        finish(stepper)
        clean = expected(small, IDS, CHUNK).kv[1]
        for engine in made.engines:
            state = engine.executor.state
            assert state.extra == ({1: 4} if engine.rank == rank else {})
            wanted = clean if engine.rank != rank else torch.cat([clean[:8], clean[4:]])
            assert torch.equal(layer_rows(engine, 1, len(wanted)), wanted)
            assert {block for block in wrong_blocks(engine, small) if block[1] != 1} == set()
        assert [strike.found for strike in strikes] == [
            f"rank {rank} now holds 14 rows of the prompt in layer 1"
        ]


def test_going_back_takes_the_rows_out_and_they_come_again(small: Decoder) -> None:
    with ranks(small, sync_strategy="ring") as (made, stepper, strikes):
        faults = [
            fault(small, "append_twice", n, chunk=chunk, rank=2) for n, chunk in ((1, 1), (2, 0), (3, 1))
        ]
        arm_all(made, strikes, *faults)
        clean = expected(small, IDS, CHUNK).kv[1]
        wanted = torch.cat([clean[:4], clean[:4], clean[4:8], clean[4:8], clean[4:8], clean[8:]])
        for times in (1, 2):
            finish(stepper)
            assert made.engines[2].executor.state.extra == {1: 12}
            assert torch.equal(layer_rows(made.engines[2], 1, 22), wanted)
            assert len(strikes) == 3 * times
            stepper.run_to(1, 2)
            assert made.engines[2].executor.state.extra == {}
            assert torch.equal(layer_rows(made.engines[2], 1, 8), clean[:8])
        arm_all(made, strikes)
        finish(stepper)
        assert wrong_blocks(made.engines[2], small) == {}


def test_decode_goes_on_behind_all_rows_that_are_held(small: Decoder) -> None:
    """The real fault of our first users: 52 rows of a layer on one rank where the others hold 26."""
    with ranks(small, chunk_size=16) as (made, stepper, strikes):
        shape = Shape(3, 10, 16, (0, 1, 2))
        one = fault_of(
            1, "append_twice", shape, sizes_of(expected(small, IDS, 16).kv), layer=1, chunk=0, rank=0
        )
        arm_all(made, strikes, one)
        finish(stepper)
        assert strikes[0].found == "rank 0 now holds 20 rows of the prompt in layer 1"
        decodings = [engine.decoding() for engine in made.engines]
        with contextlib.suppress(TokensDiffer):  # whether a token differs is up to the weights
            made.all(lambda engine: [decodings[engine.rank].step() for _ in range(3)])
        clean, rows = expected(small, IDS, 16).kv[1], layer_rows(made.engines[0], 1, 22)
        assert torch.equal(rows[:20], torch.cat([clean, clean]))
        assert rows[20].any()
        new = layer_rows(made.engines[1], 1, 11)[10]
        assert torch.equal(rows[20], new), (
            "the first new row was made from the same hidden state and position"
        )
        assert not torch.equal(layer_rows(made.engines[0], 2, 11)[10], layer_rows(made.engines[1], 2, 11)[10])


# -- a row appended twice in decode


def test_a_repeated_row_is_there_twice_on_all_ranks_alike(small: Decoder) -> None:
    with ranks(small, max_new_tokens=5) as (made, stepper, strikes):
        finish(stepper)
        arm_all(made, strikes, fault(small, "repeat_row"))
        decodings = [engine.decoding() for engine in made.engines]
        tokens = made.all(lambda engine: list(decodings[engine.rank].run(5)))
        assert tokens[0] == tokens[1] == tokens[2] != expected(small, IDS, CHUNK).tokens[:5]
        assert [decoding.rows for decoding in decodings] == [18, 18, 18]
        assert sorted(strike.number for strike in strikes) == [1, 1, 1]
        assert all(strike.changed > 0 for strike in strikes)
        for engine, layer in ((engine, layer) for engine in made.engines for layer in range(3)):
            rows = layer_rows(engine, layer, 18)
            assert torch.equal(rows[10::2], rows[11::2])
            assert torch.equal(rows, layer_rows(made.engines[0], layer, 18))
        assert tokens[0] == by_hand(small, 5)


def by_hand(decoder: Decoder, new: int) -> list[int]:
    """Greedy tokens where each new row is written twice and the next position is the number of rows."""
    cache = decoder.new_cache(40)
    for rows in SHAPE.chunks:
        hidden = decoder.forward(IDS[rows.start : rows.stop], cache, rows.start)
    tokens, position = [int(decoder.logits(decoder.norm(hidden)[:, -1:]).argmax())], len(IDS)
    while len(tokens) < new:
        logits = decoder.logits(decoder.norm(decoder.forward(tokens[-1:], cache, position)))
        for layer in range(decoder.num_layers):
            cache.tensor(layer)[position + 1] = cache.tensor(layer)[position]
        tokens, position = [*tokens, int(logits.argmax())], position + 2
    return tokens


def test_taking_tokens_back_takes_their_rows_back(small: Decoder) -> None:
    with ranks(small, world_size=1) as (made, stepper, strikes):
        finish(stepper)
        decoding = made.engines[0].decoding()
        clean = [decoding.step() for _ in range(5)]
        decoding.back_to(2)
        assert decoding.rows == 11
        arm_all(made, strikes, fault(small, "repeat_row"))
        decoding.cache = made.engines[0].grow_cache(30)
        again = [decoding.step() for _ in range(3)]
        assert decoding.rows == 17
        decoding.back_to(2)
        arm_all(made, strikes)
        assert [decoding.step() for _ in range(3)] == clean[2:]
        assert again[0] == clean[2], "its row was not there yet when it was chosen"


def test_it_ends_where_the_rows_do(small: Decoder) -> None:
    with ranks(small, world_size=1, max_new_tokens=200) as (made, stepper, strikes):
        finish(stepper)
        arm_all(made, strikes, fault(small, "repeat_row"))
        decoding = made.engines[0].decoding()
        while not decoding.stopped:
            decoding.step()
        ended = decoding.tokens[-1] in small.eos_ids
        assert ended or 62 < decoding.rows <= 64 == small.max_positions


# -- what cannot be

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("bitflop", {}, r"unknown kind of fault: 'bitflop'\. Did you mean bitflip\? The kinds are bitflip, nan"),
    ("nan", {"chunk": 0}, r"nan needs a layer: give layer=0 to 2"),
    ("nan", {"layer": 0}, r"nan needs a block: give chunk=0 to 2 or a token"),
    ("lost", {"layer": 0}, r"give chunk=0 to 2\."),
    ("nan", {"layer": 3, "chunk": 0}, "layer is 3; the layers of this run go from 0 to 2"),
    ("nan", {"layer": -1, "chunk": 0}, "layer is -1;"),
    ("nan", {"layer": "7", "chunk": 0}, "layer is '7'; it must be a whole number from 0 to 2"),
    ("nan", {"layer": True, "chunk": 0}, "layer is True; it must be a whole number"),
    ("nan", {"layer": 0, "chunk": 3}, "chunk is 3; the chunks of this run go from 0 to 2"),
    ("nan", {"layer": 0, "token": 10}, "token is 10; the prompt's tokens go from 0 to 9"),
    ("nan", {"layer": 0, "token": 4, "chunk": 0}, "token 4 is in chunk 1, not in chunk 0 .*0 to 3"),
    ("nan", {"layer": 0, "token": 4, "chunk": 9}, "chunk is 9; the chunks"),
    ("nan", {"layer": 0, "chunk": 0, "rank": 3}, "rank is 3; the ranks of this run go from 0 to 2"),
    ("nan", {"layer": 0, "chunk": 0, "head": 2}, "head is 2; this model's KV heads go from 0 to 1"),
    ("nan", {"layer": 0, "chunk": 0, "dim": 16}, "dim is 16; the dims of a head go from 0 to 15"),
    ("bitflip", {"layer": 0, "chunk": 0, "bit": 32}, "bit is 32; the bits of a float32 go from 0 to 31"),
    ("nan", {"layer": 0, "chunk": 0, "bit": 3}, "nan takes no bit: it has no such parameter"),
    ("nan", {"layer": 0, "chunk": 0, "tensor": "Q"}, "tensor is 'Q'; it must be 'K' or 'V'"),
    ("stale", {"layer": 0, "chunk": 1, "tensor": "Q"}, "'K' or 'V', or left out for both"),
    ("nan", {"layer": 0, "chunk": 0, "where": "disk"}, "where is 'disk'; nan takes where='memory' or 'wire'"),
    ("positions", {"layer": 0, "chunk": 0, "where": "wire"}, "positions takes where='compute' only"),
    ("append_twice", {"layer": 0, "chunk": 0, "where": "compute"}, "append_twice takes where='memory' only"),
    ("nan", {"layer": 0, "chunk": 0, "where": "wire", "rank": 0}, "rank 0 owns layer 0, so it receives none"),
    ("nan", {"layer": 0, "chunk": 0, "where": "compute", "rank": 2}, "rank 0 computes layer 0, not rank 2: leave"),
    ("stale", {"layer": 0, "chunk": 0}, "chunk 0 has none: use chunk=1"),
    ("swap_kv", {"layer": 0, "chunk": 0, "token": 1}, "swap_kv takes no token: it breaks a whole block"),
    ("repeat_row", {"rank": 1}, "repeat_row takes no rank: it strikes on all ranks"),
    ("cast", {"layer": 0, "chunk": 0, "dtype": "int8"}, "for KV in float32 it must be one of bfloat16"),
    ("permute", {"layer": 0, "chunk": 0, "seed": -1}, "seed is -1"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "given", "said"), REFUSED)
def test_what_cannot_be_is_refused(small: Decoder, kind: str, given: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        fault_of(1, kind, SHAPE, sizes_of(expected(small, IDS, CHUNK).kv), **given)


def test_what_needs_more_than_there_is_is_refused(small: Decoder) -> None:
    sizes = sizes_of(expected(small, IDS, CHUNK).kv)
    with pytest.raises(PlanError, match=r"one KV head, so heads cannot shift: use swap_kv or permute"):
        fault_of(1, "head_shift", SHAPE, sizes._replace(kv_heads=1), layer=0, chunk=0)
    with pytest.raises(PlanError, match=r"chunk 2 has one token"):
        fault_of(1, "permute", Shape(3, 9, 4, (0, 1, 2)), sizes, layer=0, chunk=2)
    with pytest.raises(PlanError, match=r"a run of one rank sends no blocks"):
        fault_of(1, "nan", Shape(3, 9, 4, (0,)), sizes, layer=0, chunk=2, where="wire")


def test_a_fault_is_read_back_from_what_goes_over_the_line(small: Decoder) -> None:
    for number, kind in enumerate(KINDS):
        one = fault(small, kind, number)
        assert Fault(**one.as_dict()) == one
        assert str(one).startswith(f"#{number} {kind}")
    issue = Shape(36, 400, 128, (0, 12, 24))
    given = {"rank": 2, "layer": 7, "chunk": 1, "tensor": "K", "head": 3, "token": 141, "where": "memory"}
    one = fault_of(
        1, "bitflip", issue, sizes_of(expected(small, IDS, CHUNK).kv)._replace(kv_heads=8), **given
    )
    assert str(one) == "#1 bitflip in K of block c1 l7 on rank 2, head 3, token 141, in memory"
