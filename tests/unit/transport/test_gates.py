"""Gates: lanes wait for changes, in the order of the machine or of a seed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from dinfer.model.decoder import Decoder
from dinfer.plan.ops import Op
from dinfer.transport.gate import Gate
from tests.support.seeded_gate import SeededGate
from tests.support.twin import prompt, twin

IDS = list(prompt(10))


def order_of_ops(decoder: Decoder, seed: int) -> list[tuple[int, Op]]:
    told: list[tuple[int, Op]] = []
    with twin(decoder, gate=SeededGate(seed), world_size=3, chunk_size=4, sync_strategy="ring") as made:
        fleet = made.prepare(IDS)
        for engine in made.engines:
            engine.executor.on_op = lambda event, op: told.append((event.rank, op))
        made.go(fleet)
        assert fleet.wait(lambda stands: all(stand.at_limits for stand in stands), 30)
    return told


def test_a_seed_gives_one_order_and_another_seed_another(small: Decoder) -> None:
    orders = [order_of_ops(small, seed) for seed in (1, 1, 1, 2, 3)]
    assert orders[0] == orders[1] == orders[2]
    assert orders[3] != orders[0] != orders[4] != orders[3]
    assert len({frozenset(order) for order in orders}) == 1


def enrolled(gate: Gate, count: int, lane: Callable[[], object]) -> list[threading.Thread]:
    """That many lanes, which have yet to be started."""

    def run() -> None:
        lane()
        gate.leave()

    threads = [threading.Thread(target=run, name=f"lane {n}") for n in range(count)]
    for thread in threads:
        gate.enroll(thread.name)
    return threads


def join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_one_lane_runs_at_a_time() -> None:
    gate, inside, turns = SeededGate(0), [0], [0]

    def lane() -> None:
        for _ in range(20):
            gate.wait(lambda: True)
            inside[0] += 1
            assert inside[0] == 1
            turns[0] += 1
            inside[0] -= 1

    threads = enrolled(gate, 4, lane)
    for thread in threads:
        thread.start()
    join(threads)
    assert turns == [80]


def test_all_waiting_for_what_never_comes_is_stuck() -> None:
    gate, key = SeededGate(0), threading.Event()
    threads = enrolled(gate, 3, lambda: gate.wait(lambda: key.is_set() or None))
    for thread in threads[:2]:
        thread.start()
    assert not gate.stuck()  # one lane has not come yet
    threads[2].start()
    assert gate.wait(lambda: gate.stuck() or None, 30)
    with gate.change():
        key.set()
    join(threads)


def test_nested_changes_are_seen_at_once() -> None:
    """Whoever waits sees both halves or none: the outermost change is the one that wakes."""
    gate, seen, state = SeededGate(0), [], [0]

    def claim() -> bool | None:
        seen.append(state[0])
        return state[0] > 0 or None

    threads = enrolled(gate, 1, lambda: gate.wait(claim))
    threads[0].start()
    assert gate.wait(lambda: gate.stuck() or None, 30)
    with gate.change():
        with gate.change():
            state[0] = 1
        state[0] = 2
    join(threads)
    assert set(seen) == {0, 2}


@pytest.mark.parametrize("gate", [Gate(), SeededGate(0)], ids=["free", "seeded"])
def test_a_wait_ends_with_the_claim_or_the_timeout(gate: Gate) -> None:
    assert gate.wait(lambda: "here", 0.01) == "here"
    assert gate.wait(lambda: None, 0.01) is None
    done = threading.Event()
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(gate.wait, lambda: "late" if done.is_set() else None, 30)
        with gate.change():
            done.set()
        assert waiting.result(60) == "late"


def test_an_error_inside_a_change_leaves_the_gate_usable() -> None:
    for gate in (Gate(), SeededGate(0)):
        with pytest.raises(ZeroDivisionError), gate.change():
            raise ZeroDivisionError
        assert gate.wait(lambda: 1, 1) == 1


def test_an_error_in_a_claim_is_raised_where_it_waits() -> None:
    """Whoever makes the change may run the claim, but is not the one to blame for it."""
    gate, broken, waits = Gate(), threading.Event(), threading.Event()

    def claim() -> None:
        waits.set()
        if broken.is_set():
            raise LookupError("broken claim")

    def change() -> None:
        with gate.change():
            broken.set()

    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(gate.wait, claim, 30)
        assert waits.wait(60)
        pool.submit(change).result(60)
        with pytest.raises(LookupError, match="broken claim"):
            waiting.result(60)
