"""Every op records exactly one event, with correct times and sizes."""

from collections import Counter

import pytest

from dinfer.model.decoder import Decoder
from dinfer.plan.graph import channel_of
from dinfer.plan.ops import Op
from dinfer.run.stepper import Stepper
from dinfer.trace.events import Event
from dinfer.trace.trace import Trace
from dinfer.transport.gate import Gate
from tests.support.seeded_gate import SeededGate
from tests.support.twin import Twin, prompt, twin

CHUNK = 4
IDS = list(prompt(10))
SCHEDULES = pytest.mark.parametrize("schedule", ["pipelined", "lockstep"])
STRATEGIES = pytest.mark.parametrize("strategy", ["pairwise", "ring"])


def events_of(made: Twin) -> list[list[Event]]:
    return [engine.recorder.events() for engine in made.engines if engine.recorder]


def op_of(event: Event) -> Op:
    """The op that an event says it is of."""
    if event.kind not in ("send", "recv"):
        layer = -1 if event.layer is None else event.layer
        return Op(event.kind, event.chunk or 0, layer)  # type: ignore[arg-type]
    chunk, layer = (-1 if n is None else n for n in (event.chunk, event.layer))
    assert event.peer is not None
    return Op(event.kind, chunk, layer, event.what, event.peer, event.tokens)  # type: ignore[arg-type]


@SCHEDULES
@STRATEGIES
@pytest.mark.parametrize("gate", [None, SeededGate(3)], ids=["free", "seeded"])
def test_every_op_has_one_event_on_its_lane(
    small: Decoder, schedule: str, strategy: str, gate: Gate | None
) -> None:
    with twin(
        small, gate=gate, world_size=3, chunk_size=CHUNK, schedule=schedule, sync_strategy=strategy
    ) as made:
        made.all(lambda engine: engine.prefill_phase(IDS))
        plan = made.engines[0].executor.plan
        for lanes, events in zip(plan.lanes, events_of(made), strict=True):
            for lane in lanes:
                mine = [event for event in events if event.lane == lane.name]
                assert [op_of(event) for event in mine] == list(lane.ops)
                assert [event.index for event in mine] == list(range(len(lane.ops)))


@SCHEDULES
@pytest.mark.parametrize("rendezvous", [True, False])
def test_times_are_in_order_and_lanes_do_one_thing_at_a_time(
    small: Decoder, schedule: str, rendezvous: bool
) -> None:
    with twin(small, rendezvous=rendezvous, world_size=3, chunk_size=CHUNK, schedule=schedule) as made:
        made.all(lambda engine: engine.prefill_phase(IDS))
        for events in events_of(made):
            last: dict[str, int] = {}
            for event in events:
                assert last.get(event.lane, 0) <= event.ready <= event.start <= event.met <= event.end
                assert event.peer is not None or event.waited == 0
                last[event.lane] = event.end


@STRATEGIES
def test_what_is_sent_is_received_and_fills_every_rank(small: Decoder, strategy: str) -> None:
    with twin(small, world_size=3, chunk_size=CHUNK, sync_strategy=strategy) as made:
        made.all(lambda engine: engine.prefill_phase(IDS))
        trace = Trace.merge(events_of(made))
    sent: Counter[object] = Counter()
    received: Counter[object] = Counter()
    for event in trace.events:
        if event.kind in ("send", "recv"):
            by_kind = sent if event.kind == "send" else received
            by_kind[channel_of(event.rank, op_of(event)), event.what, event.chunk, event.layer] += event.bytes
    assert sent == received
    assert {size for key, size in sent.items() if key[1] == "kv" and key[2] == 0} == {  # type: ignore[index]
        2 * CHUNK * small.kv_heads * small.head_dim * 4
    }
    figures = [trace.rank_figures(rank) for rank in trace.ranks]
    assert sum(f.sent_bytes for f in figures) == sum(f.received_bytes for f in figures) == sum(sent.values())
    for rank in range(3):
        assert trace.received(rank) == [[True] * small.num_layers] * 3


@SCHEDULES
@pytest.mark.parametrize("seed", range(5))
def test_a_recv_that_was_released_leaves_no_event(small: Decoder, schedule: str, seed: int) -> None:
    """Stopped in the middle, and gone on: as many events as in a run without a stop."""
    with twin(small, gate=SeededGate(seed), world_size=3, chunk_size=CHUNK, schedule=schedule) as made:
        fleet = made.prepare(IDS)
        stepper = Stepper(fleet, timeout=60)
        for engine in made.engines[:2]:  # the last rank posts nothing: its peers wait for it
            lanes = fleet.plan.lanes[engine.rank]
            engine.executor.set_limits([len(lane.ops) for lane in lanes])
        gate = made.gate
        assert isinstance(gate, SeededGate)
        assert gate.wait(lambda: gate.stuck() or None, 30)
        assert any(
            fleet.plan.lanes[rank][n].ops[stand.positions[n]].kind == "recv"
            for rank, stand in enumerate(fleet.stands())
            for n, begun in enumerate(stand.started)
            if begun
        )
        cut = stepper.pause()
        assert stepper.cuts.is_consistent(cut)
        assert sum(map(len, events_of(made))) == sum(map(sum, cut))
        stepper.resume()
        stepper.wait(60)
        assert sum(map(len, events_of(made))) == len(list(fleet.plan.places()))


def test_going_back_and_again_records_again(small: Decoder) -> None:
    with twin(small, world_size=2, chunk_size=CHUNK) as made:
        stepper = Stepper(made.prepare(IDS), timeout=60)
        stepper.run_to(1, 2)
        once = Counter(op_of(event) for events in events_of(made) for event in events)
        assert set(once.values()) == {1} or max(once.values()) <= 2  # both ranks may do the same op
        back = stepper.step_back("layer", 2)
        redone = sum(map(sum, back.before)) - sum(map(sum, back.after))
        assert redone
        before = sum(map(len, events_of(made)))
        stepper.run_to(1, 2)
        assert sum(map(len, events_of(made))) == before + redone


def test_decode_records_each_token_and_its_comparison(small: Decoder) -> None:
    with twin(small, world_size=2, chunk_size=CHUNK, max_new_tokens=3) as made:
        made.all(lambda engine: engine.prefill_phase(IDS))
        made.all(lambda engine: engine.decode_phase())
        for events in events_of(made):
            tokens = [(event.kind, event.index) for event in events if event.lane == "decode"]
            made_each = [(kind, n) for n in range(3) for kind in ("decode", "all_gather")]
            assert tokens == [("check", None), *made_each]


def test_every_op_is_told_once_it_has_ended(small: Decoder) -> None:
    told: list[tuple[int, Op]] = []
    with twin(small, world_size=2, chunk_size=CHUNK) as made:
        fleet = made.prepare(IDS)
        for engine in made.engines:
            engine.executor.on_op = lambda event, op: told.append((event.rank, op))
        made.go(fleet)
        assert fleet.wait(lambda stands: all(stand.at_limits for stand in stands), 30)
        assert Counter(told) == Counter((place.rank, op) for place, op in fleet.plan.places())
