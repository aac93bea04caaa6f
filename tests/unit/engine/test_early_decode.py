"""Decode that begins while blocks are on their way: each layer waits for its own, and nothing else changes."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from dinfer.engine.corruption import Corrupted
from dinfer.engine.engine import Engine
from dinfer.errors import NotPossible
from dinfer.model.decoder import Decoder
from dinfer.plan.faults import Fault
from dinfer.plan.graph import Channel
from dinfer.trace.events import Event
from dinfer.transport.gloo import Comm
from dinfer.transport.header import Header
from tests.support.expected import NEW_TOKENS, expected, same_kv
from tests.support.runs import DEADLINE_S
from tests.support.twin import Twin, prompt, twin

CHUNK = 13
IDS = list(prompt(50))


class LateComm:
    """A slow link: it holds back the last block of the last layer until the rank's decode has run its layer 0."""

    def __init__(self, comm: Comm, engine: Engine, layers: int) -> None:
        self._comm, self._engine = comm, engine
        self._last = (len(IDS) - 1) // CHUNK, layers - 1
        self.held = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)

    def recv_header(self, channel: Channel) -> bytes:
        data = self._comm.recv_header(channel)
        value = Header.unpack(data).value
        if value.what == "kv" and (value.chunk, value.layer) == self._last:
            self.held = wait_for_layer(self._engine, 0)
        return data


def wait_for_layer(engine: Engine, layer: int) -> bool:
    """Whether decode ran this layer within the deadline."""
    for _ in range(int(DEADLINE_S / 0.01)):
        if any(event.layer == layer for event in decode_events(engine)):
            return True
        threading.Event().wait(0.01)
    return False


def decode_events(engine: Engine) -> list[Event]:
    assert engine.recorder is not None
    return [event for event in engine.recorder.events() if event.kind == "decode"]


def generated(made: Twin) -> list[list[int]]:
    return made.all(lambda engine: engine.generate_phase(IDS))


@pytest.mark.parametrize("strategy", ["pairwise", "ring"])
@pytest.mark.parametrize("schedule", ["pipelined", "lockstep"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_the_result_is_that_of_prefill_and_then_decode(
    small: Decoder, strategy: str, schedule: str, world_size: int
) -> None:
    wanted = expected(small, IDS, CHUNK)
    config: dict[str, Any] = {"schedule": schedule, "sync_strategy": strategy, "world_size": world_size}
    with twin(small, chunk_size=CHUNK, max_new_tokens=NEW_TOKENS, **config) as made:
        assert generated(made) == [wanted.tokens] * world_size
        assert all(same_kv(engine, wanted.kv) for engine in made.engines)


def test_a_layer_decodes_while_the_last_block_of_a_later_one_is_on_its_way(small: Decoder) -> None:
    wanted = expected(small, IDS, CHUNK)
    with twin(small, world_size=2, chunk_size=CHUNK, max_new_tokens=NEW_TOKENS) as made:
        first = made.engines[0]
        late = first.comm = LateComm(first.comm, first, small.num_layers)
        assert generated(made) == [wanted.tokens] * 2
        assert late.held
        assert same_kv(first, wanted.kv)
        assert first.recorder is not None
        arrived = max(e.end for e in first.recorder.events() if e.kind == "recv" and e.what == "kv")
        layers = {event.layer: event for event in decode_events(first) if event.layer is not None}
        assert sorted(layers) == list(range(small.num_layers))
        assert layers[0].end < arrived
        assert layers[small.num_layers - 1].met >= arrived


def test_the_first_token_waits_for_no_block(small: Decoder) -> None:
    told = []
    with twin(small, world_size=2, chunk_size=CHUNK, max_new_tokens=1) as made:
        first = made.engines[0]
        release = threading.Event()

        class Held(LateComm):
            def recv_header(self, channel: Channel) -> bytes:
                data = self._comm.recv_header(channel)
                if Header.unpack(data).value.what == "kv":
                    self.held = release.wait(DEADLINE_S)
                return data

        held = first.comm = Held(first.comm, first, small.num_layers)

        def generate(engine: Engine) -> list[int]:
            def tell(token: int) -> None:
                if engine is first:
                    told.append((token, engine.executor.is_done()))
                    release.set()

            return engine.generate_phase(IDS, tell)

        tokens = made.all(generate)
        assert held.held
        assert told == [(tokens[0][0], False)]
        assert first.executor.is_done(), "also without a second token the blocks are here at the end"


def test_rows_that_changed_are_found_before_any_token_counts(small: Decoder) -> None:
    with twin(small, world_size=2, chunk_size=CHUNK, max_new_tokens=3, on_corruption="fail") as made:
        seen: list[int] = []

        def generate(engine: Engine) -> list[int]:
            def damage(token: int) -> None:
                seen.append(token)
                if engine.rank == 1:  # its own block, computed long ago
                    engine.executor.state.block(0, small.num_layers - 1).data[0, 0, 0, 0] += 1

            return engine.generate_phase(IDS, damage)

        with pytest.raises(Corrupted, match="rank 1"):
            made.all(generate)
        assert len(seen) == 2, "the first token, on both ranks"


def test_with_armed_faults_decode_begins_after_prefill(small: Decoder) -> None:
    with twin(small, world_size=2, chunk_size=CHUNK, max_new_tokens=NEW_TOKENS) as made:
        made.all(lambda engine: engine.prepare(IDS))
        for engine in made.engines:
            fault = Fault(1, "repeat_row", "compute")
            engine.executor.state.faults.arm([fault], lambda _: None)
        made.all(lambda engine: engine.generate_phase())
        assert all(event.layer is None for event in decode_events(made.engines[0]))


def test_a_prompt_that_is_released_meanwhile_is_refused_in_words(small: Decoder) -> None:
    with twin(small, world_size=1, chunk_size=CHUNK, max_new_tokens=NEW_TOKENS) as made:
        (engine,) = made.engines

        def release(_: int) -> None:
            engine.release()

        with pytest.raises(NotPossible, match="released"):
            engine.generate_phase(IDS, release)
