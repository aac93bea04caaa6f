"""engine.step and engine.kv: all ranks or one alone stepped, inspected, edited, and stopped by conditions."""

import pytest
import torch

from dinfer.config import Config
from dinfer.engine.engine import Engine
from dinfer.model.decoder import Decoder
from dinfer.plan.breakpoints import Breakpoint
from dinfer.plan.ops import Op, PlanError
from tests.support.expected import expected, same_kv
from tests.support.runs import wait_for
from tests.support.twin import Twin, prompt, twin

IDS = list(prompt(10))


def prepared(made: Twin) -> list[Engine]:
    """Every rank's engine, before its first op."""
    made.prepare(IDS)
    return made.engines


def test_the_same_call_on_all_ranks_is_one_wave_after_another_to_the_end(small: Decoder) -> None:
    with twin(small, world_size=3, chunk_size=4) as made:
        engines = prepared(made)
        waves = len(engines[0].prompt.cuts.chain("wave")) - 1
        for _ in range(waves):
            said = made.all(lambda engine: engine.step(timeout=60))
            assert {tuple(stand) for stand in (engine.prompt.target for engine in engines)} == {
                engines[0].prompt.target
            }
            assert not any("waits for" in repr(one) for one in said)
        assert all(engine.executor.is_done() for engine in engines)
        assert "prefill is done" in repr(engines[0].step(timeout=0.01))
        wanted = expected(small, IDS, 4)
        assert all(same_kv(engine, wanted.kv) for engine in engines)


def test_a_step_says_what_was_done_with_shapes(small: Decoder) -> None:
    with twin(small, world_size=1, chunk_size=4) as made:
        (engine,) = prepared(made)
        text = repr(engine.step(timeout=60))
        assert text.startswith("rank 0: one wave, 2 ops\n  embed c0   hidden [1, 4, ")
        assert "layer c0 l0   K [4, " in text


def test_alone_a_rank_says_whom_it_waits_for_and_goes_on_once_the_others_have_come(small: Decoder) -> None:
    with twin(small, world_size=3, chunk_size=4) as made:
        zero, one, two = prepared(made)
        waits = "rank 1 waits for block c0 l0 from rank 0, which stands somewhere unknown"
        wait_for(lambda: repr(one.step(timeout=0.05)).startswith(waits), "rank 1 waits")
        assert one.prompt.target == one.prompt.cuts.next(one.prompt.cuts.start, "wave")
        waits_too = "rank 0 waits for rank 2 to take block c0 l0"
        wait_for(lambda: repr(zero.step(timeout=0.05)).startswith(waits_too), "rank 0 waits")
        two.step(timeout=60)
        assert one.executor.wait(lambda: one.executor.stand().at_limits, 30)
        made.all(lambda engine: engine.executor.run_to_end(30))


def test_a_rank_shows_what_it_holds(small: Decoder) -> None:
    with twin(small, world_size=2, chunk_size=4) as made:
        engines = prepared(made)
        assert engines[1].kv(0).tokens == 0
        assert "nothing computed or received yet" in repr(engines[1].kv(0))
        made.all(lambda engine: engine.executor.run_to_end(30))
        held = engines[1].kv(0)
        assert (held.tokens, held.chunks) == (10, (0, 1, 2))
        assert held.k.shape == (small.kv_heads, 10, small.head_dim)
        wanted = expected(small, IDS, 4).kv[0]
        assert torch.equal(held.v, wanted[:, 1].transpose(0, 1))
        with pytest.raises(PlanError, match="there is no layer 9: the layers are 0 to 2"):
            engines[0].kv(9)


def test_an_edit_is_noticed_and_computed_on(small: Decoder) -> None:
    with twin(small, world_size=1, chunk_size=4) as made:
        (engine,) = prepared(made)
        engine.step(timeout=60)
        engine.kv(0).k[0, 0, 0] = 5.0
        assert engine.step(timeout=60).edited == ("KV of layer 0",)
        assert engine.step(timeout=60).edited == ()
        key = next(iter(engine.hidden))
        engine.hidden[key] = engine.hidden[key] * 2
        assert engine.step(timeout=60).edited == (f"hidden c{key[0]} l{key[1]}",)
        engine.executor.run_to_end(30)
        assert not same_kv(engine, expected(small, IDS, 4).kv)


def test_nothing_that_the_engine_does_itself_counts_as_an_edit(small: Decoder) -> None:
    with twin(small, world_size=2, chunk_size=4, max_new_tokens=3) as made:
        engines = prepared(made)
        cuts = engines[0].prompt.cuts
        middle = cuts.after_block(1, 1)
        for cut in (middle, cuts.end):
            made.all(lambda engine, cut=cut: engine.prompt.go(cut))  # type: ignore[misc]
            made.all(lambda engine: engine.executor.wait(lambda: engine.executor.stand().at_limits, 30))
        made.all(lambda engine: engine.decode_phase())
        assert made.all(lambda engine: engine.prompt.rewind(middle)) == [[], []]
        assert made.all(lambda engine: engine.prompt.go(cuts.end)) == [[], []]
        made.all(lambda engine: engine.executor.run_to_end(30))


def conditional(small: Decoder, one: Breakpoint) -> tuple[Twin, list[tuple[Breakpoint, str, str]]]:
    """One rank that stops where the condition holds."""
    hits: list[tuple[Breakpoint, str, str]] = []
    made = Twin(small, Config(world_size=1, chunk_size=4))
    engine = made.engines[0]

    def hit(found: Breakpoint, op: Op, text: str) -> None:
        engine.executor.freeze()
        hits.append((found, str(op), text))

    engine._on_hit = hit
    made.prepare(IDS)
    engine.prompt.conditions.arm([one])
    return made, hits


def test_a_condition_stops_the_rank_at_the_op_that_meets_it(small: Decoder) -> None:
    made, hits = conditional(small, Breakpoint(1, condition="absmax", bound=0.0, layer=1))
    engine = made.engines[0]
    engine.executor.set_limits([len(lane.ops) for lane in engine.executor.plan.lanes[0]])
    assert engine.executor.wait(lambda: bool(hits) and engine.executor.stand().at_limits, 30)
    assert [(one.number, op) for one, op, _ in hits] == [(1, "layer c0 l1")]
    assert hits[0][2].startswith("K reaches ")
    assert not engine.executor.is_done()
    assert made.close()


def test_a_condition_with_the_number_of_a_hit_stops_the_rank_there_only(small: Decoder) -> None:
    made, hits = conditional(small, Breakpoint(1, condition="absmax", bound=0.0, hit=3))
    engine = made.engines[0]
    end = [len(lane.ops) for lane in engine.executor.plan.lanes[0]]
    ops = [op for lane in engine.executor.plan.lanes[0] for op in lane.ops if op.kind == "layer"]
    engine.executor.set_limits(end)
    assert engine.executor.wait(lambda: bool(hits) and engine.executor.stand().at_limits, 30)
    assert [op for _, op, _ in hits] == [str(ops[2])]
    assert made.close()


def test_a_condition_that_never_holds_stops_nothing(small: Decoder) -> None:
    made, hits = conditional(small, Breakpoint(1, condition="nan"))
    assert made.engines[0].executor.run_to_end(30)
    assert hits == []
    assert made.close()


def test_bytes_that_change_on_their_way_are_seen_by_their_digest(
    small: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    hits: list[str] = []
    with twin(small, world_size=2, chunk_size=4) as made:
        for engine in made.engines:
            engine._on_hit = lambda one, op, text: hits.append(f"{one.number}: {op}: {text}")
        engines = prepared(made)
        for engine in engines:
            engine.prompt.conditions.arm([Breakpoint(7, op="recv", condition="digest")])
        receive = type(engines[1].comm).recv_payload

        def corrupting(comm: object, channel: object, out: torch.Tensor) -> None:
            receive(comm, channel, out)  # type: ignore[arg-type]
            if comm.rank == 1 and out.ndim == 4 and not hits:  # type: ignore[attr-defined]
                out[0, 1, 0, 0] += 1

        monkeypatch.setattr(type(engines[1].comm), "recv_payload", corrupting)
        made.all(lambda engine: engine.executor.run_to_end(30))
    assert (
        hits[0]
        == "7: recv kv c0 l0 <- 0, 4 tokens: received a changed V from rank 0: the block changed on the way or before "
        "it was sent"
    )
